"""What a tracker is: a place beside the run directory, where people keep their runs, that is told of each round."""

from __future__ import annotations

import importlib.util
import uuid
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from flora.core.errors import UserError
from flora.core.registry import Component, name_of

Figures = Mapping[str, float | None]
"""Numbers by name; None where a round has no such figure."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker is told of: its name, its directory, and its settings under dotted keys.

    `id` is that of the tracked run to go on with, None for a new one; `last_round` is the last that it was told of, -1
    if it was told of none.
    """

    name: str
    directory: Path
    settings: Mapping[str, Any]
    id: str | None = None
    last_round: int = -1


class Following:
    """One tracked run while it is told of its rounds. What goes wrong may be raised as any exception.

    `id` is by what the tracker knows it again, `last_round` the last round that it has.
    """

    id: str
    last_round: int

    def round(self, number: int, figures: Figures) -> None:
        """Write a round's figures down, so that they stay even if the process is killed after this."""
        raise NotImplementedError

    def finish(self, figures: Mapping[str, Any]) -> None:
        """Write the figures of the finished run down."""

    def close(self, *, is_finished: bool) -> None:
        """Let go of the tracked run: it is finished, or has stopped and may be gone on with."""


@dataclass(frozen=True)
class Tracker(Component):
    """What is told of each round's figures, beside the run directory."""

    module: ClassVar[str | None] = None
    """The module of the library that it needs; the extra that installs it has the tracker's name."""

    def require(self) -> None:
        """Raise `UserError` naming the extra if the library is missing."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            name = name_of(self)
            raise UserError(f"trackers: {name}: {self.module} is not installed; pip install 'flora-clip[{name}]'")

    @abstractmethod
    def follow(self, run: TrackedRun) -> Following:
        """Begin a tracked run, or go on with the one that `run` names.

        Raises `UserError` if that can't be for what the user can mend; any other exception if the tracker is out of
        reach.
        """


def new_id() -> str:
    """An id that no other run has; it decides nothing that a run computes."""
    return uuid.uuid4().hex[:12]


def present(figures: Figures) -> dict[str, float]:
    """The figures that there are."""
    return {name: value for name, value in figures.items() if value is not None}
