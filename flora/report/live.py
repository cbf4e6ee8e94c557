"""The page of a run on its way, written anew after its rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from flora.core.errors import UserError
from flora.core.records import RoundRecord
from flora.report.page import PAGE_NAME, write_page
from flora.report.reading import read_files
from flora.runs.sinks import Sink

# After writing it, so many times longer passes before the page is written again: that takes a tenth of the time.
PAUSE = 9


class LivePage(Sink):
    """Writes `report.html` after each round, or less often where rounds are short.

    A failure is said, and ends nothing.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say, self._next = say, -math.inf
        self._path: Path | None = None

    def opened(self, path: Path) -> None:
        self._path = path

    def record(self, record: RoundRecord) -> None:
        started = time.monotonic()
        if self._path is None or started < self._next:
            return
        try:
            write_page([read_files(self._path, is_live=True)], self._path / PAGE_NAME)
        except UserError as error:
            self._say(f"warning: there will be no page of this run on its way: {error}")
            self._next = math.inf
            return
        ended = time.monotonic()
        self._next = ended + PAUSE * (ended - started)
