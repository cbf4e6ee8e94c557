"""`python -m flora.sweep CONFIG ... key=v1,v2 ...`: every combination, each once, and one table of what came out.

Finished runs are skipped and stopped ones gone on with, so a sweep can be stopped and started as often as one likes.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from flora.config import load_config
from flora.errors import UserError
from flora.experiment import check_experiment
from flora.hooks import Hooks
from flora.interrupts import Interrupted, Interrupts
from flora.resume import finished_rounds, refuse_other_settings
from flora.simulate import resume, simulate
from flora.sweep_table import collect, to_csv, to_markdown, to_text


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


def run_all(grid: Sequence[Combination], folder: Path, hooks: Hooks) -> list[str]:
    """Bring every run of the grid to its end, in order; return a line for each that failed."""
    configs = [load_config(each.config, [*each.overrides, f"output={folder}", f"name={each.name}"]) for each in grid]
    for config in configs:
        check_experiment(config)
    failures = []
    for config in tqdm(configs, desc="runs", unit="run", disable=None, dynamic_ncols=True):
        directory = folder / config.name
        try:
            if (directory / "config.yaml").is_file():
                refuse_other_settings(directory, config)
                finished = finished_rounds(directory)
                if finished is None or finished < config.rounds:
                    resume(directory, [f"rounds={config.rounds}"], hooks=hooks)
            else:
                simulate(config, hooks=hooks)
        except UserError as error:
            failures.append(f"{config.name}: {error}")
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 2 for a mistake or if a run failed, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m flora.sweep", description=__doc__)
    parser.add_argument("arguments", nargs="+", metavar="CONFIG ... key=v1,v2 ...", help="YAML files, then the grid")
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"), help="the sweep's folder (%(default)s)")
    options = parser.parse_args(argv)
    configs = [argument for argument in options.arguments if "=" not in argument]
    axes = [argument for argument in options.arguments if "=" in argument]
    try:
        if not configs:
            raise UserError("expected a config file")
        grid = combinations(configs, axes)
        with Interrupts() as interrupts:
            failures = run_all(grid, options.output, Hooks(before_block=lambda round, clients: interrupts.check()))
        table = collect([(options.output / each.name, each.config, dict(each.values)) for each in grid])
        (options.output / "table.md").write_text(to_markdown(table), encoding="utf-8")
        (options.output / "table.csv").write_text(to_csv(table), encoding="utf-8")
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
    print(f"\nwritten to {options.output}/table.md and table.csv")
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
