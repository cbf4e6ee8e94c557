"""The page of a run on its way, written anew after its rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flora.core.errors import UserError
from flora.core.records import RoundRecord
from flora.report.page import PAGE_NAME, write_page
from flora.report.reading import read_files
from flora.runs.sinks import Finished, Sink

# After writing it, so many times longer passes before the page is written again: that takes a tenth of the time.
PAUSE = 9


class LivePage(Sink):
    """Writes `report.html` after each round, or less often where rounds are short, and when the run is interrupted.

    A failure is said, and ends nothing.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say, self._next = say, -math.inf
        self._path: Path | None = None
        self._is_on_its_way = False

    def opened(self, path: Path) -> None:
        self._path = path

    def record(self, record: RoundRecord) -> None:
        self._is_on_its_way = True
        started = time.monotonic()
        if started < self._next:
            return
        self._write(was_interrupted=False)
        ended = time.monotonic()
        self._next = max(self._next, ended + PAUSE * (ended - started))

    def finish(self, finished: Finished) -> None:
        self._is_on_its_way = False

    def close(self) -> None:
        if self._is_on_its_way and self._next < math.inf:
            self._write(was_interrupted=True)

    def _write(self, *, was_interrupted: bool) -> None:
        """Write the page, or say that there will be none from now on."""
        if self._path is None:
            return
        try:
            run = replace(read_files(self._path, is_live=True), was_interrupted=was_interrupted)
            write_page([run], self._path / PAGE_NAME)
        except UserError as error:
            self._say(f"warning: there will be no page of this run on its way: {error}")
            self._next = math.inf
