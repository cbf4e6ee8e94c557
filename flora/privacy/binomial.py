"""Binomial tails, and the interval that they give for a share that was counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Halvings of an interval: it ends as small as a double can tell.
HALVINGS = 60


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def probabilities(number: int, share: float) -> np.ndarray:
    """Return P[Binomial(number, share) = k] for k = 0 ... number, `(number + 1,)`."""
    counts = np.arange(number + 1)
    if share in (0.0, 1.0):
        return np.asarray(counts == share * number, dtype=float)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, number + 1)))])
    ways = log_factorials[-1] - log_factorials - log_factorials[::-1]
    return np.asarray(np.exp(ways + counts * math.log(share) + (number - counts) * math.log1p(-share)))


def upper_tail(number: int, share: float, count: int) -> float:
    """Return P[Binomial(number, share) >= count]."""
    return min(float(probabilities(number, share)[max(count, 0) :].sum()), 1.0)


def crossing(function: Callable[[float], float], level: float, low: float, high: float) -> Interval:
    """Return the smallest interval within which a function that never falls comes to `level`.

    It is below `level` at `low` and not at `high`.
    """
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if function(middle) < level:
            low = middle
        else:
            high = middle
    return Interval(low, high)


def clopper_pearson(successes: int, number: int, confidence: float = 0.95) -> Interval:
    """Return the exact interval for the share of which `successes` of `number` were counted (Clopper and Pearson)."""
    level = (1 - confidence) / 2
    low, high = 0.0, 1.0
    if successes > 0:
        low = crossing(lambda share: upper_tail(number, share, successes), level, 0.0, 1.0).low
    if successes < number:
        high = crossing(lambda share: upper_tail(number, share, successes + 1), 1 - level, 0.0, 1.0).high
    return Interval(low, high)
