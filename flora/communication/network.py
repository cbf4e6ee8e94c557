"""A simulated network: which clients can be reached, how fast they are, and how long a round takes.

Nothing here touches what clients train: its random numbers have streams of their own.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from flora.core.errors import UserError
from flora.core.files import read_bytes
from flora.core.registry import Component, OptionError, Options, option, register, suggest
from flora.core.rng import Rng


@dataclass(frozen=True, eq=False)
class Profiles:
    """What each client has, all `(num_clients,)`: megabits and seconds, the speed of its machine, probabilities.

    `compute_speed` 1 takes `Network.step_seconds` a step. `availability` is the probability that a client can be asked
    when a round begins, `dropout` that it is gone before it has sent anything. `time_zone_hours` shifts the day curve.
    """

    download_mbps: np.ndarray
    upload_mbps: np.ndarray
    latency_seconds: np.ndarray
    compute_speed: np.ndarray
    availability: np.ndarray
    dropout: np.ndarray
    time_zone_hours: np.ndarray

    def digest(self) -> str:
        """The SHA-256 of all numbers."""
        columns = [np.asarray(getattr(self, name), dtype=np.float64) for name in COLUMNS]
        return hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()


COLUMNS = tuple(each.name for each in fields(Profiles))
# The column of a CSV file that says whose row it is, if it has one.
CLIENT = "client"
_Line = tuple[int, dict[str | Any, Any]]  # its number, and its cells by column
# What a client has where nothing else is said: a fixed line that is never down.
USUAL = {"download_mbps": 100.0, "upload_mbps": 20.0, "latency_seconds": 0.02, "compute_speed": 1.0,
         "availability": 1.0, "dropout": 0.0, "time_zone_hours": 0.0}  # fmt: skip
# Typical rates that users get, not those of the standards.
PRESETS: dict[str, dict[str, float]] = {
    "fibre": {"download_mbps": 500.0, "upload_mbps": 250.0, "latency_seconds": 0.005},
    "broadband": {},
    "4g": {"download_mbps": 30.0, "upload_mbps": 8.0, "latency_seconds": 0.05, "availability": 0.9, "dropout": 0.05},
    "3g": {"download_mbps": 3.0, "upload_mbps": 0.8, "latency_seconds": 0.15, "availability": 0.8, "dropout": 0.1},
    "phones": {"download_mbps": 30.0, "upload_mbps": 8.0, "latency_seconds": 0.05, "compute_speed": 0.2,
               "availability": 0.3, "dropout": 0.1},
}  # fmt: skip


@dataclass(frozen=True)
class Network(Component):
    """What lies between the server and its clients."""

    step_seconds: float = option("seconds of a local step on a machine of speed 1", 0.1, at_least=0, at_most=1e6)
    day_curve: tuple[float, ...] | None = option(
        "24 factors of the availability, by the hour of the simulated day; none: it is always the same",
        None,
        at_least=0,
        at_most=1,
    )
    wait_seconds: float = option("how long the server waits where nobody can be asked", 600.0, above=0, at_most=1e9)

    def check(self) -> None:
        if self.day_curve is not None and len(self.day_curve) != 24:
            raise OptionError("day_curve", f"expected 24 numbers, one an hour, got {len(self.day_curve)}")

    @abstractmethod
    def profiles(self, num_clients: int, rng: Rng, *, names: Sequence[str] | None = None) -> Profiles:
        """Return what each client has; `names` are the clients', in the order of their ids, where the data name them.

        Raises `UserError` if a file doesn't say.
        """

    def available(self, profiles: Profiles, clock: float, rng: Rng) -> np.ndarray:
        """The ids `(N,)` of the clients that can be asked at a time, in seconds since the first midnight."""
        chance = profiles.availability
        if self.day_curve is not None:
            hours = (clock / 3600 + profiles.time_zone_hours) % 24
            chance = chance * np.array(self.day_curve)[hours.astype(int) % 24]
        return np.flatnonzero(rng.numpy().random(len(chance)) < chance)

    def can_ever_deliver(self, profiles: Profiles) -> np.ndarray:
        """The ids `(N,)` of the clients that can be asked at some hour, and are not always gone before they send."""
        chance = profiles.availability * max(self.day_curve or (1.0,))
        return np.flatnonzero((chance > 0) & (profiles.dropout < 1))


@register("preset")
@dataclass(frozen=True)
class Preset(Network):
    """All clients have the same line, and machines of the same speed."""

    kind: str = option("which line", "broadband", choices=tuple(PRESETS))

    def profiles(self, num_clients: int, rng: Rng, *, names: Sequence[str] | None = None) -> Profiles:
        return Profiles(**{name: np.full(num_clients, {**USUAL, **PRESETS[self.kind]}[name]) for name in COLUMNS})


@register("drawn")
@dataclass(frozen=True)
class DrawnNetwork(Network):
    """Rates and speeds are log-normal around their medians, each client's drawn once."""

    download_mbps: float = option("median of the rate down", 100.0, at_least=1e-3, at_most=1e6)
    upload_mbps: float = option("median of the rate up", 20.0, at_least=1e-3, at_most=1e6)
    latency_seconds: float = option("latency one way", 0.02, at_least=0, at_most=1e6)
    compute_speed: float = option("median of the machines' speed", 1.0, at_least=1e-6, at_most=1e6)
    spread: float = option(
        "standard deviation of the rates' and the speeds' natural logarithms", 0.5, at_least=0, at_most=5
    )
    availability: float = option("probability that a client can be asked", 1.0, above=0, at_most=1)
    dropout: float = option("probability that a client is gone before it has sent anything", 0.0, at_least=0, below=1)

    def profiles(self, num_clients: int, rng: Rng, *, names: Sequence[str] | None = None) -> Profiles:
        def drawn(name: str) -> np.ndarray:
            return getattr(self, name) * np.exp(self.spread * rng.child(name).numpy().standard_normal(num_clients))

        spread = {name: drawn(name) for name in ("download_mbps", "upload_mbps", "compute_speed")}
        same = {name: getattr(self, name, USUAL[name]) for name in COLUMNS if name not in spread}
        return Profiles(**spread, **{name: np.full(num_clients, value) for name, value in same.items()})


@register("csv")
@dataclass(frozen=True)
class CsvNetwork(Network):
    """A file with a row for each client, in the order of their ids, and any of these columns: those of `Profiles`.

    With a column `client` the rows may be in any order: it holds the clients' names where the data name them, else
    their ids. Rows of others are ignored then.
    """

    path: str = option("the CSV file, with a head", "")

    def check(self) -> None:
        super().check()
        if not self.path:
            raise OptionError("path", "missing: the CSV file, with a head")

    def profiles(self, num_clients: int, rng: Rng, *, names: Sequence[str] | None = None) -> Profiles:
        head, rows = self._read()
        unknown = [name for place, name in enumerate(head) if name not in (CLIENT, *COLUMNS) or name in head[:place]]
        if unknown or not head:
            found = repr(unknown[0]) if unknown else "none"
            raise self._error(f"expected columns of {', '.join((CLIENT, *COLUMNS))}, each once, got {found}")
        if CLIENT in head:
            rows = self._by_client(rows, names or map(str, range(num_clients)))
        if len(rows) != num_clients:
            raise self._error(f"expected {num_clients} rows, one a client, got {len(rows)}")
        columns = {name: np.full(num_clients, value) for name, value in USUAL.items()}
        for name in head:
            if name != CLIENT:
                columns[name] = np.array([_number(self.path, line, name, row) for line, row in rows])
        return Profiles(**columns)

    def _read(self) -> tuple[list[str], list[_Line]]:
        """The head and the lines below it."""
        try:
            text = read_bytes(self.path).decode("utf-8-sig")
            reader = csv.DictReader(io.StringIO(text, newline=""))
            rows = [(reader.line_num, row) for row in reader]
            return list(reader.fieldnames or []), rows
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a CSV file"
            raise UserError(f"network.path: {self.path!r}: {reason}") from None

    def _by_client(self, rows: Sequence[_Line], names: Iterable[str]) -> list[_Line]:
        """The row of each of the clients `names`, in their order."""
        by_name: dict[str, _Line] = {}
        for line, row in rows:
            name = (row[CLIENT] or "").strip()
            if name in by_name:
                raise self._error(f"line {line}: client {name!r} is in line {by_name[name][0]} already")
            by_name[name] = line, row
        ordered = []
        for name in names:
            if name not in by_name:
                raise self._error(f"no row for client {name!r}; {suggest(name, sorted(by_name))}")
            ordered.append(by_name[name])
        return ordered

    def _error(self, message: str) -> UserError:
        return UserError(f"network.path: {self.path}: {message}")


# What a cell may be: from, to.
LIMITS = {"availability": (0.0, 1.0), "dropout": (0.0, 1.0), "time_zone_hours": (-24.0, 24.0),
          "latency_seconds": (0.0, 1e6)}  # fmt: skip
RATE_LIMITS = (1e-6, 1e6)


def _number(path: str, line: int, name: str, row: Mapping[str | None, Any]) -> float:
    """A cell's value. Raises `UserError` naming the line if it is none that the column may have."""
    text = row[name]
    if None in row or text is None:
        found = "more" if None in row else "fewer"
        raise UserError(f"network.path: {path}: line {line}: {found} cells than the head has")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    lowest, highest = LIMITS.get(name, RATE_LIMITS)
    if not lowest <= value <= highest:
        allowed = f"a number from {lowest:g} to {highest:g}"
        raise UserError(f"network.path: {path}: line {line}: {name}: expected {allowed}, got {text!r}")
    return value


@dataclass(frozen=True)
class StragglerPolicy(Options):
    """For whom the server waits."""

    deadline_seconds: float | None = option("a round ends then at the latest; none: when all have sent", None, above=0)
    over_selection: float = option(
        "as many times more clients are asked than are needed; the first ones count", 1.0, at_least=1, at_most=1000
    )


def _nobody() -> np.ndarray:
    return np.array([], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class CohortOutcome:
    """How a round goes: who delivers in time, who too late, who is lost on the way, how long the server waits.

    Ids are sorted. Without a network all who are asked deliver, and no time passes.
    """

    clients: np.ndarray
    late: np.ndarray = field(default_factory=_nobody)
    dropped: np.ndarray = field(default_factory=_nobody)
    seconds: float | None = None

    @property
    def asked(self) -> list[int]:
        """All who were asked, where the server waits for a cohort."""
        return [*self.clients.tolist(), *self.late.tolist(), *self.dropped.tolist()]


@dataclass(frozen=True)
class ClientLoad:
    """What a client does in a round, by its id: local steps, bytes that it gets, bytes that it sends.

    A secure sum has `num_trips` messages to the server and back, and bytes of its own, the same for all clients.
    """

    num_steps: Callable[[int], int]
    downlink_bytes: Callable[[int], int]
    uplink_bytes: Callable[[int], int]
    num_trips: int = 1
    sum_downlink_bytes: int = 0
    sum_uplink_bytes: int = 0


def durations(network: Network, profiles: Profiles, clients: np.ndarray, load: ClientLoad) -> np.ndarray:
    """Return how many seconds each of `clients` takes from being asked to having delivered.

    A client takes its download, its steps and its upload one after the other, and the latency twice for each trip.
    """
    num_steps, downlink_bytes, uplink_bytes = (
        np.array([of(client) for client in clients.tolist()], dtype=np.int64)
        for of in (load.num_steps, load.downlink_bytes, load.uplink_bytes)
    )
    down = (downlink_bytes + load.sum_downlink_bytes) * 8e-6 / profiles.download_mbps[clients]
    up = (uplink_bytes + load.sum_uplink_bytes) * 8e-6 / profiles.upload_mbps[clients]
    work = num_steps * network.step_seconds / profiles.compute_speed[clients]
    return 2 * load.num_trips * profiles.latency_seconds[clients] + down + work + up


def cohort_outcome(
    stragglers: StragglerPolicy,
    asked: np.ndarray,
    *,
    takes: np.ndarray,
    dropout: np.ndarray,
    num_needed: int,
    rng: Rng,
) -> CohortOutcome:
    """Decide who of the clients `asked` delivers in time, is late, or drops out; the first `num_needed` count.

    `takes` `(len(asked),)` are the seconds that each needs, `dropout` the probabilities that it is gone by then.
    """
    stays = rng.numpy().random(len(asked)) >= dropout
    in_time = stays & (takes <= (stragglers.deadline_seconds or math.inf))
    order = np.flatnonzero(in_time)[np.argsort(takes[in_time], kind="stable")][:num_needed]
    late = np.setdiff1d(np.flatnonzero(stays), order)
    if len(order) == num_needed:
        seconds = takes[order[-1]]
    else:  # without a deadline the server notices who is gone when the others have sent
        seconds = stragglers.deadline_seconds or (takes[stays] if stays.any() else takes).max()
    return CohortOutcome(np.sort(asked[order]), np.sort(asked[late]), asked[~stays], float(seconds))
