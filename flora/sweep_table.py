"""What the runs of a sweep came to, in one table: a row for each combination, over its seeds."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora.report import percent, size

# A run has arrived once its accuracy is at this share of its last one.
ARRIVED = 0.95


@dataclass(frozen=True)
class Outcome:
    """What one finished run came to. Bytes are sent up and down by all clients."""

    zero_shot: float
    last: float
    best: float
    alone: float | None
    bytes_to_arrive: int
    rounds_to_arrive: int
    uplink_bytes: float
    step_seconds: float
    train_seconds: float
    peak_bytes: int
    parameters: int


@dataclass(frozen=True)
class Row:
    """The finished runs that differ in nothing but their seeds."""

    labels: dict[str, str]
    outcomes: tuple[Outcome, ...]

    def mean(self, field: str) -> float | None:
        """The mean of a field over the runs; None if one has none."""
        values = [getattr(outcome, field) for outcome in self.outcomes]
        return None if not values or None in values else statistics.fmean(values)

    def deviation(self, field: str) -> float | None:
        """The standard deviation (n - 1) of a field over the runs; None with fewer than two, or if one has none."""
        values = [getattr(outcome, field) for outcome in self.outcomes]
        return None if len(values) < 2 or None in values else statistics.stdev(values)


def collect(runs: Sequence[tuple[Path, str, dict[str, str]]]) -> list[Row]:
    """The rows of `runs`, each a directory, a config file and the swept values; runs without a summary are left out.

    What is the same in all rows is not a label.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Outcome]] = {}
    for directory, config, values in runs:
        labels = {"experiment": Path(config).stem, **{key: each for key, each in values.items() if key != "seed"}}
        outcomes = groups.setdefault(tuple(labels.items()), [])
        if (directory / "summary.json").is_file():
            outcomes.append(read_outcome(directory))
    rows = [Row(dict(labels), tuple(outcomes)) for labels, outcomes in groups.items()]
    varying = {key for row in rows for key in row.labels if len({other.labels.get(key) for other in rows}) > 1}
    return [Row({key: each for key, each in row.labels.items() if key in varying}, row.outcomes) for row in rows]


def read_outcome(directory: Path) -> Outcome:
    """The outcome of a finished run."""
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (directory / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    sent, arrived = 0, records[-1]
    for record in records:
        sent += record["uplink_bytes"] + record["downlink_bytes"]
        if record["accuracy"] is not None and record["accuracy"] >= ARRIVED * summary["last_accuracy"]:
            arrived = record
            break
    num_steps = sum(record["num_steps"] for record in records)
    return Outcome(
        zero_shot=summary["zero_shot_accuracy"],
        last=summary["last_accuracy"],
        best=summary["best_accuracy"],
        alone=summary["alone_accuracy_mean"],
        bytes_to_arrive=sent,
        rounds_to_arrive=arrived["round"],
        uplink_bytes=summary["uplink_bytes_per_client_round"],
        step_seconds=summary["train_seconds"] / max(num_steps, 1),
        train_seconds=summary["train_seconds"],
        peak_bytes=summary["peak_memory_bytes"],
        parameters=summary["trainable_parameters"],
    )


def _accuracy(row: Row, field: str) -> str:
    mean, deviation = row.mean(field), row.deviation(field)
    return percent(mean) if deviation is None else f"{percent(mean).removesuffix(' %')} ± {percent(deviation)}"


def _size(row: Row, field: str) -> str:
    mean = row.mean(field)
    return "-" if mean is None else size(mean)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "runs": lambda row: str(len(row.outcomes)),
    "zero-shot": lambda row: _accuracy(row, "zero_shot"),
    "last round": lambda row: _accuracy(row, "last"),
    "best round": lambda row: _accuracy(row, "best"),
    "one client alone": lambda row: _accuracy(row, "alone") if row.mean("alone") is not None else "-",
    "trained": lambda row: f"{row.mean('parameters') or 0:,.0f}",
    "up per client and round": lambda row: _size(row, "uplink_bytes"),
    f"sent until {ARRIVED:.0%} of the last": lambda row: _size(row, "bytes_to_arrive"),
    "rounds until then": lambda row: f"{row.mean('rounds_to_arrive') or 0:.1f}",
    "ms per client step": lambda row: f"{1000 * (row.mean('step_seconds') or 0):.3g}",
    "training, s": lambda row: f"{row.mean('train_seconds') or 0:.3g}",
    "peak memory": lambda row: _size(row, "peak_bytes"),
}


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text, its head first; a row without a finished run has dashes."""
    labels = list(dict.fromkeys(key for row in rows for key in row.labels))
    lines = [[*labels, *COLUMNS]]
    for row in rows:
        own = [row.labels.get(key, "-") for key in labels]
        lines.append([*own, *(show(row) if row.outcomes or name == "runs" else "-" for name, show in COLUMNS.items())])
    return lines


def to_markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    head, *body = ([cell.replace("|", "\\|") for cell in line] for line in cells(rows))
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """The table with plain numbers: mean and standard deviation of every field of `Outcome`."""
    labels = list(dict.fromkeys(key for row in rows for key in row.labels))
    fields = list(Outcome.__dataclass_fields__)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*labels, "runs", *(f"{field}{suffix}" for field in fields for suffix in ("", "_std"))])
    for row in rows:
        numbers: list[Any] = [each for field in fields for each in (row.mean(field), row.deviation(field))]
        writer.writerow([*(row.labels.get(key, "") for key in labels), len(row.outcomes), *numbers])
    return text.getvalue()


def to_text(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    lines = cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
