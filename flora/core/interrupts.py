"""Ctrl-C and SIGTERM: the first one stops a run at the next good place, the second one at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The run was asked to stop by the signal `number`; no error, which libraries and `except Exception` would take."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_status(self) -> int:
        """What a shell expects of a program that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


class Interrupts:
    """A context in which the two signals are remembered instead of obeyed; `check` raises `Interrupted` for them.

    Of several processes that get a signal one `talks`.
    """

    def __init__(self, *, talks: bool = True) -> None:
        self._talks = talks
        self._received: int | None = None
        self._checked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come. Before the first check there is nothing worth finishing."""
        self._checked = True
        if self._received is not None:
            raise Interrupted(self._received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            # The way out of anything, a loop that hangs included. What was saved is whole, whenever this comes.
            os._exit(128 + number)
        self._received = number
        if not self._checked:
            raise Interrupted(number)
        if self._talks:
            print("\nstopping after this block of clients; once more to leave at once", file=sys.stderr, flush=True)
