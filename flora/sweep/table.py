"""Tabulate the results of a sweep's runs: a row for each combination, mean and deviation over its seeds."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from flora.core.errors import UserError
from flora.core.files import read_text
from flora.evaluation.summary import duration, percent, size
from flora.sweep.curves import MAX_LINES, Curve

# A run has arrived once its accuracy is at this share of its last one.
ARRIVED = 0.95


@dataclass(frozen=True)
class Point:
    """An evaluated round: the bytes sent up and down by all clients until its end, and the accuracy."""

    round: int
    sent_bytes: int
    accuracy: float


@dataclass(frozen=True)
class Outcome:
    """What one finished run came to. Bytes are sent up and down by all clients, None where there is only one.

    `clients` and `personal` are means over clients of the server's adapter and of their own ones on their own held-out
    examples, `..._worst` those of the worst tenth; `aggregation_error` is the mean over rounds. `memory_bytes` is what
    it held at most, above what its process held before.
    """

    points: tuple[Point, ...]
    zero_shot: float
    last: float
    best: float
    new: float | None
    harmonic: float | None
    clients: float | None
    clients_worst: float | None
    personal: float | None
    personal_worst: float | None
    alone: float | None
    aggregation_error: float | None
    broadcast: float | None
    privacy_gap: float | None
    simulated_seconds: float | None
    seconds_to_arrive: float | None
    bytes_to_arrive: int | None
    rounds_to_arrive: int
    uplink_bytes: float | None
    downlink_bytes: float | None
    step_seconds: float
    train_seconds: float
    round_seconds: float
    memory_bytes: int
    parameters: int

    def first_at(self, accuracy: float) -> Point | None:
        """The first evaluated round that is at least so accurate."""
        return next((point for point in self.points if point.accuracy >= accuracy), None)


@dataclass(frozen=True)
class Ratios:
    """A row against the reference, all of them more than 1 where it is cheaper; the paper's 34.72 x and 2.47 x.

    `rounds` and `bytes` are what it takes until `ARRIVED` of the reference's last accuracy; None if a seed never is so
    accurate, or is from the start.
    """

    step_time: float | None
    memory: float | None
    bytes_per_round: float | None
    rounds: float | None
    bytes: float | None


@dataclass(frozen=True)
class Row:
    """The finished runs that differ in nothing but their seeds."""

    labels: dict[str, str]
    outcomes: tuple[Outcome, ...]
    ratios: Ratios | None = None

    def mean(self, field: str) -> float | None:
        """The mean of a field over the runs; None if one has none."""
        values = [getattr(outcome, field) for outcome in self.outcomes]
        return None if not values or None in values else statistics.fmean(values)

    def deviation(self, field: str) -> float | None:
        """The standard deviation (n - 1) of a field over the runs; None with fewer than two, or if one has none."""
        values = [getattr(outcome, field) for outcome in self.outcomes]
        return None if len(values) < 2 or None in values else statistics.stdev(values)

    def mean_first_at(self, accuracy: float) -> tuple[float | None, float | None]:
        """The mean round, and bytes, at which the runs are first so accurate; None if one never is, or is untrained."""
        points = [outcome.first_at(accuracy) for outcome in self.outcomes]
        found = [point for point in points if point is not None and point.round > 0]
        if len(found) < len(self.outcomes):
            return None, None
        return statistics.fmean(p.round for p in found), statistics.fmean(p.sent_bytes for p in found)


def with_ratios(rows: Sequence[Row], reference: str) -> list[Row]:
    """The rows, each with its ratios to the row that has a label `reference` and otherwise the same labels, if any."""
    found = []
    for row in rows:
        others = [other for other in rows if other.outcomes and _differs_only_by(row, other, reference)]
        found.append(replace(row, ratios=_ratios(row, others[0]) if row.outcomes and others else None))
    return found


def _differs_only_by(row: Row, other: Row, reference: str) -> bool:
    if reference not in other.labels.values() or row.labels.keys() != other.labels.keys():
        return False
    return all(theirs in (reference, row.labels[key]) for key, theirs in other.labels.items())


def _ratios(row: Row, reference: Row) -> Ratios:
    target = ARRIVED * (reference.mean("last") or 0.0)
    rounds, sent = row.mean_first_at(target)
    their_rounds, their_sent = reference.mean_first_at(target)
    return Ratios(
        step_time=_times(reference.mean("step_seconds"), row.mean("step_seconds")),
        memory=_times(reference.mean("memory_bytes"), row.mean("memory_bytes")),
        bytes_per_round=_times(reference.mean("uplink_bytes"), row.mean("uplink_bytes")),
        rounds=_times(their_rounds, rounds),
        bytes=_times(their_sent, sent),
    )


def _times(theirs: float | None, own: float | None) -> float | None:
    return theirs / own if theirs and own else None


def collect(runs: Sequence[tuple[Path | None, str, dict[str, str]]]) -> list[Row]:
    """The rows of `runs`, each a finished run's directory (None: it isn't), a config file and the swept values.

    What is the same in all rows is not a label.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Outcome]] = {}
    for directory, config, values in runs:
        labels = {"experiment": Path(config).stem, **{key: each for key, each in values.items() if key != "seed"}}
        outcomes = groups.setdefault(tuple(labels.items()), [])
        if directory is not None:
            outcomes.append(read_outcome(directory))
    rows = [Row(dict(labels), tuple(outcomes)) for labels, outcomes in groups.items()]
    varying = {key for row in rows for key in row.labels if len({other.labels.get(key) for other in rows}) > 1}
    return [Row({key: each for key, each in row.labels.items() if key in varying}, row.outcomes) for row in rows]


def read_outcome(directory: Path) -> Outcome:
    """The outcome of a finished run. Raises `UserError` if its files are missing or damaged."""
    try:
        summary = json.loads(read_text(directory / "summary.json"))
        lines = read_text(directory / "rounds.jsonl").splitlines()
        return _outcome(summary, [json.loads(line) for line in lines])
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror or error}; remove the run to do it anew") from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"{directory}: summary.json or rounds.jsonl is damaged; remove it to run it anew") from None


def _outcome(summary: dict[str, Any], records: Sequence[dict[str, Any]]) -> Outcome:
    # What one client sends to itself has not travelled.
    travels = summary["num_clients"] > 1
    sent, points = 0, []
    for record in records:
        sent += (record["uplink_bytes"] + record["downlink_bytes"]) * travels
        if record["accuracy"] is not None:
            points.append(Point(record["round"], sent, record["accuracy"]))
    client_rounds = sum(record["num_clients"] for record in records)
    last = summary["last_accuracy"]
    (arrived, *_) = (point for point in points if point.accuracy >= ARRIVED * last)
    return Outcome(
        points=tuple(points),
        zero_shot=summary["zero_shot_accuracy"],
        last=last,
        best=summary["best_accuracy"],
        new=summary.get("new_accuracy"),
        harmonic=summary.get("harmonic_mean"),
        clients=summary["client_accuracy_mean"],
        clients_worst=summary["client_accuracy_worst_decile"],
        personal=summary.get("personal_accuracy_mean"),
        personal_worst=summary.get("personal_accuracy_worst_decile"),
        alone=summary["alone_accuracy_mean"],
        aggregation_error=summary.get("aggregation_error_mean"),
        broadcast=summary.get("broadcast_accuracy"),
        privacy_gap=summary.get("model_privacy_gap"),
        simulated_seconds=summary.get("simulated_seconds"),
        seconds_to_arrive=sum(
            record.get("simulated_seconds") or 0.0 for record in records if record["round"] <= arrived.round
        )
        if summary.get("simulated_seconds") is not None
        else None,
        bytes_to_arrive=arrived.sent_bytes if travels else None,
        rounds_to_arrive=arrived.round,
        uplink_bytes=summary["uplink_bytes_per_client_round"] if travels else None,
        downlink_bytes=summary["total_downlink_bytes"] / client_rounds if travels and client_rounds else None,
        step_seconds=summary["train_seconds"] / max(sum(record["num_steps"] for record in records), 1),
        train_seconds=summary["train_seconds"],
        round_seconds=summary["train_seconds"] / max(summary["rounds"], 1),
        memory_bytes=summary["peak_memory_bytes"] - summary.get("memory_before_bytes", 0),
        parameters=summary["trainable_parameters"],
    )


def _named(key: str, value: str) -> str:
    """A swept value as a reader needs it: a component's name says what it is, a number does not: "rank 4"."""
    speaks = re.fullmatch(r"[A-Za-z][\w-]*", value) and value not in ("true", "false", "null")
    return value if speaks else f"{key.rpartition('.')[2].replace('_', ' ')} {value}"


def _is_of_the_data(key: str) -> bool:
    return key.partition(".")[0] in ("data", "partition", "split")


def _panel(row: Row, is_panel: Callable[[str], bool] = _is_of_the_data) -> tuple[str, str]:
    """Where a row belongs: its data and partition, and all else, which is the method."""
    panel = [_named(key, each) for key, each in row.labels.items() if is_panel(key)]
    method = [_named(key, each) for key, each in row.labels.items() if not is_panel(key)]
    return ", ".join(panel) or "all runs", ", ".join(method) or "all runs"


def _keys_of_panels(rows: Sequence[Row]) -> set[str]:
    """The swept keys that have panels of their own, as few as leave no more than `MAX_LINES` methods in one.

    These are data and partition; then, of what leaves the lines of a panel few enough, what leaves most of them, else
    what has the most values. One key at least is left for the lines.
    """
    values = {key: {row.labels.get(key) for row in rows} for row in rows for key in row.labels}
    panel = {key for key in values if _is_of_the_data(key)}

    def num_lines(panel: set[str]) -> int:
        lines: dict[str, set[str]] = {}
        for row in rows:
            name, line = _panel(row, panel.__contains__)
            lines.setdefault(name, set()).add(line)
        return max(map(len, lines.values()), default=0)

    while num_lines(panel) > MAX_LINES and len(values) - len(panel) > 1:
        left = {key: num_lines(panel | {key}) for key in values if key not in panel}
        fitting = {key: number for key, number in left.items() if number <= MAX_LINES}
        panel.add(max(fitting, key=lambda key: left[key]) if fitting else min(left, key=lambda key: left[key]))
    return panel


def to_curves(rows: Sequence[Row]) -> list[Curve]:
    """The accuracy curves of the rows' runs: a panel for each data set and partition, a line for each method.

    Where that would be too many lines for a panel, other swept keys have panels of their own, too.
    """
    keys = _keys_of_panels(rows)
    return [
        Curve(
            *_panel(row, keys.__contains__),
            rounds=tuple(point.round for point in outcome.points),
            sent_bytes=tuple(point.sent_bytes for point in outcome.points),
            accuracy=tuple(point.accuracy for point in outcome.points),
        )
        for row in rows
        for outcome in row.outcomes
    ]


def to_overview(rows: Sequence[Row]) -> str:
    """The last round's accuracy in Markdown, a line a method and a column for each data set and partition.

    Empty where that would be a single column.
    """
    panels = list(dict.fromkeys(_panel(row)[0] for row in rows))
    if len(panels) < 2:
        return ""
    place = {_panel(row): row for row in rows if row.outcomes}
    methods = dict.fromkeys(_panel(row)[1] for row in rows)
    frozen = [next((row for row in rows if row.outcomes and _panel(row)[0] == panel), None) for panel in panels]
    lines = [["zero-shot", *(_accuracy(row, "zero_shot") if row else "-" for row in frozen)]]
    for method in methods:
        found = [place.get((panel, method)) for panel in panels]
        lines.append([method, *(_accuracy(row, "last") if row else "-" for row in found)])
    return _markdown([["last round", *panels], *lines])


def _accuracy(row: Row, field: str) -> str:
    mean, deviation = row.mean(field), row.deviation(field)
    if mean is None:
        return "-"
    return percent(mean) if deviation is None else f"{percent(mean).removesuffix(' %')} ± {percent(deviation)}"


def _number(row: Row, field: str) -> str:
    mean = row.mean(field)
    return "-" if mean is None else f"{mean:.2g}"


def _duration(row: Row, field: str) -> str:
    mean = row.mean(field)
    return "-" if mean is None else duration(mean)


def _size(row: Row, field: str) -> str:
    mean = row.mean(field)
    return "-" if mean is None else size(mean)


def _ratio(row: Row, field: str) -> str:
    value = None if row.ratios is None else getattr(row.ratios, field)
    return "-" if value is None else f"{value:.3g}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "runs": lambda row: str(len(row.outcomes)),
    "zero-shot": lambda row: _accuracy(row, "zero_shot"),
    "last round": lambda row: _accuracy(row, "last"),
    "best round": lambda row: _accuracy(row, "best"),
    "classes set aside": lambda row: _accuracy(row, "new"),
    "harmonic mean": lambda row: _accuracy(row, "harmonic"),
    "on clients' own data": lambda row: _accuracy(row, "clients"),
    "worst tenth": lambda row: _accuracy(row, "clients_worst"),
    "personal adapters": lambda row: _accuracy(row, "personal"),
    "worst tenth of these": lambda row: _accuracy(row, "personal_worst"),
    "one client alone": lambda row: _accuracy(row, "alone"),
    "last broadcast": lambda row: _accuracy(row, "broadcast"),
    "model privacy gap": lambda row: _accuracy(row, "privacy_gap"),
    "aggregation error": lambda row: _number(row, "aggregation_error"),
    "simulated time": lambda row: _duration(row, "simulated_seconds"),
    f"simulated until {ARRIVED:.0%} of the last": lambda row: _duration(row, "seconds_to_arrive"),
    "trained": lambda row: f"{row.mean('parameters') or 0:,.0f}",
    "up per client and round": lambda row: _size(row, "uplink_bytes"),
    "down": lambda row: _size(row, "downlink_bytes"),
    f"sent until {ARRIVED:.0%} of the last": lambda row: _size(row, "bytes_to_arrive"),
    "rounds until then": lambda row: f"{row.mean('rounds_to_arrive') or 0:.1f}",
    "ms per client step": lambda row: f"{1000 * (row.mean('step_seconds') or 0):.3g}",
    "s per round": lambda row: _number(row, "round_seconds"),
    "training, s": lambda row: f"{row.mean('train_seconds') or 0:.3g}",
    "memory": lambda row: _size(row, "memory_bytes"),
    "x less step time": lambda row: _ratio(row, "step_time"),
    "x less memory": lambda row: _ratio(row, "memory"),
    "x fewer bytes a round": lambda row: _ratio(row, "bytes_per_round"),
    "x fewer rounds": lambda row: _ratio(row, "rounds"),
    "x fewer bytes": lambda row: _ratio(row, "bytes"),
}


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text, its head first. A row without a finished run has dashes; columns without figures are left out.

    The ratios, `x less` and `x fewer`, are to the reference.
    """
    labels = list(dict.fromkeys(key for row in rows for key in row.labels))
    lines = [[*labels, *COLUMNS]]
    for row in rows:
        own = [row.labels.get(key, "-") for key in labels]
        lines.append([*own, *(show(row) if row.outcomes or name == "runs" else "-" for name, show in COLUMNS.items())])
    kept = [any(line[column] != "-" for line in lines[1:]) for column in range(len(lines[0]))]
    return [[cell for cell, keep in zip(line, kept, strict=True) if keep] for line in lines]


def to_markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    return _markdown(cells(rows))


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """The table with plain numbers: mean and standard deviation of every figure of `Outcome`, then `Ratios`."""
    labels = list(dict.fromkeys(key for row in rows for key in row.labels))
    figures = [field.name for field in fields(Outcome) if field.name != "points"]
    ratios = [field.name for field in fields(Ratios)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = [f"{name}{suffix}" for name in figures for suffix in ("", "_std")]
    writer.writerow([*labels, "runs", *head, *(f"{name}_ratio" for name in ratios)])
    for row in rows:
        numbers: list[Any] = [each for name in figures for each in (row.mean(name), row.deviation(name))]
        numbers += asdict(row.ratios).values() if row.ratios else [None] * len(ratios)
        writer.writerow([*(row.labels.get(key, "") for key in labels), len(row.outcomes), *numbers])
    return text.getvalue()


def to_text(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    lines = cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
