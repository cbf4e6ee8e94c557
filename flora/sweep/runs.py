"""Run what is missing of a sweep: download what is needed once, then do each run in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from flora.config.schema import ExperimentConfig
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.rng import Rng
from flora.data.datasets.base import Dataset
from flora.engine.together import Member, Together
from flora.evaluation.summary import percent
from flora.runs.loop import resume, simulate
from flora.runs.resume import changeable_overrides, finished_rounds, refuse_other_settings
from flora.runs.run_directory import RunDirectory
from flora.sweep.folding import described, foldable
from flora.sweep.outcomes import read_outcome
from flora.sweep.workers import problem_of, work_through

Outcomes = dict[str, str | None]
"""By a run's name: None if it is finished, else a line that says why not. A run that is not in it is not done yet."""


def run_all(
    configs: Sequence[ExperimentConfig],
    outcomes: Outcomes,
    *,
    jobs: int,
    fold: int = 1,
    check: Callable[[], object],
) -> None:
    """Bring every run to its end, `jobs` processes at once, and fill in `outcomes`.

    Up to `fold` runs that can share their steps do so in one process. `check` is called again and again; what it raises
    stops the runs at their next good place.
    """
    missing = [config for config in configs if _is_missing(config, outcomes)]
    missing = _with_what_they_need(missing, outcomes)
    groups = foldable(missing, most=fold, jobs=jobs)
    for line in described(groups) if fold > 1 else []:
        tqdm.write(line, file=sys.stderr)
    with tqdm(
        total=len(configs), initial=len(outcomes), desc="runs", unit="run", disable=None, dynamic_ncols=True
    ) as bar:
        for index, found in work_through(bring_to_their_end, groups, jobs=jobs, check=check):
            for config in groups[index]:
                name = config.name
                outcomes[name] = problem = found[name] if isinstance(found, dict) else found
                bar.update()
                tqdm.write(f"{name}: {problem or _one_line(Path(config.output, name))}", file=sys.stderr)


def bring_to_their_end(configs: Sequence[ExperimentConfig], hooks: Hooks) -> Outcomes:
    """Do runs, or go on with them, unless they are finished; several of them together. Return how they ended.

    One that was begun with other settings ends with that.
    """
    if len(configs) == 1:
        _bring_to_its_end(configs[0], hooks)
        return {configs[0].name: None}
    works = [partial(_bring_to_its_end, config, Hooks()) for config in configs]
    errors = Together(hooks).run(works)
    names = [config.name for config in configs]
    return {name: None if error is None else problem_of(error) for name, error in zip(names, errors, strict=True)}


def _bring_to_its_end(config: ExperimentConfig, hooks: Hooks, member: Member | None = None) -> None:
    directory = Path(config.output, config.name)
    if (directory / "config.yaml").is_file():
        if _needs_rounds(config):
            overrides = [*changeable_overrides(config), f"rounds={config.rounds}"]
            resume(directory, overrides, hooks=hooks, member=member)
        return
    RunDirectory.remove_unbegun(directory)
    simulate(config, hooks=hooks, member=member)


def _needs_rounds(config: ExperimentConfig) -> bool:
    """Whether there are rounds to do. Raises `UserError` if the run was begun with other settings."""
    directory = Path(config.output, config.name)
    if not (directory / "config.yaml").is_file():
        return True
    refuse_other_settings(directory, config)
    finished = finished_rounds(directory)
    if finished is None or finished < config.rounds:
        return True
    read_outcome(directory)  # raises if it is damaged
    return False


def _is_missing(config: ExperimentConfig, outcomes: Outcomes) -> bool:
    """Whether a run needs to be done; if not, `outcomes` says why."""
    try:
        if _needs_rounds(config):
            return True
        outcomes[config.name] = None
    except UserError as error:
        outcomes[config.name] = str(error)
    return False


def _with_what_they_need(configs: Sequence[ExperimentConfig], outcomes: Outcomes) -> list[ExperimentConfig]:
    """The runs whose weights and data are there, or could be fetched: once, before several would do it at once."""
    known: Outcomes = {}

    def problem(key: str, fetch: Callable[[], object]) -> str | None:
        if key not in known:
            try:
                fetch()
                known[key] = None
            except UserError as error:
                known[key] = str(error)
        return known[key]

    ready = []
    for config in configs:
        found = problem(repr(config.backbone), config.backbone.fetch)
        for data in _datasets(config):
            if found is None and getattr(data, "download", False):
                found = problem(repr(data), lambda data=data: data.load(Rng(0)))  # type: ignore[misc]
        if found is None:
            ready.append(config)
        else:
            outcomes[config.name] = found
    return ready


def _datasets(config: ExperimentConfig) -> list[Dataset]:
    """The data sets that a run reads: its own, and those of its server."""
    sections = (config.server.synthetic, config.server.distillation)
    return [config.data, *(section.data for section in sections if section is not None)]


def _one_line(directory: Path) -> str:
    figures = read_outcome(directory).figures
    accuracies = f"{percent(figures['zero_shot_accuracy'])} -> {percent(figures['last_accuracy'])}"
    return f"{accuracies}, {figures['train_seconds']:.1f} s of training"
