"""Which clients take part in a round."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flora.core.counts import part_of
from flora.core.registry import Component, OptionError, option, register
from flora.core.rng import Rng
from flora.privacy.accounting import Attendance


@dataclass(frozen=True)
class Sampler(Component):
    """Which clients take part in a round."""

    varies: ClassVar[bool] = False
    """Whether the sizes of cohorts are drawn, too; `cohort_size` is then the expected one, rounded, and at least 1."""
    takes_turns: ClassVar[bool] = False
    """Whether it needs all clients to be there in each round, because everybody's turn comes."""
    reads_sizes: ClassVar[bool] = False
    """Whether it looks at the clients' numbers of examples."""

    fraction: float | None = option(
        "share of all clients in a round; none (and no `number`): all", None, above=0, at_most=1
    )
    number: int | None = option("clients in a round, in place of `fraction`", None, at_least=1)

    def check(self) -> None:
        if self.fraction is not None and self.number is not None:
            raise OptionError("number", "give either `fraction` or `number`, not both")

    def cohort_size(self, num_clients: int) -> int:
        """Return how many of `num_clients` take part. Raises `OptionError` if `number` is larger than that."""
        if self.number is not None and self.number > num_clients:
            raise OptionError("number", f"expected at most the number of clients, {num_clients}, got {self.number}")
        if self.number is not None:
            return self.number
        return max(1, round(part_of(self.fraction or 1.0, num_clients)))

    def size_in(self, round: int, num_clients: int) -> int:
        """Return how many of `num_clients` take part in a round, counted from 1. Raises as `cohort_size`."""
        return self.cohort_size(num_clients)

    def expected_size(self, round: int, num_clients: int) -> float:
        """Return how many of `num_clients` take part in a round, counted from 1, in the mean."""
        return float(self.size_in(round, num_clients))

    def attendance(self, num_clients: int) -> Attendance:
        """Return how often a client can take part."""
        return Attendance()

    def sample_in(self, round: int, sizes: np.ndarray, number: int, rng: Rng) -> np.ndarray:
        """The ids `(number,)` of a round's cohort: `sample`, unless it matters which round it is."""
        return self.sample(sizes, number, rng)

    @abstractmethod
    def sample(self, sizes: np.ndarray, number: int, rng: Rng) -> np.ndarray:
        """The ids of a cohort of `number`, distinct and sorted.

        `sizes` `(num_clients,)` are the clients' numbers of examples.
        """


@register("uniform")
@dataclass(frozen=True)
class Uniform(Sampler):
    """Every client is as likely as any other (arXiv:1602.05629, algorithm 1)."""

    def sample(self, sizes: np.ndarray, number: int, rng: Rng) -> np.ndarray:
        return np.sort(rng.numpy().choice(len(sizes), number, replace=False))


@register("by_size")
@dataclass(frozen=True)
class BySize(Sampler):
    """Drawn one by one, each client with a probability in proportion to its examples."""

    reads_sizes = True

    def sample(self, sizes: np.ndarray, number: int, rng: Rng) -> np.ndarray:
        return np.sort(rng.numpy().choice(len(sizes), number, replace=False, p=sizes / sizes.sum()))


@register("dynamic")
@dataclass(frozen=True)
class Dynamic(Uniform):
    """Uniform, of ever fewer clients: C exp(-beta (t - 1)) in round t (dynamic sampling, arXiv:2003.09603, equation 3).

    C is `number`, or `fraction` of all. The numbers are rounded, and not below `minimum`, nor above C.
    """

    beta: float = option("how fast the cohort shrinks; 0: it doesn't", 0.1, at_least=0)
    minimum: int = option("clients that take part in the end at least", 2, at_least=1)

    def size_in(self, round: int, num_clients: int) -> int:
        first = self.cohort_size(num_clients)
        return max(math.floor(first * math.exp(-self.beta * (round - 1)) + 0.5), min(self.minimum, first))


@register("poisson")
@dataclass(frozen=True)
class Poisson(Sampler):
    """Each client takes part with probability `fraction`, whoever else does: cohorts of varying size, maybe of nobody.

    What differential privacy by sampling is accounted for (arXiv:1607.00133).
    """

    varies = True

    def check(self) -> None:
        super().check()
        if self.fraction is None:
            raise OptionError("fraction", "missing: poisson needs the probability with which a client takes part")

    def expected_size(self, round: int, num_clients: int) -> float:
        return (self.fraction or 1.0) * num_clients

    def attendance(self, num_clients: int) -> Attendance:
        return Attendance(fraction=self.fraction)

    def sample(self, sizes: np.ndarray, number: int, rng: Rng) -> np.ndarray:
        return np.flatnonzero(rng.numpy().random(len(sizes)) < (self.fraction or 1.0))


@register("in_turn")
@dataclass(frozen=True)
class InTurn(Sampler):
    """In the order of their ids, everybody once before anybody again (cyclic participation, arXiv:2302.03109)."""

    takes_turns = True

    def attendance(self, num_clients: int) -> Attendance:
        return Attendance(turn=(self.cohort_size(num_clients), num_clients))

    def sample_in(self, round: int, sizes: np.ndarray, number: int, rng: Rng) -> np.ndarray:
        return np.sort((np.arange(number) + (round - 1) * number) % len(sizes))

    def sample(self, sizes: np.ndarray, number: int, rng: Rng) -> np.ndarray:
        return self.sample_in(1, sizes, number, rng)
