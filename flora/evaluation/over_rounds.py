"""Figures of a run's summary that are made of the records of all its rounds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from flora.core.metrics import values_of
from flora.core.records import RoundRecord


def best(records: Sequence[RoundRecord]) -> tuple[float, int]:
    """The best accuracy and the first round that reached it; it is chosen on the test set."""
    accuracy, negative_round = max((each.accuracy, -each.round) for each in records if each.accuracy is not None)
    return accuracy, -negative_round


def _clock(records: Sequence[RoundRecord]) -> list[float]:
    """The simulated seconds from the start to the end of each round."""
    return list(itertools.accumulate(record.simulated_seconds or 0.0 for record in records))


def simulated_seconds(records: Sequence[RoundRecord]) -> float | None:
    """How long all rounds took on the simulated network's clock; None without a network."""
    return None if records[-1].simulated_seconds is None else _clock(records)[-1]


def seconds_to_accuracy(records: Sequence[RoundRecord]) -> dict[str, float] | None:
    """When each tenth of accuracy was first reached, above that of the frozen model."""
    if records[-1].simulated_seconds is None:
        return None
    reached: dict[str, float] = {}
    for tenth in range(1, 11):
        times = [
            seconds
            for record, seconds in zip(records, _clock(records), strict=True)
            if record.accuracy is not None and record.accuracy >= tenth / 10
        ]
        if times and times[0] > 0:
            reached[f"{tenth / 10:.1f}"] = times[0]
    return reached


def rounds_to_accuracy(records: Sequence[RoundRecord]) -> dict[str, int]:
    """The first evaluated round that reached each tenth of accuracy, above that of the frozen model."""
    reached: dict[str, int] = {}
    for tenth in range(1, 11):
        rounds = [record.round for record in records if record.accuracy is not None and record.accuracy >= tenth / 10]
        if rounds and rounds[0]:
            reached[f"{tenth / 10:.1f}"] = rounds[0]
    return reached


def uplink_bytes_per_client_round(records: Sequence[RoundRecord]) -> float | None:
    """The bytes that a client sends in a round, in the mean; those of late clients count. None if no record says."""
    if records[-1].uplink_bytes is None:
        return None
    client_rounds = sum((record.num_clients or 0) + (record.num_late or 0) for record in records)
    return sum(values_of(records, "uplink_bytes")) / client_rounds if client_rounds else 0.0
