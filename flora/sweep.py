"""`python -m flora.sweep CONFIG ... key=v1,v2 ...`: every combination, each once, and one table of what came out.

Finished runs are skipped and stopped ones gone on with, so a sweep can be stopped and started as often as one likes.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from flora.config import ExperimentConfig, load_config
from flora.curves import draw_curves
from flora.errors import UserError
from flora.experiment import check_experiment
from flora.hooks import Hooks
from flora.interrupts import Interrupted, Interrupts
from flora.report import percent
from flora.resume import finished_rounds, refuse_other_settings
from flora.simulate import resume, simulate
from flora.sweep_table import (
    Row,
    collect,
    read_outcome,
    to_csv,
    to_curves,
    to_markdown,
    to_overview,
    to_text,
    with_ratios,
)
from flora.workers import work_through

# Runs that fail for one reason, with none finished, after which the rest of a sweep is not tried.
ENOUGH_FAILURES = 3


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
    keys, choices = [], []
    for axis in axes:
        key, separator, values = axis.partition("=")
        if not separator or not key.strip() or not values.strip():
            raise UserError(f"command line: expected key=value,value, got {axis!r}")
        keys.append(key.strip())
        choices.append(split_values(values))
    grid = [
        Combination(config, tuple(zip(keys, values, strict=True)))
        for config in configs
        for values in itertools.product(*choices)
    ]
    names = [combination.name for combination in grid]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"command line: two runs would both be called {twice}; give each value once")
    return grid


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


def configurations(grid: Sequence[Combination], folder: Path, shared: Sequence[str] = ()) -> list[ExperimentConfig]:
    """The checked configuration of each run, which lies below `folder`; `shared` are overrides of all.

    Raises `UserError` for the first bad one.
    """
    places = [[f"output={folder}", f"name={each.name}"] for each in grid]
    configs = [
        load_config(each.config, [*shared, *each.overrides, *place]) for each, place in zip(grid, places, strict=True)
    ]
    for each, config in zip(grid, configs, strict=True):
        try:
            check_experiment(config)
        except UserError as error:
            raise UserError(f"{each.config}: {' '.join(each.overrides)}: {error}") from None
    return configs


def bring_to_its_end(config: ExperimentConfig, hooks: Hooks) -> None:
    """Do a run, or go on with it, unless it is finished. Raises `UserError` if it was begun with other settings."""
    directory = Path(config.output, config.name)
    if not (directory / "config.yaml").is_file():
        simulate(config, hooks=hooks)
    elif needs_rounds(config):
        resume(directory, [f"rounds={config.rounds}"], hooks=hooks)


def needs_rounds(config: ExperimentConfig) -> bool:
    """Whether there are rounds to do. Raises `UserError` if the run was begun with other settings."""
    directory = Path(config.output, config.name)
    if not (directory / "config.yaml").is_file():
        return True
    refuse_other_settings(directory, config)
    finished = finished_rounds(directory)
    return finished is None or finished < config.rounds


def run_all(configs: Sequence[ExperimentConfig], *, jobs: int, check: Callable[[], object]) -> list[str]:
    """Bring every run to its end, `jobs` at once; return a line for each that failed.

    `check` is called again and again; what it raises stops the runs at their next good place. Raises `UserError` if
    no run is finished and the first few fail for one reason: so will the others.
    """
    failures, missing, reasons = [], [], []
    for config in configs:
        try:
            if needs_rounds(config):
                missing.append(config)
        except UserError as error:
            failures.append(f"{config.name}: {error}")
    num_done = len(configs) - len(missing) - len(failures)
    with tqdm(total=len(configs), initial=num_done, desc="runs", unit="run", disable=None, dynamic_ncols=True) as bar:
        for index, problem in work_through(bring_to_its_end, missing, jobs=jobs, check=check):
            name = missing[index].name
            bar.update()
            if problem is not None:
                failures.append(f"{name}: {problem}")
            reasons.append(problem)
            tqdm.write(f"{name}: {problem or _one_line(Path(missing[index].output, name))}", file=sys.stderr)
            if problem and not num_done and reasons == [problem] * ENOUGH_FAILURES:
                raise UserError(f"the first {ENOUGH_FAILURES} runs failed for one reason; the others were not tried")
    return failures


def _one_line(directory: Path) -> str:
    outcome = read_outcome(directory)
    return f"{percent(outcome.zero_shot)} -> {percent(outcome.last)}, {outcome.train_seconds:.1f} s of training"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _curves(table: Sequence[Row], folder: Path) -> list[Path]:
    """The pictures of the curves, if matplotlib is there to draw them."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no curves: they need matplotlib (pip install 'flora-clip[report]')", file=sys.stderr)
        return []
    return draw_curves(to_curves(table), folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 2 for a mistake or if a run failed, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m flora.sweep", description=__doc__)
    parser.add_argument("arguments", nargs="+", metavar="CONFIG ... key=v1,v2 ...", help="YAML files, then the grid")
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"), help="the sweep's folder (%(default)s)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="for all runs, without being part of their names",
    )
    parser.add_argument("--jobs", type=_positive, default=1, help="runs at once, sharing the CPU's cores (%(default)s)")
    parser.add_argument("--reference", default="full", help="the method that the ratios refer to (%(default)s)")
    options = parser.parse_args(argv)
    configs = [argument for argument in options.arguments if "=" not in argument]
    axes = [argument for argument in options.arguments if "=" in argument]
    try:
        if not configs:
            raise UserError("expected a config file")
        grid = combinations(configs, axes)
        with Interrupts() as interrupts:
            runs = configurations(grid, options.output, options.set)
            failures = run_all(runs, jobs=options.jobs, check=interrupts.check)
        described = [(options.output / each.name, each.config, dict(each.values)) for each in grid]
        table = with_ratios(collect(described), options.reference)
        written = [options.output / "table.md", options.output / "table.csv"]
        parts = [part for part in (to_overview(table), to_markdown(table)) if part]
        written[0].write_text("\n".join(parts), encoding="utf-8")
        written[1].write_text(to_csv(table), encoding="utf-8")
        written += _curves(table, options.output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{options.output}: {error.strerror or error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        print(f"stopped by {interrupted}; the same command goes on", file=sys.stderr)
        return interrupted.exit_status
    print(to_text(table))
    print(f"\nwritten: {', '.join(map(str, written))}")
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
