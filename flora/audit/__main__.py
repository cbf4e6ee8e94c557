"""`python -m flora.audit RUN`: what attacks on a finished run show of its clients and of their examples."""

from __future__ import annotations

from flora.parsers import first_look

if __name__ == "__main__":
    first_look("audit")  # what is imported from here on takes seconds

import sys
from collections.abc import Sequence
from typing import Any

from flora import catalogue  # noqa: F401  (registers the components)
from flora.audit.membership import client_membership, example_membership
from flora.audit.one_run import canary_audit, guarantees
from flora.audit.subject import Subject, audited
from flora.audit.updates import class_presence
from flora.core.command_line import run_program
from flora.core.errors import UserError
from flora.core.progress import bar, image_progress
from flora.core.tree import state_digest
from flora.parsers import audit_parser
from flora.report.audits import lines
from flora.runs.environment import environment
from flora.runs.finished import check_overrides
from flora.runs.resume import CHANGEABLE
from flora.runs.run_directory import check_free_name, write_json

# What may be different from the run: where things are, and how it is computed.
ALLOWED = (*CHANGEABLE, "device")
CONFIDENCE = 0.95


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for anything that the user can mend."""
    return run_program(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    options = audit_parser().parse(argv)
    check_overrides(options.overrides, ALLOWED)
    name, folder = options.name, options.run / "audits"
    check_free_name(folder, name)
    subject = audited(options.run, options.overrides, progress=image_progress(_say), log=_say)
    content = audit(subject, options)
    for line in lines(content):
        print(line)
    path = write_json(folder, f"{name or 'audit'}.json", content, numbered=name is None)
    print(f"written to {path}")
    return 0


def audit(subject: Subject, options: Any) -> dict[str, Any]:
    """Make the attacks that `options`, the parsed command line, ask for; return the record as JSON types."""
    after = adapters_asked_for(subject, options.rounds)
    if options.only == ("canaries",) and subject.experiment.federation.canaries is None:
        raise UserError("--only canaries: this run has none; they are planted before it (the setting canaries)")
    found: dict[str, Any] = {}
    if "membership" in options.only:
        total = options.references * max(after)
        with bar("reference runs", total, "round", shown=options.references > 0) as progress:
            found["membership"] = example_membership(
                subject, after, num_references=options.references, most=options.examples, advance=progress.update
            )
    if "clients" in options.only:
        total = options.references * subject.last_round
        with bar("reference runs of clients", total, "round", shown=options.references > 0) as progress:
            found["clients"] = client_membership(subject, num_references=options.references, advance=progress.update)
    hides_updates = subject.run.config.server.secure_sum is not None
    if hides_updates:
        _say("single updates: not attacked, because with server.secure_sum nobody sees them")
    if "updates" in options.only and not hides_updates:
        asked = options.rounds or [round + 1 for round in subject.states if round < subject.last_round]
        found["updates"] = class_presence(subject, [round for round in asked if round - 1 in subject.states])
    if "canaries" in options.only:
        found["canaries"] = canary_audit(subject, delta=options.delta, confidence=CONFIDENCE)
    engine, config = subject.experiment.federation.engine, subject.run.config
    return {
        "run": str(subject.run.path),
        "rounds": subject.last_round,
        "adapter_sha256": state_digest(subject.run.adapter),
        "guarantee": guarantees(subject),
        **found,
        "environment": environment(engine.model.device, config.seed, engine.clients_per_block),
    }


def adapters_asked_for(subject: Subject, rounds: Sequence[int] | None) -> list[int]:
    """Return after which rounds the server's adapter is attacked. Raises `UserError` for one that is not known."""
    known = [round for round in subject.states if round]
    unknown = [round for round in rounds or () if round not in known]
    if unknown:
        raise UserError(
            f"--rounds: of round {unknown[0]} there is no adapter any more, only of {', '.join(map(str, known))}; "
            f"checkpoints.keep={subject.last_round} in the run's configuration keeps all"
        )
    return sorted(rounds or known)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
