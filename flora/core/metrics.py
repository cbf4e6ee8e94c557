"""How a metric is declared: once, and records, the summary, the final table, sweeps and the docs follow from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flora.core.records import RoundRecord

UNITS = ("fraction", "points", "number", "count", "bytes", "seconds", "by name")
OF = ("server", "clients", "training", "traffic", "cost", "privacy")


@dataclass(frozen=True)
class Figure:
    """What a run's summary says, as `name` in `summary.json`.

    `of_records` makes it of the records of all rounds, in order; None: the run itself says it. `column` is its title in
    a sweep's table, `row` in the table that a run ends with; None: it is not shown there.
    """

    name: str
    about: str
    unit: str = "number"
    of_records: Callable[[Sequence[RoundRecord]], Any] | None = None
    column: str | None = None
    row: str | None = None


@dataclass(frozen=True)
class Metric:
    """What a round's record says, as `name` in `rounds.jsonl`: null where a round has no such figure, or `default`.

    `of` says what it tells of: the server's adapter, the clients', training, traffic, or what it costs. `is_covered` is
    false for what is computed from single clients' data or updates, so that the noise of `privacy` does not cover it.
    """

    name: str
    about: str
    unit: str
    of: str
    figures: tuple[Figure, ...] = ()
    default: Any = None
    is_covered: bool = True

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"metric {self.name!r}: expected a unit of {', '.join(UNITS)}, got {self.unit!r}")
        if self.of not in OF:
            raise ValueError(f"metric {self.name!r}: expected it to be of {', '.join(OF)}, got {self.of!r}")


def values_of(records: Sequence[RoundRecord], name: str) -> list[Any]:
    """A metric's values over the rounds that have one."""
    values = (record.metrics.get(name) for record in records)
    return [value for value in values if value is not None]


def last(name: str) -> Callable[[Sequence[RoundRecord]], Any]:
    """A metric of the last round."""
    return lambda records: records[-1].metrics.get(name)


def first(name: str) -> Callable[[Sequence[RoundRecord]], Any]:
    """A metric of round 0, the frozen model's."""
    return lambda records: records[0].metrics.get(name)


def total(name: str) -> Callable[[Sequence[RoundRecord]], Any]:
    """A metric's sum over the rounds; None if no round has one."""

    def of(records: Sequence[RoundRecord]) -> Any:
        values = values_of(records, name)
        return sum(values) if values else None

    return of


def mean(name: str) -> Callable[[Sequence[RoundRecord]], Any]:
    """A metric's mean over the rounds that have one; None without any."""

    def of(records: Sequence[RoundRecord]) -> float | None:
        values = values_of(records, name)
        return sum(values) / len(values) if values else None

    return of
