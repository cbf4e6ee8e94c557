"""Build a run's experiment, with the threads that it computes with; and those whom a run works with and tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from flora.config.schema import ExperimentConfig
from flora.core.hooks import Hooks
from flora.core.processes import Processes
from flora.core.progress import Tell, image_progress
from flora.engine.together import Member
from flora.experiment.build import Experiment, build_experiment
from flora.runs.resume import recorded_clients_per_block, recorded_threads
from flora.runs.run_directory import RunDirectory
from flora.runs.sinks import Sink
from flora.runs.threads import choose_threads, shared_threads

Result = TypeVar("Result")


@dataclass(frozen=True)
class Listeners:
    """Who is told of a run: of the lines of its log, on its way, of its records, and whether bars show it.

    `processes` are those that do it together, `member` is what it asks for all that is done together with other runs.
    """

    echo: Callable[[str], object] | None
    hooks: Hooks
    sinks: tuple[Sink, ...]
    progress: bool
    processes: Processes
    member: Member | None

    def of_process(self) -> Listeners:
        """Return who is told in this process: all in process 0, the hooks alone in the others."""
        return self if self.processes.is_first else replace(self, echo=None, sinks=(), progress=False)

    def call(self, function: Callable[[], Result]) -> Result:
        """Compute something where the machine's threads are."""
        return function() if self.member is None else self.member.call(function)


def built(
    directory: RunDirectory, config: ExperimentConfig, listeners: Listeners, log: Callable[[str], object]
) -> Experiment:
    """Build the experiment, with as many threads to compute with as it should have.

    Where its clients train together with those of other runs, it shares with these what can be shared.
    """
    member = listeners.member
    build = partial(
        build_experiment,
        config,
        Tell(image_progress(log, shows_bars=listeners.progress), log),
        hooks=listeners.hooks,
        clients_per_block=recorded_clients_per_block(directory.path),
        processes=listeners.processes,
    )
    if member is None:
        has_threads = _set_threads_asked_for(config, directory, listeners.processes)
        experiment = build()
        if not has_threads:
            _set_threads(directory, experiment, log)
        return experiment
    member.once("threads asked for", lambda: _set_threads_asked_for(config, directory, listeners.processes))
    experiment = member.call(lambda: build(shared=member.shared))
    if config.threads is None:
        member.once("threads", lambda: _set_threads(directory, experiment, log))
    engine = member.join(experiment.federation.engine)
    return replace(experiment, federation=replace(experiment.federation, engine=engine))


def _set_threads_asked_for(config: ExperimentConfig, directory: RunDirectory, processes: Processes) -> bool:
    """Set as many threads as the configuration says, or as several processes have each; return whether that is said."""
    asked = config.threads
    if processes.size > 1:
        asked = shared_threads(processes, asked or recorded_threads(directory.path))
    if asked is not None:
        torch.set_num_threads(asked)
    return asked is not None


def _set_threads(directory: RunDirectory, experiment: Experiment, log: Callable[[str], object]) -> None:
    """Set as many threads as the run so far has had, or else as are fastest now."""
    recorded = recorded_threads(directory.path)
    if recorded is not None:
        torch.set_num_threads(min(recorded, torch.get_num_threads()))
    else:
        choose_threads(experiment, log)
