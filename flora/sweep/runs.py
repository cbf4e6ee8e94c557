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
from flora.core.processes import ALONE, Message, Processes
from flora.core.rng import Rng
from flora.data.datasets.base import Dataset
from flora.engine.dealing import deal
from flora.engine.together import Member, Together
from flora.evaluation.summary import percent
from flora.runs.loop import resume, simulate
from flora.runs.resume import changeable_overrides, refuse_other_settings, why_over
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
    processes: Processes = ALONE,
) -> None:
    """Bring every run to its end, `jobs` processes at once, and fill in `outcomes`.

    Up to `fold` runs that can share their steps do so in one process. `check` is called again and again; what it raises
    stops the runs at their next good place. Where torchrun has started several `processes`, each does some of the runs.
    """
    missing = _missing(configs, outcomes, processes)
    groups = foldable(missing, most=fold, jobs=jobs * processes.size)
    owners = deal([len(group) for group in groups], processes.size)
    mine = [group for group, owner in zip(groups, owners, strict=True) if owner == processes.rank]
    hidden = None if processes.is_first else True  # None: where standard error is no terminal
    with tqdm(
        total=len(configs), initial=len(outcomes), desc="runs", unit="run", disable=hidden, dynamic_ncols=True
    ) as bar:

        def tell(config: ExperimentConfig, problem: str | None) -> None:
            outcomes[config.name] = problem
            bar.update()
            if processes.is_first:
                line = problem or _one_line(Path(config.output, config.name))
                tqdm.write(f"{config.name}: {line}", file=sys.stderr)

        for line in described(groups) if processes.is_first and fold > 1 else []:
            tqdm.write(line, file=sys.stderr)
        for index, found in work_through(bring_to_their_end, mine, jobs=jobs, check=check):
            for config in mine[index]:
                tell(config, found[config.name] if isinstance(found, dict) else found)
        done = {config.name: outcomes[config.name] for group in mine for config in group}
        for rank, message in enumerate(processes.exchange(Message(done))):
            if rank != processes.rank:
                for config in missing:
                    if config.name in message.fields:
                        tell(config, message.fields[config.name])


def _missing(configs: Sequence[ExperimentConfig], outcomes: Outcomes, processes: Processes) -> list[ExperimentConfig]:
    """The runs that are to be done and can be; `outcomes` says what the others have come to. Process 0 finds it."""
    if processes.is_first:
        ready = _with_what_they_need([config for config in configs if _is_missing(config, outcomes)], outcomes)
        processes.exchange(Message([[config.name for config in ready], outcomes]))
        return ready
    names, ended = processes.exchange(Message())[0].fields
    outcomes.update(ended)
    return [config for config in configs if config.name in names]


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
    if why_over(directory, config) is None:
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
        lacking = problem(repr(config.backbone), config.backbone.fetch)
        for data in _datasets(config):
            if lacking is None and getattr(data, "download", False):
                lacking = problem(repr(data), lambda data=data: data.load(Rng(0)))  # type: ignore[misc]
        if lacking is None:
            ready.append(config)
        else:
            outcomes[config.name] = lacking
    return ready


def _datasets(config: ExperimentConfig) -> list[Dataset]:
    """The data sets that a run reads: its own, and those of its server."""
    sections = (config.server.synthetic, config.server.distillation)
    return [config.data, *(section.data for section in sections if section is not None)]


def _one_line(directory: Path) -> str:
    figures = read_outcome(directory).figures
    accuracies = f"{percent(figures['zero_shot_accuracy'])} -> {percent(figures['last_accuracy'])}"
    return f"{accuracies}, {figures['train_seconds']:.1f} s of training"
