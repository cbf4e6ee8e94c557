"""How far the clients of a round moved, and how far they drifted apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.core import tree
from flora.core.tree import StateLike


@dataclass(frozen=True)
class Movement:
    """The clients' mean distance from the broadcast, and the share of their movement that the plain mean loses.

    `client_drift` is the root mean square distance of the deltas from their mean over the root mean square of their
    norms: 0 where all move alike, 1 where they cancel out. None where there is nothing to say it of: no delta, one
    alone, or all zero.
    """

    delta_norm: float | None
    client_drift: float | None


def movement_of(deltas: Sequence[StateLike]) -> Movement:
    """Return how far clients moved, from their deltas, all of the same names and shapes, each client once."""
    if not deltas:
        return Movement(None, None)
    squares: list[Tensor] = []
    square_of_mean = 0.0
    for parts in zip(*(tree.flatten(delta).split(tree.MAX_TOGETHER) for delta in deltas), strict=True):
        mean = torch.zeros(len(parts[0]), dtype=torch.float64)
        for part in parts:
            numbers = part.to(torch.float64)
            squares.append(numbers @ numbers)
            mean.add_(numbers, alpha=1 / len(deltas))
        square_of_mean += float(mean @ mean)
    squared = torch.stack(squares).view(-1, len(deltas)).sum(dim=0)
    mean_square = float(squared.mean())
    drift = None
    if len(deltas) > 1 and mean_square > 0:
        drift = max(1 - square_of_mean / mean_square, 0.0) ** 0.5
    return Movement(float(squared.sqrt().mean()), drift)
