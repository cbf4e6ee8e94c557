"""What a run directory says, as typed data, for the pages that show it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flora.config.parse import parse_config
from flora.config.plain_yaml import read_yaml
from flora.config.schema import ExperimentConfig
from flora.core.errors import ConfigError, UserError
from flora.core.files import read_text
from flora.core.records import RoundRecord
from flora.core.registry import OptionError
from flora.runs.resume import TRACES
from flora.runs.run_directory import read_json


class Absent(Exception):
    """What a part of a page needs is not in the run; says why, as a sentence."""


@dataclass(frozen=True, eq=False)
class RunFiles:
    """A run directory: its settings, its records, and its summary, which a run on its way has none of.

    `was_interrupted`: it is not on its way any more, though it has none. `settings` are those of `config.yaml` as they
    are written; `config` is None if this program can't read them (a component of the user's own that was not imported,
    or an old run).
    """

    path: Path
    settings: Mapping[str, Any]
    config: ExperimentConfig | None
    records: tuple[RoundRecord, ...]
    summary: Mapping[str, Any] | None
    was_interrupted: bool = False

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.path.resolve().name

    def figure(self, name: str) -> Any:
        """Return a figure of the summary; None where there is none."""
        return None if self.summary is None else self.summary.get(name)

    def setting(self, key: str) -> Any:
        """Return the value of a dotted key of the settings; None where there is none."""
        value: Any = self.settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def points(self, metric: str) -> list[tuple[int, float]]:
        """Return the rounds that have a number for a metric, and that number."""
        values = [(record.round, record.metrics.get(metric)) for record in self.records]
        return [(round, float(value)) for round, value in values if isinstance(value, int | float)]

    def json(self, name: str) -> Mapping[str, Any]:
        """Return the mapping in one of its JSON files. Raises `Absent`."""
        content = read_json(self.path / name)
        if not isinstance(content, dict):
            raise Absent(f"{name} is not in the run directory, or is damaged.")
        return content

    def text(self, name: str) -> str:
        """Return the content of one of its files. Raises `Absent`."""
        try:
            return read_text(self.path / name)
        except (OSError, UnicodeDecodeError):
            raise Absent(f"{name} is not in the run directory, or is damaged.") from None

    def table(self, name: str) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Return the header and the rows of one of its CSV files. Raises `Absent`."""
        try:
            header, *rows = csv.reader(io.StringIO(self.text(name), newline=""))
        except (csv.Error, ValueError):
            raise Absent(f"{name} is damaged.") from None
        if any(len(row) != len(header) for row in rows):
            raise Absent(f"{name} is damaged.")
        return header, rows

    def columns(self, name: str) -> dict[str, list[str]]:
        """Return one of its CSV files by column. Raises `Absent`."""
        header, rows = self.table(name)
        return {title: [row[place] for row in rows] for place, title in enumerate(header)}


def numbers(texts: Iterable[str]) -> np.ndarray:
    """Return the cells of a column as numbers `(N,)`, NaN for empty ones. Raises `ValueError`."""
    return np.array([float(text) if text else np.nan for text in texts], float)


def confusion_of(run: RunFiles) -> tuple[list[str], np.ndarray]:
    """Return the classes and the counts `(C, C)`, labels by predictions. Raises `Absent`."""
    (_, *names), rows = run.table("confusion.csv")
    counts = np.array([[float(cell) for cell in row[1:]] for row in rows]).reshape(len(rows), len(names))
    if len(rows) != len(names):
        raise Absent("confusion.csv is damaged.")
    return names, counts


def evaluations_of(run: RunFiles) -> dict[str, Mapping[str, Any] | None]:
    """Return the records that `flora evaluate` wrote beside a run, by name; None for one that is damaged."""
    contents = {path.stem: read_json(path) for path in sorted((run.path / "evaluations").glob("*.json"))}
    return {name: content if isinstance(content, dict) else None for name, content in contents.items()}


@dataclass(frozen=True, eq=False)
class PartitionCounts:
    """How many training images of each of C classes each of N clients has, `(C, N)`, and their names."""

    classes: list[str]
    clients: list[str]
    counts: np.ndarray


def partition_of(run: RunFiles) -> PartitionCounts:
    """Return how many training images of each class each client has.

    Raises `Absent`, also where a run doesn't publish what differential privacy does not cover.
    """
    if run.setting("privacy.publish") is False:
        raise Absent("Left out: no noise covers what single clients have (privacy.publish: false).")
    content = run.json("partition.json")
    try:
        classes = [str(name) for name in content["class_names"]]
        clients = content["clients"]
        names = [str(each.get("name", place)) for place, each in enumerate(clients)]
        counts = [[int(each["class_counts"].get(name, 0)) for each in clients] for name in classes]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Absent("partition.json is damaged.") from None
    return PartitionCounts(classes, names, np.array(counts, float).reshape(len(classes), len(names)))


def read_files(path: Path, *, is_live: bool = False) -> RunFiles:
    """Read a finished run's directory, or that of one on its way.

    Raises `UserError` if there is none, if it has no rounds, or if it is not finished and not `is_live`.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no such run directory")
    if not is_run(path):
        raise UserError(f"{path}: not a run directory: it has no config.yaml with one of {', '.join(TRACES)}")
    summary = None if is_live else read_json(path / "summary.json")
    if not isinstance(summary, dict) and not is_live:
        raise UserError(
            f"{path}: this run is not finished, so it has no summary.json; python -m flora.simulate --resume goes on "
            "with it"
        )
    settings = read_yaml(path / "config.yaml")
    return RunFiles(path, settings, _config(settings), _records(path), summary if isinstance(summary, dict) else None)


def is_run(path: Path) -> bool:
    """Whether a folder looks like a run's."""
    return (path / "config.yaml").is_file() and any((path / name).exists() for name in TRACES)


def runs_below(path: Path) -> list[Path]:
    """Return the runs that lie in a folder, by name; none if it is no folder."""
    return sorted(each for each in path.iterdir() if each.is_dir() and is_run(each)) if path.is_dir() else []


def _config(settings: Mapping[str, Any]) -> ExperimentConfig | None:
    try:
        return parse_config(settings, is_complete=True)
    except (OptionError, ConfigError):
        return None


def _records(path: Path) -> tuple[RoundRecord, ...]:
    """The records in their order. Raises `UserError` if there are none or one can't be read."""
    file = path / "rounds.jsonl"
    try:
        records = [RoundRecord.from_dict(json.loads(line)) for line in read_text(file).splitlines()]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file}: damaged") from None
    if not records:
        raise UserError(f"{path}: this run has no rounds yet")
    return tuple(records)
