"""How far a run is: bars on a terminal, else a limited number of lines."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from flora.core.records import RoundRecord

Progress = Callable[[str, int], Callable[[int], object]]
"""`progress(title, total)` starts a bar and returns the function that advances it."""


@dataclass(frozen=True)
class Tell:
    """Who is told how far it is, and what a user should know."""

    progress: Progress
    log: Callable[[str], object]


# Lines about the rounds of a run, at most about so many.
MAX_ROUND_LINES = 50
# Lines about what is computed of images: at each tenth, but not more often than so many seconds.
SECONDS_BETWEEN_LINES = 10.0
# Seconds that a round must take before its client steps have a bar.
LONG_ROUND = 2.0


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


def image_progress(log: Callable[[str], object], *, shows_bars: bool = True) -> Progress:
    """Return what shows how many images are done: a bar, or lines of the log where there is no terminal."""

    def start(title: str, total: int) -> Callable[[int], object]:
        shown, lines = bar(title, total, "image", shown=shows_bars), _Tenths(title, total, log)

        def advance(number: int) -> None:
            shown.update(number)
            if shown.disable:
                lines.advance(number)
            elif shown.n >= total:
                shown.close()

        return advance

    return start


class _Tenths:
    """Logs a line at each tenth of `total`, unless the one before it was just written."""

    def __init__(self, title: str, total: int, log: Callable[[str], object]) -> None:
        self._title, self._total, self._log = title, total, log
        self._done, self._tenths, self._started = 0, 0, time.perf_counter()
        self._last = self._started

    def advance(self, number: int) -> None:
        self._done += number
        now, tenths = time.perf_counter(), 10 * self._done // max(self._total, 1)
        if tenths > self._tenths and now - self._last >= SECONDS_BETWEEN_LINES:
            self._log(f"{self._title}: {self._done:,} of {self._total:,} after {now - self._started:.0f} s")
            self._tenths, self._last = tenths, now


class StepBar:
    """A bar of the client steps of a round that takes long, on a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, done: int, total: int) -> None:
        """Say that `done` of `total` client steps are taken."""
        if not on_terminal():
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


def has_line(round: int, num_rounds: int) -> bool:
    """Whether a round is among those that have a line in the log: all, or every n-th of many, and the last one."""
    return round == num_rounds or round % math.ceil(max(num_rounds, 1) / MAX_ROUND_LINES) == 0


def round_line(record: RoundRecord, num_rounds: int) -> str:
    """A round in a line: "round 3 of 20: accuracy 81.2 %, loss 0.613, 10 clients, 1.2 s"."""
    parts = []
    if record.accuracy is not None:
        parts.append(f"accuracy {100 * record.accuracy:.1f} %")
    if record.train_loss is not None:
        parts.append(f"training loss {record.train_loss:.3f}")
    if record.round:
        parts.append(f"{record.num_clients} client{'s' if record.num_clients != 1 else ''}")
    if record.rejected_clients:
        parts.append(f"{len(record.rejected_clients)} left out")
    parts.append(f"{record.train_seconds + record.eval_seconds:.1f} s")
    return f"round {record.round} of {num_rounds}: {', '.join(parts)}"
