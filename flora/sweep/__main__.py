"""`python -m flora.sweep CONFIG ... key=v1,v2 ...`: every combination, each once, and one table of what came out.

Finished runs are skipped and stopped ones gone on with, so a sweep can be stopped and started as often as one likes.
"""

from __future__ import annotations

from flora.parsers import first_look

if __name__ == "__main__":
    first_look("sweep")  # what is imported from here on takes seconds

import argparse
import importlib.util
import itertools
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from flora.config.parse import load_config
from flora.config.presets import NO_SCENARIO, read_scenario
from flora.config.rules import check_experiment
from flora.config.schema import ExperimentConfig
from flora.core.command_line import run_program, split_arguments
from flora.core.errors import UserError
from flora.core.files import write_whole
from flora.core.interrupts import Interrupted, Interrupts
from flora.core.processes import Processes
from flora.core.registry import suggest
from flora.parsers import sweep_parser
from flora.report.curves import draw_curves, draw_lines, undrawn
from flora.report.dots import draw_dots
from flora.runs.run_directory import lock_file
from flora.sweep.choosing import Choices, Run, check_search, choose, read_choices, to_json
from flora.sweep.folding import MOST_TOGETHER
from flora.sweep.over_values import pictures_over_values
from flora.sweep.results import dots_of, to_latex, to_results, with_domain_means
from flora.sweep.runs import Outcomes, run_all
from flora.sweep.table import Row, aligned, collect, markdown, to_csv, to_curves, to_markdown, to_text, with_ratios

# Each run's own, made of the grid.
OWN_KEYS = ("name", "output")


@dataclass(frozen=True)
class Combination:
    """One run of a sweep: a config file and a value for each swept key."""

    config: str
    values: tuple[tuple[str, str], ...]

    @property
    def overrides(self) -> list[str]:
        """The values as `key=value`."""
        return [f"{key}={value}" for key, value in self.values]

    @property
    def name(self) -> str:
        """A folder's name that says what the run is, in plain characters."""
        parts = [Path(self.config).stem, *self.overrides]
        return re.sub(r"[^A-Za-z0-9=.+-]+", "_", ",".join(parts)).strip("_.")[:200]


def combinations(configs: Sequence[str], axes: Sequence[str]) -> list[Combination]:
    """The grid of `configs` and `axes`, each `key=v1,v2`. Raises `UserError` if two combinations have one name."""
    choices: dict[str, list[str]] = {}
    for axis in axes:
        key, separator, values = axis.partition("=")
        key = key.strip()
        if not separator or not key or not values.strip():
            raise UserError(f"command line: expected key=value,value, got {axis!r}")
        if key in choices:
            raise UserError(f"command line: {key} is given twice; write {key}=value,value")
        choices[key] = split_values(values)
    _refuse_output_and_name(list(choices))
    grid = [
        Combination(config, tuple(zip(choices, values, strict=True)))
        for config in configs
        for values in itertools.product(*choices.values())
    ]
    for name, count in Counter(combination.name for combination in grid).items():
        if count > 1:
            files = dict.fromkeys(each.config for each in grid if each.name == name)
            mend = "rename one of the files" if len(files) > 1 else "give each value once"
            raise UserError(f"command line: two runs would both be called {name} ({', '.join(files)}); {mend}")
    return grid


def _refuse_output_and_name(keys: Sequence[str]) -> None:
    for key in keys:
        if key in OWN_KEYS:
            raise UserError(f"command line: {key}: each run of a sweep has its own; --output names the sweep's folder")


def split_values(text: str) -> list[str]:
    """`text` cut at its commas, except at those inside brackets and braces."""
    values, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def configurations(
    grid: Sequence[Combination],
    folder: Path,
    shared: Sequence[str] = (),
    choices: Choices | None = None,
    *,
    skip: Callable[[str], object] | None = None,
) -> list[ExperimentConfig]:
    """The checked configuration of each run, which lies below `folder`; `shared` are overrides of all.

    `choices` are more, of the runs that a search chose them for. Raises `UserError` for the first bad one; with `skip`
    those that the rules refuse are left out, and it is told why.
    """
    _refuse_output_and_name([override.partition("=")[0].strip() for override in shared])
    configs = []
    for each in grid:
        chosen = None if choices is None else choices.override(each.config, dict(each.values))
        of_run = [*each.overrides, *([chosen] if chosen else []), f"output={folder}", f"name={each.name}"]
        configs.append(load_config(each.config, [*shared, *of_run]))
    allowed = []
    for each, config in zip(grid, configs, strict=True):
        try:
            check_experiment(config)
            allowed.append(config)
        except UserError as error:
            problem = f"{each.config}: {' '.join(each.overrides)}: {error}"
            if skip is None:
                raise UserError(problem) from None
            skip(f"left out: {problem}")
    return allowed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 2 for a mistake or if a run failed, 130 for Ctrl-C."""
    return run_program(lambda: _in_processes(sweep_parser().parse(argv)))


def _in_processes(options: argparse.Namespace) -> int:
    """Do the sweep with all processes that torchrun has started, each with a device of its own; else with this one."""
    with Processes.of_environment() as processes:
        if processes.size > 1 and torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
            devices = visible.split(",")
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[processes.local_rank % len(devices)]
        return _main(options, processes)


def _main(options: argparse.Namespace, processes: Processes) -> int:
    configs, axes = split_arguments(options.arguments)
    grid = combinations(configs, axes)
    _check_options(options, grid)
    fold = _most_together(options.fold)
    outcomes: Outcomes = {}
    stopped: Interrupted | None = None
    try:
        with Interrupts() as interrupts:
            earlier = _earlier_choices(options)
            runs = _configurations(options, grid, earlier, processes)
            if options.choose is not None:
                check_search(options.choose, [axis.partition("=")[0].strip() for axis in axes], runs, earlier)
            with _locked(options.output) if processes.is_first else nullcontext():
                try:
                    run_all(
                        runs,
                        outcomes,
                        jobs=int(options.jobs),
                        fold=fold,
                        check=interrupts.check,
                        processes=processes,
                    )
                except Interrupted as interrupted:
                    stopped = interrupted
    except Interrupted as interrupted:
        stopped = interrupted
    if not processes.is_first:
        if stopped is not None:
            raise stopped
        return 0
    failures = [f"failed: {name}: {problem.splitlines()[-1]}" for name, problem in outcomes.items() if problem]
    if None in outcomes.values():
        try:
            _report(grid, outcomes, options.output, options.reference or "full", _results(runs))
            if options.choose is not None:
                chosen = choose(options.choose, _finished(grid, outcomes, options.output))
                print(f"chosen: {_write(options.output / 'chosen.json', to_json(chosen))}")
                if options.chosen is not None:
                    _write(options.chosen, to_json(chosen if earlier is None else earlier.updated(chosen)))
        except OSError as error:
            raise UserError(f"{error.filename or options.output}: {error.strerror or error}") from None
    print(*failures, sep="\n", end="\n" * bool(failures), file=sys.stderr)
    if stopped is not None:
        print(f"stopped by {stopped}; the same command goes on", file=sys.stderr)
        return stopped.exit_status
    return 2 if failures else 0


def _check_options(options: argparse.Namespace, grid: Sequence[Combination]) -> None:
    """Raise `UserError` for options that are wrong whatever the runs are, and where there are no runs."""
    if not grid:
        raise UserError("expected a config file; see --help")
    names = {name for each in grid for name in (Path(each.config).stem, *dict(each.values).values())}
    if options.reference not in (None, *names):
        raise UserError(f"--reference: no run is called {options.reference!r}; {suggest(options.reference, names)}")
    if not re.fullmatch("[1-9][0-9]{0,3}", options.jobs):
        raise UserError(f"--jobs: expected a whole number of at least 1, got {options.jobs!r}")


def _earlier_choices(options: argparse.Namespace) -> Choices | None:
    """What earlier searches chose, of the file that --chosen names; a search may be the first to write it."""
    if options.chosen is None or (options.choose is not None and not options.chosen.exists()):
        return None
    return read_choices(options.chosen)


def _configurations(
    options: argparse.Namespace, grid: Sequence[Combination], choices: Choices | None, processes: Processes
) -> list[ExperimentConfig]:
    """The checked configurations; process 0 says what is left out of them, and what a search has nothing for."""

    def tell(line: str) -> None:
        if processes.is_first:
            print(line, file=sys.stderr)

    if choices is not None:
        names = choices.without([(each.config, dict(each.values)) for each in grid])
        if names:
            tell(f"{options.chosen}: has no {choices.key} for {', '.join(names)}: the value in their own files is used")
    return configurations(grid, options.output, options.set, choices, skip=tell if options.skip_refused else None)


def _most_together(text: str) -> int:
    """How many runs train together at most. Raises `UserError` for what --fold does not take."""
    if text in ("auto", "off"):
        return MOST_TOGETHER if text == "auto" else 1
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise UserError(f"--fold: expected auto, off or a whole number of at least 1, got {text!r}")
    return int(text)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other sweeps out of a folder. Raises `UserError` if one is in it, or if it can't be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {folder} can't be made: {error.strerror or error}") from None
    lock = lock_file(folder / "lock")
    try:
        yield
    finally:
        if lock is not None:
            (folder / "lock").unlink(missing_ok=True)
            lock.close()
        with suppress(OSError):  # there is something in it
            folder.rmdir()


def _results(runs: Sequence[ExperimentConfig]) -> tuple[str, ...]:
    """The figures that are the result of the scenario that all runs have; none where they have no common one."""
    scenarios = {config.scenario for config in runs}
    return read_scenario(*scenarios).results if len(scenarios) == 1 and NO_SCENARIO not in scenarios else ()


def _finished(grid: Sequence[Combination], outcomes: Outcomes, folder: Path) -> list[Run]:
    """The runs as the table reads them; those that are not finished have no folder."""
    finished = {name for name, problem in outcomes.items() if problem is None}
    return [(folder / each.name if each.name in finished else None, each.config, dict(each.values)) for each in grid]


def _report(
    grid: Sequence[Combination], outcomes: Outcomes, folder: Path, reference: str, results: Sequence[str]
) -> None:
    """Tabulate and draw the runs that are finished, and print the tables; `results` are those of their scenario."""
    table = with_domain_means(with_ratios(collect(_finished(grid, outcomes, folder)), reference))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    overview = to_results(table, results or ("last_accuracy",))
    print(to_text(table, width), aligned(overview, width), sep="\n\n")  # first of all: it needs no disk
    written = [
        _write(folder / "table.md", f"{markdown(overview)}\n{to_markdown(table)}"),
        _write(folder / "table.csv", to_csv(table)),
        _write(folder / "results.tex", to_latex(overview)),
        *_pictures(table, folder, results),
    ]
    print(f"\nwritten: {', '.join(map(str, written))}")


def _write(path: Path, text: str) -> Path:
    write_whole(path, text.encode())
    return path


def _pictures(table: Sequence[Row], folder: Path, results: Sequence[str]) -> list[Path]:
    """The pictures of the curves and of the results, a scenario's if there is one, if matplotlib is there for them."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no curves: they need matplotlib (pip install 'flora-clip[report]')", file=sys.stderr)
        return []
    curves = to_curves(table)
    left_out = undrawn(curves)
    if left_out:
        print(f"not drawn, for want of rounds that all its runs evaluated: {'; '.join(left_out)}", file=sys.stderr)
    over_values = pictures_over_values(table, results or ("last_accuracy",))
    return [
        *draw_curves(curves, folder),
        *draw_dots(dots_of(table, results), folder / "results.png"),
        *draw_lines(over_values, folder),
    ]


if __name__ == "__main__":
    sys.exit(main())
