"""What a finished run of a sweep came to: the declared figures of its summary, and what they and its rounds imply."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flora.core.errors import UserError
from flora.core.files import read_text
from flora.core.metrics import Figure
from flora.evaluation.metrics import FIGURES

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
    """What one finished run came to: its evaluated rounds, and its figures by name, None where it has none.

    Bytes are sent up and down by all clients, None where there is only one: what it sends to itself has not travelled.
    """

    points: tuple[Point, ...]
    figures: Mapping[str, float | None] = field(hash=False)

    def first_at(self, accuracy: float) -> Point | None:
        """The first evaluated round that is at least so accurate."""
        return next((point for point in self.points if point.accuracy >= accuracy), None)


@dataclass(frozen=True, eq=False)
class _Files:
    """A run's summary and records, and the first round in which it had arrived."""

    summary: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    travels: bool
    arrived: Point


def _seconds_to_arrive(run: _Files) -> float | None:
    if run.summary.get("simulated_seconds") is None:
        return None
    return sum(each.get("simulated_seconds") or 0.0 for each in run.records if each["round"] <= run.arrived.round)


def _downlink_bytes(run: _Files) -> float | None:
    client_rounds = sum(record["num_clients"] or 0 for record in run.records)
    return run.summary["total_downlink_bytes"] / client_rounds if run.travels and client_rounds else None


_UNTIL = f"until {ARRIVED:.0%} of the last"
IMPLIED: dict[str, tuple[Figure, Callable[[_Files], float | None]]] = {
    figure.name: (figure, of)
    for figure, of in (
        (
            Figure("seconds_to_arrive", "simulated seconds", "seconds", None, f"simulated {_UNTIL}"),
            _seconds_to_arrive,
        ),
        (
            Figure("downlink_bytes_per_client_round", "bytes that a client gets in a round", "bytes", None, "down"),
            _downlink_bytes,
        ),
        (
            Figure("bytes_to_arrive", "bytes sent by all until then", "bytes", None, f"sent {_UNTIL}"),
            lambda run: run.arrived.sent_bytes if run.travels else None,
        ),
        (
            Figure("rounds_to_arrive", "rounds until then", "number", None, "rounds until then"),
            lambda run: run.arrived.round,
        ),
        (
            Figure("step_seconds", "seconds of a client's step", "milliseconds", None, "ms per client step"),
            lambda run: run.summary["train_seconds"] / max(sum(each["num_steps"] for each in run.records), 1),
        ),
        (
            Figure("round_seconds", "seconds of training in a round", "number", None, "s per round"),
            lambda run: run.summary["train_seconds"] / max(run.summary["rounds"], 1),
        ),
        (
            Figure("train_seconds", "seconds of training", "number", None, "training, s"),
            lambda run: run.summary["train_seconds"],
        ),
        (
            Figure("memory_bytes", "most memory, above what the process held before", "bytes", None, "memory"),
            lambda run: run.summary["peak_memory_bytes"] - run.summary.get("memory_before_bytes", 0),
        ),
    )
}


def columns() -> dict[str, Figure]:
    """The figures that a sweep's table shows, by name: those declared with a column, then what runs imply."""
    declared = {name: figure for name, figure in FIGURES.items() if figure.column is not None}
    return declared | {name: figure for name, (figure, _) in IMPLIED.items()}


def frozen(name: str) -> str | None:
    """The figure that says of the frozen model what the figure `name` says of an adapter; None if there is none."""
    known = f"zero_shot_{name.removeprefix('last_')}"
    return known if known in FIGURES else None


def read_outcome(directory: Path) -> Outcome:
    """The outcome of a finished run. Raises `UserError` if its files are missing or damaged."""
    try:
        summary = json.loads(read_text(directory / "summary.json"))
        lines = read_text(directory / "rounds.jsonl").splitlines()
        return _outcome(summary, [json.loads(line) for line in lines])
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror or error}; remove the run to do it anew") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise UserError(f"{directory}: summary.json or rounds.jsonl is damaged; remove it to run it anew") from None


def _outcome(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Outcome:
    travels = summary["num_clients"] > 1
    sent, points = 0, []
    for record in records:
        sent += (record["uplink_bytes"] + record["downlink_bytes"]) * travels
        if record["accuracy"] is not None:
            points.append(Point(record["round"], sent, record["accuracy"]))
    (arrived, *_) = (point for point in points if point.accuracy >= ARRIVED * summary["last_accuracy"])
    run = _Files(summary, records, travels, arrived)
    figures = {name: summary.get(name) for name in columns() if name not in IMPLIED}
    figures |= {of: summary.get(of) for name in tuple(figures) if (of := frozen(name)) is not None}
    if not travels:
        figures["uplink_bytes_per_client_round"] = None
    return Outcome(tuple(points), figures | {name: of(run) for name, (_, of) in IMPLIED.items()})
