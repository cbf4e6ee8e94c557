"""Shamir's secret shares (1979) over a prime field: any `threshold` of them give the secret, fewer say nothing of it.

A secret is a row of m numbers of the field, each shared by a polynomial of its own, so that a share is a row of m, too.
Products of matrices are in double precision and exact: no sum reaches 2^53.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

PRIME = 65521
"""The largest prime below 2^16, so that a number of the field takes two bytes."""
LIMB_BITS = 15
SECRET_BYTES = 32
NUM_LIMBS = -(-8 * SECRET_BYTES // LIMB_BITS)
MOST_SHARES = PRIME - 1


def limbs_of(secret: bytes) -> np.ndarray:
    """Return a secret of 32 bytes as numbers of the field, of 15 bits each: `(18,)` int64."""
    number = int.from_bytes(secret, "little")
    return np.array([number >> LIMB_BITS * place & 2**LIMB_BITS - 1 for place in range(NUM_LIMBS)], dtype=np.int64)


def secret_of(limbs: np.ndarray) -> bytes:
    """Return the secret that `limbs_of` made numbers of. Raises ValueError for numbers that no secret has."""
    number = sum(int(limb) << LIMB_BITS * place for place, limb in enumerate(limbs.tolist()))
    if limbs.max() >> LIMB_BITS or number >> 8 * SECRET_BYTES:
        raise ValueError("shares that don't belong together")
    return number.to_bytes(SECRET_BYTES, "little")


def shares(secret: np.ndarray, coefficients: np.ndarray, points: Sequence[int], prime: int = PRIME) -> np.ndarray:
    """Return the shares `(n, m)` of a secret `(m,)` at n points, which are not 0.

    `coefficients` `(threshold - 1, m)` are drawn at random from the field: those of x, x^2, ...
    """
    polynomial = np.concatenate([secret[None], coefficients]).astype(np.float64)
    return np.mod(_powers(tuple(points), len(polynomial), prime) @ polynomial, prime).astype(np.int64)


def reconstruct(values: np.ndarray, points: Sequence[int], prime: int = PRIME) -> np.ndarray:
    """Return the secret `(m,)` of which `values` `(threshold, m)` are the shares at as many different points."""
    weights = _weights_at_zero(tuple(points), prime)
    return np.mod(weights @ values.astype(np.float64), prime).astype(np.int64)


@lru_cache(maxsize=16)
def _powers(points: tuple[int, ...], number: int, prime: int) -> np.ndarray:
    """Return `points` to the powers 0 to `number` - 1: `(len(points), number)`."""
    column, columns = np.ones(len(points), dtype=np.int64), []
    for _ in range(number):
        columns.append(column)
        column = column * np.array(points) % prime
    return np.stack(columns, axis=1).astype(np.float64)


@lru_cache(maxsize=1024)
def _weights_at_zero(points: tuple[int, ...], prime: int) -> np.ndarray:
    """Return what each point's value counts at 0 (Lagrange): the product of x_j / (x_j - x_i) over the others j."""
    places = np.array(points, dtype=np.int64)
    above, below = np.ones_like(places), np.ones_like(places)
    for place, point in enumerate(points):
        others = np.arange(len(points)) != place
        above = np.where(others, above * point % prime, above)
        below = np.where(others, below * ((point - places) % prime) % prime, below)
    inverse = np.array([pow(int(each), -1, prime) for each in below], dtype=np.int64)
    return (above * inverse % prime).astype(np.float64)
