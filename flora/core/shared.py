"""What several experiments of one process have in common: each thing is made once, by its key."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Thing = TypeVar("Thing")


class Shared:
    """Things by their keys. What is asked for under a key that is known is not made again."""

    def __init__(self) -> None:
        self._things: dict[Hashable, Any] = {}

    def of(self, key: Hashable, make: Callable[[], Thing]) -> Thing:
        """Return the thing that belongs to `key`, made by `make` if it is asked for the first time.

        Objects that `key` names by their `id` must be things of this, so that they live as long.
        """
        if key not in self._things:
            self._things[key] = make()
        return self._things[key]
