"""The command line: `python -m flora.simulate CONFIG [key=value ...]`; from Python: `simulate` and `resume`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from flora.config.listing import list_components
from flora.config.overrides import override_key
from flora.config.parse import changes_by_overrides, load_config
from flora.config.rules import mistakes
from flora.core.command_line import Parser, out_of_memory_reason, run_program, split_arguments
from flora.core.errors import ConfigError, UserError
from flora.core.hooks import Hooks
from flora.core.interrupts import Interrupts
from flora.evaluation import summary as report
from flora.runs.loop import RunResult, resume, simulate
from flora.runs.resume import (
    resumed_config,
)

__all__ = ["RunResult", "main", "resume", "simulate"]


def _parser() -> Parser:
    parser = Parser(
        prog="python -m flora.simulate",
        description="Federated adaptation of a frozen CLIP model, simulated in one process.",
        epilog="example: python -m flora.simulate experiments/quickstart.yaml rounds=5 clients.number=20",
    )
    parser.add_argument("arguments", nargs="*", metavar="CONFIG [key=value ...]", help="a YAML file, then overrides")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run whose directory is given in place of CONFIG"
    )
    parser.add_argument(
        "--accept-lost-records",
        action="store_true",
        help="with --resume: go on although lines of rounds.jsonl are damaged",
    )
    parser.add_argument("--check", action="store_true", help="only validate one or more files; nothing is loaded")
    parser.add_argument("--list", action="store_true", help="print every component with its options")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 2 for anything the user can mend, 130 for Ctrl-C."""
    return run_program(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    options = _parser().parse(argv)
    paths, overrides = split_arguments(options.arguments)
    if options.list:
        print(list_components())
        return 0
    if options.accept_lost_records and not options.resume:
        raise UserError("--accept-lost-records belongs to --resume; see --help")
    if options.resume and len(paths) != 1:
        raise UserError(f"expected one run directory, got {len(paths)}; see --help")
    if not paths or (len(paths) > 1 and not options.check):
        raise UserError(f"expected {'a config file' if not paths else 'one config file'}, got {len(paths)}; see --help")
    if options.check:
        return _check(paths, overrides, resuming=options.resume)
    _run_one(paths[0], overrides, resuming=options.resume, accept_lost_records=options.accept_lost_records)
    return 0


def _check(paths: Sequence[str], overrides: Sequence[str], *, resuming: bool) -> int:
    """Print a line for each file that is right and for each mistake in the others; return the exit status."""
    status = 0
    for path in paths:
        lines: list[str] = []
        try:
            config = resumed_config(Path(path), overrides) if resuming else load_config(path, overrides)
            lines = [f"{path}: {mistake}" for mistake in mistakes(config)]
        except ConfigError as error:
            lines = list(error.mistakes)
        except UserError as error:
            lines = [str(error)]
        if not lines:
            print(f"{path}: ok")
        for line in lines:
            print(" ".join(line.splitlines()), file=sys.stderr)
            status = 2
    return status


def _run_one(path: str, overrides: Sequence[str], *, resuming: bool, accept_lost_records: bool = False) -> None:
    config = resumed_config(Path(path), overrides) if resuming else load_config(path, overrides)
    try:
        with Interrupts() as interrupts:
            hooks = Hooks(before_block=lambda round, clients: interrupts.check())
            if resuming:
                result = resume(path, overrides, echo=_say, hooks=hooks, accept_lost_records=accept_lost_records)
            else:
                named = any(override_key(override) == "name" for override in overrides)
                notes = [f"changed on the command line: {line}" for line in changes_by_overrides(path, overrides)]
                result = simulate(config, numbered=not named, echo=_say, hooks=hooks, notes=notes)
    except (ConfigError, BrokenPipeError):
        raise
    except UserError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.filename or config.output}: {error.strerror or error}") from None
    except Exception as error:
        reason = out_of_memory_reason(error)
        if reason is None:
            raise
        raise UserError(f"{path}: {reason}") from None
    print("\n".join(report.lines(result.summary, config)))
    print(f"written to {result.directory}")


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
