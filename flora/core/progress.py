"""How far a run is: bars on a terminal, else a limited number of lines."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from flora.core.records import RoundRecord

Progress = Callable[[str, int], Callable[[int], object]]
"""`progress(title, total)` starts a bar and returns the function that advances it."""


@dataclass(frozen=True)
class Tell:
    """Who is told how far it is, and what a user should know: nobody, unless it is said."""

    progress: Progress = lambda title, total: lambda number: None
    log: Callable[[str], object] = lambda line: None


SILENT = Tell()

# Lines about the rounds of a run, at most about so many.
MAX_ROUND_LINES = 50
# Lines about what is computed of images: at each tenth, but not more often than so many seconds.
SECONDS_BETWEEN_LINES = 10.0
# Seconds that a round must take before its client steps have a bar, and between two lines about them.
LONG_ROUND = 2.0
SECONDS_BETWEEN_STEP_LINES = 60.0
# Rounds whose mean time says how long those to come will take.
NUM_RECENT = 20


def on_terminal() -> bool:
    """Whether standard error is a terminal on which bars can move; some consoles say that they have no width."""
    try:
        return sys.stderr.isatty() and 0 not in os.get_terminal_size(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):
        return False


def bar(title: str, total: int, unit: str, *, shown: bool = True, **options: Any) -> Any:
    """A progress bar on standard error; silent where that is not a terminal, or it is not to be `shown`."""
    is_silent = not (shown and on_terminal())
    return tqdm(total=total, desc=title, unit=unit, disable=is_silent, dynamic_ncols=True, **options)


def image_progress(log: Callable[[str], object], *, shows_bars: bool = True, unit: str = "image") -> Progress:
    """Return what shows how many images are done: a bar, or lines of the log where there is no terminal.

    `unit` is what is counted, if it is not images.
    """

    def start(title: str, total: int) -> Callable[[int], object]:
        shown, lines = bar(title, total, unit, shown=shows_bars), _Tenths(title, total, log, SECONDS_BETWEEN_LINES)

        def advance(number: int) -> None:
            shown.update(number)
            if shown.disable:
                lines.advance(number)
            elif shown.n >= total:
                shown.close()

        return advance

    return start


class _Tenths:
    """Logs a line at each tenth of `total`, unless the one before it was written less than `seconds` ago."""

    def __init__(self, title: str, total: int, log: Callable[[str], object], seconds: float) -> None:
        self._title, self._total, self._log, self._seconds = title, total, log, seconds
        self._done, self._tenths, self._started = 0, 0, time.perf_counter()
        self._last = self._started

    def advance(self, number: int) -> None:
        self._done += number
        now, tenths = time.perf_counter(), 10 * self._done // max(self._total, 1)
        if tenths > self._tenths and now - self._last >= self._seconds:
            taken = now - self._started
            left = taken / self._done * (self._total - self._done)
            to_come = f", {duration(left)} left" if self._done < self._total else ""
            self._log(f"{self._title}: {self._done:,} of {self._total:,} after {duration(taken)}{to_come}")
            self._tenths, self._last = tenths, now


class StepBar:
    """A bar of the client steps of a round that takes long, on a terminal; else a line of the log now and then."""

    def __init__(self, log: Callable[[str], object]) -> None:
        self._log = log
        self._bar: Any = None
        self._lines: _Tenths | None = None
        self._done = 0

    def show(self, done: int, total: int) -> None:
        """Say that `done` of `total` client steps of a round are taken."""
        if not on_terminal():
            if self._lines is None or done <= self._done:  # another round
                self._lines, self._done = _Tenths("  client steps", total, self._log, SECONDS_BETWEEN_STEP_LINES), 0
            self._lines.advance(done - self._done)
            self._done = done
            return
        if self._bar is None or self._bar.total != total:
            self.close()
            self._bar = bar("  client steps", total, "step", leave=False, delay=LONG_ROUND)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class TimeLeft:
    """Estimates how long a run will still take, from the records of its rounds since it began or went on.

    Its last rounds say how long those to come will take, with their evaluations; `num_local_only` clients that train
    alone at the end take as long as in the rounds.
    """

    def __init__(self, num_rounds: int, num_local_only: int) -> None:
        self._num_rounds, self._num_local_only = num_rounds, num_local_only
        self._recent: deque[RoundRecord] = deque(maxlen=NUM_RECENT)

    def after(self, record: RoundRecord) -> float | None:
        """The seconds that are left after a round; None where no round tells: after round 0, and at the end."""
        if record.round == 0:
            return None
        self._recent.append(record)
        rounds = sum(each.train_seconds + each.eval_seconds for each in self._recent) / len(self._recent)
        clients = sum(each.num_clients or 0 for each in self._recent)
        client_rounds = self._num_local_only * self._num_rounds
        alone = sum(each.train_seconds for each in self._recent) / max(clients, 1) * client_rounds
        return rounds * (self._num_rounds - record.round) + alone or None


def duration(seconds: float) -> str:
    """A time in its two largest units: "12 s", "3 min 20 s", "2 h 5 min", "1 d 3 h"."""
    left = round(seconds)
    for unit, size, smaller, smaller_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if left >= size:
            rest = left % size // smaller_size
            return f"{left // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{left} s"


def has_line(round: int, num_rounds: int) -> bool:
    """Whether a round is among those that have a line in the log: all, or every n-th of many, and the last one."""
    return round == num_rounds or round % math.ceil(max(num_rounds, 1) / MAX_ROUND_LINES) == 0


def round_line(record: RoundRecord, num_rounds: int, seconds_left: float | None = None) -> str:
    """A round in a line: "round 3 of 20: accuracy 81.2 %, ..., 10 clients, 1.2 s, 8.3 clients/s, 20 s left"."""
    parts = []
    if record.accuracy is not None:
        parts.append(f"accuracy {100 * record.accuracy:.1f} %")
    if record.train_loss is not None:
        parts.append(f"training loss {record.train_loss:.3f}")
    if record.round and record.num_clients is not None:
        parts.append(f"{record.num_clients} client{'s' if record.num_clients != 1 else ''}")
    if record.rejected_clients:
        parts.append(f"{len(record.rejected_clients)} left out")
    parts.append(f"{record.train_seconds + record.eval_seconds:.1f} s")
    if record.num_clients and record.train_seconds:
        parts.append(f"{record.num_clients / record.train_seconds:.3g} clients/s")
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    return f"round {record.round} of {num_rounds}: {', '.join(parts)}"
