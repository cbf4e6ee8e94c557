"""Functions that a program may pass in to look into a run or to change it: progress, logging, fault injection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flora.core.records import RoundRecord
from flora.core.states import ClientUpdate, ServerState


@dataclass(frozen=True)
class Hooks:
    """What `simulate` calls on its way. Each may raise, which ends the run as any error at that place would.

    `before_block(round, clients)` comes before a block of clients trains (and again where clients train adapters of
    their own, in the round or after the last one). `after_step(done, total)` comes after each step of a block; of a
    cohort's steps, added up over its clients, so many are done. `update(round, update)` may replace what a client
    sends. `after_round(record, state)` comes when a round is measured and written down. `before_write(path)` comes
    before a file of the run directory is written, renamed or taken away.
    """

    before_block: Callable[[int, tuple[int, ...]], object] = lambda round, clients: None
    after_step: Callable[[int, int], object] = lambda done, total: None
    update: Callable[[int, ClientUpdate], ClientUpdate] = lambda round, update: update
    after_round: Callable[[RoundRecord, ServerState], object] = lambda record, state: None
    before_write: Callable[[Path], object] = lambda path: None

    def then(self, other: Hooks) -> Hooks:
        """Return hooks that call these, then those of `other`, which get an update as these leave it."""

        def update(round: int, update: ClientUpdate) -> ClientUpdate:
            return other.update(round, self.update(round, update))

        return Hooks(
            before_block=lambda round, clients: (self.before_block(round, clients), other.before_block(round, clients)),
            after_step=lambda done, total: (self.after_step(done, total), other.after_step(done, total)),
            update=update,
            after_round=lambda record, state: (self.after_round(record, state), other.after_round(record, state)),
            before_write=lambda path: (self.before_write(path), other.before_write(path)),
        )
