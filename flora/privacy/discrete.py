"""Discrete Gaussian noise, drawn exactly: with whole numbers alone (arXiv:2004.00010, algorithms 1 to 3).

The generator is seeded, for research: a deployment needs a cryptographic one, and must not let anybody measure how long
drawing takes, which depends on what is drawn (arXiv:2112.05307).
"""

from __future__ import annotations

import math

import numpy as np

MOST_DEVIATION = 4096
"""Largest standard deviation, so that no whole number here passes 2^63."""


def discrete_gaussian(variance: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return `count` whole numbers, int64, each x with a probability in proportion to exp(-x^2 / (2 variance)).

    `variance` is from 1 to `MOST_DEVIATION` squared.
    """
    scale = math.isqrt(variance) + 1
    drawn, parts = 0, []
    while drawn < count:
        candidates = _discrete_laplace(scale, 2 * (count - drawn) + 16, generator)
        # (|y| - variance / scale)^2 / (2 variance), numerator and denominator. What one number in e^64 has beyond 2^30
        # makes no difference to a probability below e^-2000.
        distance = np.minimum(np.abs(np.abs(candidates) * scale - variance), 2**30)
        accepted = candidates[_exp_minus(distance**2, 2 * variance * scale**2, generator)]
        parts.append(accepted)
        drawn += len(accepted)
    return np.concatenate([np.empty(0, np.int64), *parts])[:count]


def _discrete_laplace(scale: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return at most `count` numbers, each x with a probability in proportion to exp(-|x| / scale)."""
    rests = generator.integers(0, scale, count)
    rests = rests[_exp_minus(rests, scale, generator)]
    wholes, going = np.zeros(len(rests), dtype=np.int64), np.arange(len(rests))
    while len(going):
        going = going[_exp_minus(np.ones(len(going), dtype=np.int64), 1, generator)]
        wholes[going] += 1
    sizes = rests + scale * wholes
    is_negative = generator.integers(0, 2, len(sizes)) == 1
    fit = ~(is_negative & (sizes == 0))  # zero would come twice as often
    return np.where(is_negative, -sizes, sizes)[fit]


def _exp_minus(numerators: np.ndarray, denominator: int, generator: np.random.Generator) -> np.ndarray:
    """Return for each number whether an event of probability exp(-numerator / denominator) has happened."""
    wholes, rests = np.divmod(numerators, denominator)
    happened = _exp_minus_fraction(rests, denominator, generator)
    going = np.flatnonzero(happened & (wholes > 0))
    while len(going):
        one = _exp_minus_fraction(np.ones(len(going), dtype=np.int64), 1, generator)
        happened[going] = one
        wholes[going] -= 1
        going = going[one & (wholes[going] > 0)]
    return happened


def _exp_minus_fraction(numerators: np.ndarray, denominator: int, generator: np.random.Generator) -> np.ndarray:
    """As `_exp_minus` for numerators of at most the denominator: how often in a row chance allows it is odd or even."""
    happened = np.zeros(len(numerators), dtype=bool)
    going, step = np.arange(len(numerators)), 1
    while len(going):
        goes_on = generator.integers(0, denominator * step, len(going)) < numerators[going]
        happened[going[~goes_on]] = step % 2 == 1
        going, step = going[goes_on], step + 1
    return happened
