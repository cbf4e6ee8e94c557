"""Tabulate the results of a sweep's runs: a row for each combination, mean and deviation over its seeds."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from flora.core.metrics import Figure
from flora.evaluation.summary import percent, shown
from flora.report.curves import MAX_LINES, Curve
from flora.sweep.outcomes import ARRIVED, Outcome, columns, read_outcome


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
    """The finished runs that differ in nothing but their seeds, which are `seeds`, as the command line has them."""

    labels: dict[str, str]
    outcomes: tuple[Outcome, ...]
    ratios: Ratios | None = None
    seeds: tuple[str, ...] = ()

    def mean(self, field: str) -> float | None:
        """The mean of a figure over the runs; None if one has none."""
        values = self._values(field)
        return statistics.fmean(values) if values else None

    def deviation(self, field: str) -> float | None:
        """The standard deviation (n - 1) of a figure over the runs; None with fewer than two, or if one has none."""
        values = self._values(field)
        return statistics.stdev(values) if len(values) > 1 else None

    def _values(self, field: str) -> list[float]:
        """A figure of all runs; empty if one has none."""
        values = [outcome.figures.get(field) for outcome in self.outcomes]
        known = [value for value in values if value is not None]
        return known if len(known) == len(values) else []

    def mean_first_at(self, accuracy: float) -> tuple[float | None, float | None]:
        """The mean round, and bytes, at which the runs are first so accurate; None if one never is, or is untrained."""
        points = [outcome.first_at(accuracy) for outcome in self.outcomes]
        reached = [point for point in points if point is not None and point.round > 0]
        if len(reached) < len(self.outcomes):
            return None, None
        return statistics.fmean(p.round for p in reached), statistics.fmean(p.sent_bytes for p in reached)


def with_ratios(rows: Sequence[Row], reference: str) -> list[Row]:
    """The rows, each with its ratios to the row that has a label `reference` and otherwise the same labels, if any."""
    compared = []
    for row in rows:
        others = [other for other in rows if other.outcomes and _differs_only_by(row, other, reference)]
        compared.append(replace(row, ratios=_ratios(row, others[0]) if row.outcomes and others else None))
    return compared


def _differs_only_by(row: Row, other: Row, reference: str) -> bool:
    if reference not in other.labels.values() or row.labels.keys() != other.labels.keys():
        return False
    return all(theirs in (reference, row.labels[key]) for key, theirs in other.labels.items())


def _ratios(row: Row, reference: Row) -> Ratios:
    target = ARRIVED * (reference.mean("last_accuracy") or 0.0)
    rounds, sent = row.mean_first_at(target)
    their_rounds, their_sent = reference.mean_first_at(target)
    return Ratios(
        step_time=_times(reference.mean("step_seconds"), row.mean("step_seconds")),
        memory=_times(reference.mean("memory_bytes"), row.mean("memory_bytes")),
        bytes_per_round=_times(
            reference.mean("uplink_bytes_per_client_round"), row.mean("uplink_bytes_per_client_round")
        ),
        rounds=_times(their_rounds, rounds),
        bytes=_times(their_sent, sent),
    )


def _times(theirs: float | None, own: float | None) -> float | None:
    return theirs / own if theirs and own else None


def collect(runs: Sequence[tuple[Path | None, str, dict[str, str]]]) -> list[Row]:
    """The rows of `runs`, each a finished run's directory (None: it isn't), a config file and the swept values.

    What is the same in all rows is not a label.
    """
    groups: dict[tuple[tuple[str, str], ...], dict[str, Outcome]] = {}
    for directory, config, values in runs:
        labels = {"experiment": Path(config).stem, **{key: each for key, each in values.items() if key != "seed"}}
        outcomes = groups.setdefault(tuple(labels.items()), {})
        if directory is not None:
            outcomes[values.get("seed", "")] = read_outcome(directory)
    rows = [Row(dict(labels), tuple(of.values()), seeds=tuple(of)) for labels, of in groups.items()]
    varying = {key for row in rows for key in row.labels if len({other.labels.get(key) for other in rows}) > 1}
    return [replace(row, labels={key: each for key, each in row.labels.items() if key in varying}) for row in rows]


def _named(key: str, value: str) -> str:
    """A swept value as a reader needs it: a component's name says what it is, a number does not: "rank 4"."""
    speaks = re.fullmatch(r"[A-Za-z][\w-]*", value) and value not in ("true", "false", "null")
    return value if speaks else f"{key.rpartition('.')[2].replace('_', ' ')} {value}"


def _is_of_the_data(key: str) -> bool:
    return key.partition(".")[0] in ("data", "partition", "split")


def panel_and_method(row: Row, is_panel: Callable[[str], bool] = _is_of_the_data) -> tuple[str, str]:
    """Where a row belongs: its data and partition, and all else, which is the method."""
    panel = [_named(key, each) for key, each in row.labels.items() if is_panel(key)]
    method = [_named(key, each) for key, each in row.labels.items() if not is_panel(key)]
    return ", ".join(panel) or "all runs", ", ".join(method) or "all runs"


def keys_of_panels(rows: Sequence[Row]) -> set[str]:
    """The swept keys that have panels of their own, as few as leave no more than `MAX_LINES` methods in one.

    These are data and partition; then, of what leaves the lines of a panel few enough, what leaves most of them, else
    what has the most values. One key at least is left for the lines.
    """
    values = {key: {row.labels.get(key) for row in rows} for row in rows for key in row.labels}
    panel = {key for key in values if _is_of_the_data(key)}

    def num_lines(panel: set[str]) -> int:
        lines: dict[str, set[str]] = {}
        for row in rows:
            name, line = panel_and_method(row, panel.__contains__)
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
    keys = keys_of_panels(rows)
    return [
        Curve(
            *panel_and_method(row, keys.__contains__),
            rounds=tuple(point.round for point in outcome.points),
            sent_bytes=tuple(point.sent_bytes for point in outcome.points),
            accuracy=tuple(point.accuracy for point in outcome.points),
        )
        for row in rows
        for outcome in row.outcomes
        if outcome.points
    ]


def accuracy_cell(row: Row, field: str) -> str:
    mean, deviation = row.mean(field), row.deviation(field)
    if mean is None:
        return "-"
    return percent(mean) if deviation is None else f"{percent(mean).removesuffix(' %')} ± {percent(deviation)}"


def _ratio(row: Row, field: str) -> str:
    value = None if row.ratios is None else getattr(row.ratios, field)
    return "-" if value is None else f"{value:.3g}"


def figure_cell(row: Row, figure: Figure) -> str:
    """A figure's mean over a row's runs, with its deviation where it is a share; a dash where one has none."""
    mean = row.mean(figure.name)
    if mean is None:
        return "-"
    if figure.unit in ("fraction", "points"):
        return accuracy_cell(row, figure.name)
    if figure.unit == "milliseconds":
        return f"{1000 * mean:.3g}"
    return f"{mean:.2g}" if figure.unit == "number" and mean < 100 else shown(figure.unit, mean)


RATIOS = {
    "x less step time": "step_time",
    "x less memory": "memory",
    "x fewer bytes a round": "bytes_per_round",
    "x fewer rounds": "rounds",
    "x fewer bytes": "bytes",
}


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text, its head first. A row without a finished run has dashes; columns without figures are left out.

    The ratios, `x less` and `x fewer`, are to the reference.
    """
    labels = list(dict.fromkeys(key for row in rows for key in row.labels))
    figures = list(columns().values())
    lines = [[*labels, "runs", *(figure.column or figure.name for figure in figures), *RATIOS]]
    for row in rows:
        own = [row.labels.get(key, "-") for key in labels]
        shown_ratios = [_ratio(row, field) for field in RATIOS.values()]
        lines.append([*own, str(len(row.outcomes)), *(figure_cell(row, figure) for figure in figures), *shown_ratios])
    kept = [any(line[column] != "-" for line in lines[1:]) for column in range(len(lines[0]))]
    return [[cell for cell, keep in zip(line, kept, strict=True) if keep] for line in lines]


def to_markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    return markdown(cells(rows))


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """The table with plain numbers: mean and standard deviation of every figure, then `Ratios`."""
    labels = list(dict.fromkeys(key for row in rows for key in row.labels))
    figures = list(columns())
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


def to_text(rows: Sequence[Row], width: int | None = None) -> str:
    """The table for a terminal of `width` characters, with the columns that fit and how many don't; None: with all."""
    return aligned(cells(rows), width)


def aligned(lines: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Lines of cells for a terminal, as `to_text` has them."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    while width is not None and len(widths) > 1 and sum(widths) + 2 * (len(widths) - 1) > width:
        widths.pop()
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    num_left = len(lines[0]) - len(widths)
    return "\n".join([*text, *([f"({num_left} more columns are in table.md)"] if num_left else [])])
