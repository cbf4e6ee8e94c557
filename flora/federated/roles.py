"""Which tensors of an adapter are trained, sent, broadcast, and kept by their clients: names alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flora.clip.adapters.base import AttachedAdapter
from flora.core.low_rank import is_residual
from flora.server.strategies.base import Strategy


@dataclass(frozen=True, eq=False)
class TensorRoles:
    """Asks the strategy and the adapter what becomes of each tensor; names keep the order in which they are given.

    `keeps_all` says that each client trains an adapter of its own besides the server's (Ditto).
    """

    adapter: AttachedAdapter
    strategy: Strategy
    keeps_all: bool

    def stays(self, name: str) -> bool:
        """Whether clients train this tensor and keep it to themselves."""
        return self.adapter.stays(name) or self.strategy.stays(name)

    def trained(self, names: Iterable[str], round: int) -> tuple[str, ...]:
        """Return what clients train in a round, counted from 1: never a residual, which is the server's."""
        stays, trains = self.adapter.stays, self.strategy.trains
        return tuple(name for name in names if not is_residual(name) and (stays(name) or trains(name, round)))

    def sent(self, names: Iterable[str], round: int) -> tuple[str, ...]:
        """Return what clients train in a round and send."""
        return tuple(name for name in self.trained(names, round) if not self.stays(name))

    def broadcast(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return what the server sends."""
        return tuple(name for name in names if self.strategy.broadcasts(name) and not self.stays(name))

    def ever_trained(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return what is trained in some round: a strategy that alternates does so every second one."""
        names = tuple(names)
        trained = {*self.trained(names, 1), *self.trained(names, 2)}
        return tuple(name for name in names if name in trained)

    def own(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the tensors of which each client has a copy of its own."""
        return tuple(name for name in self.ever_trained(names) if self.keeps_all or self.stays(name))
