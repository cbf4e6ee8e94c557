"""What a sweep saves whose runs train together: the same runs one after another, and in one process."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flora.config.schema import ExperimentConfig
from flora.core.errors import UserError
from flora.sweep.__main__ import combinations, configurations
from flora.sweep.folding import MOST_TOGETHER, foldable
from flora.sweep.runs import Outcomes, run_all


@dataclass(frozen=True)
class SweepCost:
    """The seconds that a sweep took, and those of all of its runs' training and evaluations."""

    seconds: float
    train_seconds: float
    evaluation_seconds: float


def compare_sweeps(path: str, axes: Sequence[str]) -> list[str]:
    """Run a sweep's runs one after another, then together; return a Markdown table.

    Both begin with a warm cache of image features, and with a process that has imported everything. Raises `UserError`
    as a sweep does, and if a run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        grid = combinations([path], axes)
        groups = foldable(configurations(grid, Path(folder, "warm")), most=len(grid), jobs=1)
        _cost([replace(group[0], rounds=0) for group in groups], fold=1)
        one_by_one = _cost(configurations(grid, Path(folder, "one by one")), fold=1)
        together = _cost(configurations(grid, Path(folder, "together")), fold=MOST_TOGETHER)
    lines = ["| runs | s | x | training, s | evaluation, s |", "|---|---|---|---|---|"]
    for name, cost in (("one after another", one_by_one), ("together", together)):
        cells = name, f"{cost.seconds:.1f}", f"{one_by_one.seconds / cost.seconds:.2f}"
        lines.append(f"| {' | '.join(cells)} | {cost.train_seconds:.1f} | {cost.evaluation_seconds:.1f} |")
    return [*lines, "", f"{len(grid)} runs, each of {configurations(grid, Path(folder))[0].rounds} rounds"]


def _cost(configs: Sequence[ExperimentConfig], *, fold: int) -> SweepCost:
    """Do the runs, and return what that took."""
    outcomes: Outcomes = {}
    started = time.perf_counter()
    run_all(configs, outcomes, jobs=1, fold=fold, check=lambda: None)
    seconds = time.perf_counter() - started
    for name, problem in outcomes.items():
        if problem is not None:
            raise UserError(f"{name}: {problem.splitlines()[-1]}")
    summaries = [json.loads(Path(each.output, each.name, "summary.json").read_text()) for each in configs]
    return SweepCost(
        seconds, sum(each["train_seconds"] for each in summaries), sum(each["eval_seconds"] for each in summaries)
    )
