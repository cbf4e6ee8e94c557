"""Save checkpoints of a run when they are due."""

from __future__ import annotations

import time

from flora.config.parse import config_to_dict
from flora.core.states import ServerState
from flora.experiment.build import Experiment
from flora.runs.checkpoints import Checkpoint, CheckpointFolder
from flora.runs.resume import Start
from flora.runs.run_directory import RunDirectory


class Saver:
    """Saves checkpoints of a run that begins at `start`, and at `started` on the clock of `time.perf_counter`."""

    def __init__(self, experiment: Experiment, directory: RunDirectory, start: Start, started: float) -> None:
        self._engine, self._directory = experiment.federation.engine, directory
        self._options, self._config = experiment.config.checkpoints, config_to_dict(experiment.config)
        self._folder = CheckpointFolder(directory.path / "checkpoints", self._engine.hooks.before_write)
        self._saved, self._last_round = start.state.round, experiment.last_round
        self._wall_offset = start.wall_seconds - started

    @property
    def wall_seconds(self) -> float:
        """How long the run has taken so far, what came before it was resumed included."""
        return time.perf_counter() + self._wall_offset

    def after_round(self, state: ServerState) -> None:
        """Save a checkpoint if one is due."""
        every, last = self._options.every, self._last_round
        if state.round == last or (every is not None and state.round % every == 0):
            self.save(state)

    def save(self, state: ServerState) -> None:
        """Save a checkpoint, unless that round's was the last one to be saved or gone on from; process 0 does it."""
        if state.round == self._saved or not self._engine.processes.is_first:
            return
        num_bytes, sha256 = self._directory.records_end
        checkpoint = Checkpoint(
            state, self._config, num_bytes, sha256, self.wall_seconds, self._engine.clients_per_block
        )
        self._folder.save(checkpoint, keep=self._options.keep)
        self._saved = state.round
