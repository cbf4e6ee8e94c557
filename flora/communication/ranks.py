"""Which rank each client's low-rank adapter has."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from flora.core.registry import Component, OptionError, option, register
from flora.core.rng import Rng


@dataclass(frozen=True)
class Ranks(Component):
    """How clients come to their ranks."""

    @property
    @abstractmethod
    def highest(self) -> int:
        """The largest rank that can be drawn."""

    @abstractmethod
    def draw(self, num_clients: int, rng: Rng) -> np.ndarray:
        """The clients' ranks `(num_clients,)`, all of them at least 1."""


@register("drawn")
@dataclass(frozen=True)
class Drawn(Ranks):
    """Each client's rank is one of `values`, drawn for it alone with the probabilities in `shares`."""

    values: tuple[int, ...] = option("the ranks there are", at_least=1)
    shares: tuple[float, ...] | None = option("how often each is drawn, up to a common factor; none: all alike", None)

    def check(self) -> None:
        if not self.values:
            raise OptionError("values", "expected at least one rank")
        if self.shares is None:
            return
        if len(self.shares) != len(self.values):
            raise OptionError(
                "shares", f"expected {len(self.values)} numbers, one for each value, got {len(self.shares)}"
            )
        if min(self.shares) < 0 or not 0 < sum(self.shares) < float("inf"):
            raise OptionError("shares", f"expected numbers of at least 0, not all of them 0, got {list(self.shares)}")

    @property
    def highest(self) -> int:
        return max(value for value, share in zip(self.values, self._shares(), strict=True) if share)

    def draw(self, num_clients: int, rng: Rng) -> np.ndarray:
        return rng.numpy().choice(self.values, num_clients, p=self._shares())

    def _shares(self) -> np.ndarray:
        shares = np.array(self.shares or [1.0] * len(self.values))
        return shares / shares.sum()
