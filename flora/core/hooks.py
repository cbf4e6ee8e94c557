"""Functions that a program may pass in to look into a run or to change it: progress, logging, fault injection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flora.core.states import ClientUpdate


@dataclass(frozen=True)
class Hooks:
    """What `simulate` calls on its way. Each may raise, which ends the run as any error at that place would.

    `before_block(round, clients)` comes before a block of clients trains (and again where clients train adapters of
    their own, in the round or after the last one). `after_step(done, total)` comes after each step of a block; of a
    cohort's steps, added up over its clients, so many are done. `update(round, update)` may replace what a client
    sends. `before_write(path)` comes before a file of the run directory is written, renamed or taken away.
    """

    before_block: Callable[[int, tuple[int, ...]], object] = lambda round, clients: None
    after_step: Callable[[int, int], object] = lambda done, total: None
    update: Callable[[int, ClientUpdate], ClientUpdate] = lambda round, update: update
    before_write: Callable[[Path], object] = lambda path: None
