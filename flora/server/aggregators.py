"""Combine the deltas of a cohort into one: the mean, or rules that a few bad clients can't move far."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flora.core import tree
from flora.core.counts import part_of
from flora.core.registry import Component, option, register
from flora.core.tree import State, StateLike


@dataclass(frozen=True)
class Aggregator(Component):
    """How the deltas of a cohort become one."""

    is_mean: ClassVar[bool] = False
    """Whether it is the plain weighted mean."""

    @abstractmethod
    def combine(self, deltas: Sequence[StateLike], weights: Sequence[float]) -> State:
        """One delta from at least one, which come in the order of client ids; `weights` are above 0."""


@register("mean")
@dataclass(frozen=True)
class Mean(Aggregator):
    """The weighted mean (arXiv:1602.05629, algorithm 1)."""

    is_mean: ClassVar[bool] = True

    def combine(self, deltas: Sequence[StateLike], weights: Sequence[float]) -> State:
        return tree.weighted_mean(deltas, weights)


@register("median")
@dataclass(frozen=True)
class Median(Aggregator):
    """Each number's median over the clients, the mean of the middle two of an even number (arXiv:1803.01498).

    Every client counts the same. Fewer than half of the clients can't move it beyond the others' numbers.
    """

    def combine(self, deltas: Sequence[StateLike], weights: Sequence[float]) -> State:
        return _trimmed_mean(deltas, (len(deltas) - 1) // 2)


@register("trimmed_mean")
@dataclass(frozen=True)
class TrimmedMean(Aggregator):
    """Each number's mean over the clients without the largest and the smallest ones (arXiv:1803.01498).

    floor(fraction * K) of K are left out at either end. Every client counts the same.
    """

    fraction: float = option("share of the clients left out at either end", 0.2, at_least=0, below=0.5)

    def combine(self, deltas: Sequence[StateLike], weights: Sequence[float]) -> State:
        return _trimmed_mean(deltas, math.floor(part_of(self.fraction, len(deltas))))


@register("multi_krum")
@dataclass(frozen=True)
class MultiKrum(Aggregator):
    """The weighted mean of the deltas that lie closest to their neighbours (arXiv:1703.02757, section 4).

    With f = floor(fraction * K), a delta's score is the sum of squared distances to its K - f - 2 nearest others (at
    least one); the K - f of the lowest scores are kept. Differs from the paper: K >= 2 f + 3 is not required.
    """

    fraction: float = option("share of the clients that may be bad", 0.2, at_least=0, below=0.5)

    def combine(self, deltas: Sequence[StateLike], weights: Sequence[float]) -> State:
        number = len(deltas)
        num_bad = math.floor(part_of(self.fraction, number))
        if number == 1:
            return dict(deltas[0])
        distances = _squared_distances(deltas)
        num_neighbours = max(number - num_bad - 2, 1)
        # The nearest of all is the delta itself, at distance 0.
        scores = distances.sort(dim=1).values[:, 1 : 1 + num_neighbours].sum(dim=1)
        chosen = scores.argsort(stable=True)[: number - num_bad].sort().values.tolist()
        return tree.weighted_mean([deltas[place] for place in chosen], [weights[place] for place in chosen])


@register("bounded_mean")
@dataclass(frozen=True)
class BoundedMean(Aggregator):
    """The weighted mean of deltas scaled down to a norm of at most `max_norm` (arXiv:1911.07963, section 4)."""

    max_norm: float = option("largest Euclidean norm of a delta over all its tensors", 1.0, above=0)

    def combine(self, deltas: Sequence[StateLike], weights: Sequence[float]) -> State:
        scaled = [tree.scale(delta, min(1.0, self.max_norm / max(tree.norm(delta), 1e-30))) for delta in deltas]
        return tree.weighted_mean(scaled, weights)


def _trimmed_mean(deltas: Sequence[StateLike], num_left_out: int) -> State:
    """Each number's mean over the K deltas without the `num_left_out` largest and smallest ones."""
    mean: State = {}
    for name, tensor in deltas[0].items():
        numbers = torch.stack([delta[name] for delta in deltas]).double().sort(dim=0).values
        mean[name] = numbers[num_left_out : len(deltas) - num_left_out].mean(dim=0).to(tensor.dtype)
    return mean


def _squared_distances(deltas: Sequence[StateLike]) -> Tensor:
    """The squared Euclidean distances `(K, K)` between deltas, in double precision."""
    distances = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for name in deltas[0]:
        rows = torch.stack([delta[name].flatten() for delta in deltas]).double()
        distances += torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    return distances
