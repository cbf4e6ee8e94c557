"""The command line: `python -m flora.simulate CONFIG [key=value ...]`; from Python: `simulate` and `resume`."""

from __future__ import annotations

from flora.parsers import first_look

if __name__ == "__main__":
    first_look("simulate")  # what is imported from here on takes seconds

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flora.config.listing import list_components
from flora.config.overrides import override_key
from flora.config.parse import changes_by_overrides, load_config
from flora.config.rules import departures, mistakes
from flora.core.command_line import out_of_memory_reason, run_program, split_arguments
from flora.core.errors import ConfigError, UserError
from flora.core.hooks import Hooks
from flora.core.interrupts import Interrupts
from flora.core.processes import Processes
from flora.evaluation import summary as report
from flora.parsers import check_simulate, simulate_parser
from flora.report.live import LivePage
from flora.report.page import PAGE_NAME, write_page
from flora.report.pictures import require_matplotlib
from flora.report.reading import read_files
from flora.runs.loop import RunResult, resume, simulate
from flora.runs.resume import resumed_config
from flora.runs.sinks import Sink
from flora.runs.together import shared_config

__all__ = ["RunResult", "main", "resume", "simulate"]


def main(argv: Sequence[str] | None = None, *, hooks: Hooks | None = None, sinks: Sequence[Sink] = ()) -> int:
    """Run the command line; return the exit status: 0, 2 for anything the user can mend, 130 for Ctrl-C.

    A program of your own may pass in `hooks` and `sinks`, as for `simulate`; Ctrl-C works as without.
    """

    def body() -> int:
        with Processes.of_environment() as processes:
            return _main(argv, _Extras(hooks or Hooks(), tuple(sinks), processes))

    return run_program(body)


@dataclass(frozen=True)
class _Extras:
    """What a program of the user's own adds to the command line, and the processes that run it."""

    hooks: Hooks
    sinks: tuple[Sink, ...]
    processes: Processes


def _main(argv: Sequence[str] | None, extras: _Extras) -> int:
    options = simulate_parser().parse(argv)
    check_simulate(options)
    paths, overrides = split_arguments(options.arguments)
    if options.list:
        print(list_components())
        return 0
    if options.check:
        return _check(paths, overrides, resuming=options.resume)
    accepts = bool(options.accept_lost_records)
    if options.report or options.live:
        require_matplotlib()
    if options.live:
        extras = replace(extras, sinks=(*extras.sinks, LivePage(_say)))
    directory = _run_one(paths[0], overrides, extras, resuming=options.resume, accept_lost_records=accepts)
    if directory is not None and (options.report or options.live):
        page = directory / PAGE_NAME
        write_page([read_files(directory)], page)
        print(f"to look at: {page}")
    return 0


def _check(paths: Sequence[str], overrides: Sequence[str], *, resuming: bool) -> int:
    """Print a line for each file that is right and for each mistake in the others; return the exit status."""
    status = 0
    for path in paths:
        lines: list[str] = []
        warnings: list[str] = []
        try:
            config = resumed_config(Path(path), overrides) if resuming else load_config(path, overrides)
            lines = [f"{path}: {mistake}" for mistake in mistakes(config)]
            warnings = [f"{path}: {line}" for line in departures(config)]
        except ConfigError as error:
            lines = list(error.mistakes)
        except UserError as error:
            lines = [str(error)]
        if not lines:
            print(*warnings, f"{path}: ok", sep="\n")
        for line in lines:
            print(" ".join(line.splitlines()), file=sys.stderr)
            status = 2
    return status


def _run_one(
    path: str, overrides: Sequence[str], extras: _Extras, *, resuming: bool, accept_lost_records: bool
) -> Path | None:
    """Do a run, or go on with it; return its directory, in process 0 alone."""
    processes = extras.processes
    config = shared_config(
        processes, lambda: resumed_config(Path(path), overrides) if resuming else load_config(path, overrides)
    )
    try:
        with Interrupts(talks=processes.is_first) as interrupts:
            hooks = Hooks(before_block=lambda round, clients: interrupts.check()).then(extras.hooks)
            given: Any = {"echo": _say, "hooks": hooks, "sinks": extras.sinks, "progress": True, "processes": processes}
            if resuming:
                result = resume(path, overrides, accept_lost_records=accept_lost_records, **given)
            else:
                named = any(override_key(override) == "name" for override in overrides)
                changes = changes_by_overrides(path, overrides) if processes.is_first else []
                notes = [f"changed on the command line: {line}" for line in changes]
                result = simulate(config, numbered=not named, notes=notes, **given)
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
    if not processes.is_first:
        return None
    print("\n".join(report.lines(result.summary, config)))
    print(f"written to {result.directory}")
    return result.directory


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
