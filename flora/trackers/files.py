"""Trackers that are files: a CSV table, and TensorBoard's event files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from flora.core.errors import UserError
from flora.core.files import free_name, read_text, write_whole
from flora.core.registry import option, register
from flora.trackers.base import Figures, Following, TrackedRun, Tracker, present


@register("csv")
@dataclass(frozen=True)
class CsvTracker(Tracker):
    """A CSV table with a row for each round and a column for each figure."""

    path: str = option("the file; empty: metrics.csv in the run directory", "")

    def follow(self, run: TrackedRun) -> Following:
        path = Path(os.path.expanduser(self.path)) if self.path else run.directory / "metrics.csv"
        if not path.parent.is_dir():
            raise UserError(f"trackers: csv: path: there is no folder {path.parent}")
        if self.path and run.id is None and path.exists():
            raise UserError(f"trackers: csv: path: {path} exists already; name another file or remove it")
        return _CsvFollowing(path)


class _CsvFollowing(Following):
    """Holds all rows, and writes the file whole: a figure that comes later gets a column of its own."""

    def __init__(self, path: Path) -> None:
        self.id, self._path = str(path), path
        self._rows: dict[int, dict[str, Any]] = {}
        if path.exists():
            for row in csv.DictReader(io.StringIO(read_text(path), newline="")):
                self._rows[int(row["round"])] = dict(row)
        self.last_round = max(self._rows, default=-1)

    def round(self, number: int, figures: Figures) -> None:
        self._rows[number] = {"round": number, **figures}
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows.values())
        write_whole(self._path, text.getvalue().encode())
        self.last_round = number


@register("tensorboard")
@dataclass(frozen=True)
class TensorBoard(Tracker):
    """TensorBoard's event files: `tensorboard --logdir FOLDER` shows them."""

    module: ClassVar[str | None] = "tensorboard"

    folder: str = option("folder that each run gets a folder of its name in; empty: tensorboard in its directory", "")

    def follow(self, run: TrackedRun) -> Following:
        if not self.folder:
            path = run.directory / "tensorboard"
        elif run.id is not None:
            path = Path(run.id)
        else:
            path = free_name(Path(os.path.expanduser(self.folder)), run.name)
        return _TensorBoardFollowing(path, run)


class _TensorBoardFollowing(Following):
    """A writer of events; those behind `last_round` that a killed process has left, readers are told to drop."""

    def __init__(self, path: Path, run: TrackedRun) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.id, self.last_round = str(path.resolve()), run.last_round
        self._writer: Any = SummaryWriter(str(path), purge_step=None if run.id is None else run.last_round + 1)
        if run.id is None:
            rows = "\n".join(f"| {key} | {value} |" for key, value in run.settings.items())
            self._writer.add_text("settings", f"| key | value |\n|---|---|\n{rows}", 0)

    def round(self, number: int, figures: Figures) -> None:
        for name, value in present(figures).items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()
        self.last_round = number

    def finish(self, figures: Mapping[str, Any]) -> None:
        rows = "\n".join(f"| {key} | {value} |" for key, value in figures.items())
        self._writer.add_text("summary", f"| figure | value |\n|---|---|\n{rows}", max(self.last_round, 0))

    def close(self, *, is_finished: bool) -> None:
        self._writer.close()
