"""Rotated numbers that are rounded at random: with them a noisy secure sum needs few bits (arXiv:2102.06387).

A random rotation spreads an update over all its numbers, so that none is much larger than the others and a sum seldom
leaves a small ring. Rounding at random changes no number in the mean, however small it is against a unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flora.core.rng import Rng

BETA = math.exp(-0.5)
"""A bound on the probability that a rounded vector is too long and rounded again (proposition 22)."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """A randomised Hadamard transform: signs drawn at random, then the transform, of a power of two of numbers (D,).

    Everybody knows the signs. A vector of fewer numbers is filled up with zeros.
    """

    signs: np.ndarray

    @classmethod
    def drawn(cls, size: int, rng: Rng) -> Rotation:
        """Draw the signs of so many numbers, a power of two."""
        return cls(1.0 - 2.0 * rng.numpy().integers(0, 2, size))

    def apply(self, vector: np.ndarray) -> np.ndarray:
        """Return a vector `(P,)` rotated, `(D,)`: of the same norm."""
        filled = np.zeros(len(self.signs))
        filled[: len(vector)] = vector
        return hadamard(self.signs * filled)

    def undo(self, rotated: np.ndarray, number: int) -> np.ndarray:
        """Return the first `number` numbers of the vector of which `rotated` `(D,)` was made."""
        return (self.signs * hadamard(rotated))[:number]


def rotated_size(number: int) -> int:
    """Return how many numbers stand for `number` of them when they are rotated: the next power of two."""
    return 1 << (number - 1).bit_length()


def hadamard(vector: np.ndarray) -> np.ndarray:
    """Return the product of Sylvester's Hadamard matrix, over sqrt(D), and a vector `(D,)`, D a power of two.

    In D log2(D) additions; the matrix is symmetric, and its own inverse.
    """
    width = 1
    while width < len(vector):
        pairs = vector.reshape(-1, 2, width)
        vector = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(-1)
        width *= 2
    return np.asarray(vector / math.sqrt(len(vector)))


def rounded_norm(norm: float, number: int) -> float:
    """Return the largest norm that a vector of `number` numbers and at most `norm`, in units, may have when rounded.

    Source: arXiv:2102.06387, theorem 1, its sensitivity, with the unit as 1: whatever is drawn, rounding adds at most
    the square root of the dimension; and at most the other bound but for a probability of `BETA`.
    """
    root = math.sqrt(number)
    square = norm**2 + number / 4 + math.sqrt(2 * math.log(1 / BETA)) * (norm + root / 2)
    return min(norm + root, math.sqrt(square))


def rounded_at_random(vector: np.ndarray, largest: float, generator: np.random.Generator) -> np.ndarray:
    """Return a vector `(D,)` in whole units, int64, each number rounded up with the probability of its fraction.

    Drawn again until its norm is at most `largest`, which `rounded_norm` gives (algorithm 1, conditional rounding).
    """
    low = np.floor(vector)
    fractions = vector - low
    while True:
        units = low + (generator.random(len(vector)) < fractions)
        if np.linalg.norm(units) <= largest:
            return units.astype(np.int64)
