"""Sinks: objects that a run tells of its start, of each record, and of its end. The run directory is the first one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flora.config.schema import ExperimentConfig
from flora.core.progress import TimeLeft, bar, duration, has_line, round_line
from flora.core.records import RoundRecord, Summary
from flora.core.states import ServerState
from flora.experiment.build import Experiment
from flora.runs.inventory import (
    EXAMPLE_COLUMNS,
    environment_as_used,
    examples_as_used,
    partition_as_used,
    prompts_as_used,
)
from flora.runs.run_directory import RunDirectory
from flora.runs.tables import Table, with_images

# The bar of the rounds: the time left is that of the whole run, not of the rounds alone.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


@dataclass(frozen=True, eq=False)
class Finished:
    """What a finished run came to: its summary, the server's last state, the columns of `clients.csv`, other tables.

    `tables` are those of the last round, by file name.
    """

    summary: Summary
    state: ServerState
    clients: Mapping[str, Sequence[Any]]
    tables: Mapping[str, Table] = field(default_factory=dict)


class Sink:
    """Is told of a run. Override what you need; an error that you raise ends the run, and nothing of it is lost."""

    def opened(self, path: Path) -> None:
        """The run directory is at `path`; the experiment is about to be built."""

    def start(self, experiment: Experiment) -> None:
        """The experiment is built; no round has run yet. Where a run goes on, neither has any since it stopped."""

    def record(self, record: RoundRecord) -> None:
        """A round is measured; round 0 is the frozen model."""

    def finish(self, finished: Finished) -> None:
        """All rounds are done."""

    def close(self) -> None:
        """The run has ended, however it did."""


class DirectorySink(Sink):
    """Writes the run directory's files."""

    def __init__(self, directory: RunDirectory, config: ExperimentConfig) -> None:
        self._directory, self._config = directory, config

    def start(self, experiment: Experiment) -> None:
        self._directory.write_start(environment_as_used(experiment), partition_as_used(experiment))
        self._directory.write_prompts(prompts_as_used(experiment))
        self._directory.write_examples(EXAMPLE_COLUMNS, examples_as_used(experiment))

    def record(self, record: RoundRecord) -> None:
        self._directory.append_round(record)

    def finish(self, finished: Finished) -> None:
        self._directory.write_clients(finished.clients)
        for name, table in finished.tables.items():
            whole = with_images(table, self._directory.path / "examples.csv") if table.lists_images else table
            self._directory.write_table(name, whole.columns, whole.rows)
        self._directory.write_adapter(finished.state.adapter, self._config)
        self._directory.write_summary(finished.summary)


def time_left(config: ExperimentConfig) -> TimeLeft:
    """What estimates how long a run will still take, clients that train alone included."""
    return TimeLeft(config.rounds, config.evaluation.num_local_only)


class RoundLines(Sink):
    """Writes a line for each round, or for about fifty of many, to a log, and to `echo` if there is one."""

    def __init__(
        self, config: ExperimentConfig, log: Callable[[str], object], echo: Callable[[str], object] | None
    ) -> None:
        self._num_rounds, self._log, self._echo = config.rounds, log, echo
        self._time_left = time_left(config)

    def record(self, record: RoundRecord) -> None:
        seconds_left = self._time_left.after(record)
        if not has_line(record.round, self._num_rounds):
            return
        line = round_line(record, self._num_rounds, seconds_left)
        self._log(line)
        if self._echo is not None:
            self._echo(line)


class RoundBar(Sink):
    """A bar of the rounds on a terminal, with the time left, the last accuracy, the training loss and the speed."""

    def __init__(self, config: ExperimentConfig) -> None:
        self._num_rounds, self._accuracy = config.rounds, "-"
        self._time_left = time_left(config)
        self._bar: Any = None

    def record(self, record: RoundRecord) -> None:
        if self._bar is None:
            self._bar = bar("rounds", self._num_rounds, "round", initial=max(record.round - 1, 0), bar_format=BAR)
        if record.accuracy is not None:
            self._accuracy = f"{record.accuracy:.1%}"
        if record.round == 0:
            return
        seconds_left = self._time_left.after(record)
        self._bar.update()
        self._bar.set_postfix(
            {
                "left": "0 s" if seconds_left is None else duration(seconds_left),
                "accuracy": self._accuracy,
                "loss": f"{record.train_loss:.3f}" if record.train_loss is not None else "-",
                "clients/s": f"{(record.num_clients or 0) / max(record.train_seconds, 1e-9):.3g}",
            }
        )
        if record.round >= self._num_rounds:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
