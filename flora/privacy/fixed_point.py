"""Fixed-point numbers in the ring Z_{2^bits}, whose sum over a number of clients can't overflow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flora.core.errors import UserError

Words = np.ndarray
"""Whole numbers modulo 2^bits, of the smallest unsigned type that holds them: sums of that type wrap around exactly."""


@dataclass(frozen=True)
class Ring:
    """Z_{2^bits}, of which each client sends `num_words`."""

    bits: int
    num_words: int

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest type that holds a word, in the order of bytes in which it travels."""
        return np.dtype(next(f"<u{size}" for size in (2, 4, 8) if self.bits <= 8 * size))

    @property
    def payload_bytes(self) -> int:
        """The length of a client's packed words."""
        return -(-self.num_words * self.bits // 8)

    def reduced(self, words: np.ndarray) -> Words:
        """Return whole numbers of any type and shape modulo 2^bits."""
        return words.astype(self.dtype) & self.dtype.type(2**self.bits - 1)

    def pack(self, words: Words) -> bytes:
        """Return words as they travel, `bits` bits each, the last byte filled up."""
        if self.bits == 8 * self.dtype.itemsize:
            return words.tobytes()
        every = np.unpackbits(words[:, None].view(np.uint8), axis=1, bitorder="little")
        return np.packbits(every[:, : self.bits], bitorder="little").tobytes()

    def unpack(self, packed: bytes) -> Words:
        """Return the words that `pack` wrote."""
        if self.bits == 8 * self.dtype.itemsize:
            return np.frombuffer(packed, dtype=self.dtype)
        flat = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little", count=self.num_words * self.bits)
        every = np.zeros((self.num_words, 8 * self.dtype.itemsize), dtype=np.uint8)
        every[:, : self.bits] = flat.reshape(self.num_words, self.bits)
        return np.packbits(every, axis=1, bitorder="little").view(self.dtype)[:, 0]


@dataclass(frozen=True)
class FixedPoint:
    """Numbers from -`limit` to `limit` as words of `bits` bits, the unit being 2^-`fraction_bits`.

    `rounding` is NumPy's function that makes whole numbers: `rint` (to the nearest) or `trunc` (toward zero), never
    beyond the limit. `for_sum` chooses the smallest unit with which a sum of so many words stays inside the ring.
    """

    bits: int
    fraction_bits: int
    limit: float
    rounding: np.ufunc = np.rint

    @classmethod
    def for_sum(cls, bits: int, limit: float, count: int) -> FixedPoint:
        """Return the finest numbers of which `count` can be added up. Raises `UserError` if there are none.

        Each is at most (2^(bits - 1) - 1) / count units, rounded ones included, because that is a whole number.
        """
        most = (2 ** (bits - 1) - 1) // count
        if most == 0:
            raise UserError(f"server.secure_sum.bits: {bits} bits can't hold the sum of {count:,} clients")
        fraction_bits = math.floor(math.log2(most) - math.log2(limit)) + 2
        while math.ldexp(limit, fraction_bits) > most:
            fraction_bits -= 1
        return cls(bits, fraction_bits, limit)

    @property
    def unit(self) -> float:
        """What the lowest bit stands for: rounded to the nearest, a number is off by at most half of it."""
        return math.ldexp(1.0, -self.fraction_bits)

    def encode(self, numbers: np.ndarray) -> Words:
        """Return float64 numbers `(P,)` as words `(P,)`, in whole units."""
        within = np.clip(numbers, -self.limit, self.limit)
        units = self.rounding(np.ldexp(within, self.fraction_bits)).astype(np.int64)
        return Ring(self.bits, len(units)).reduced(units)

    def decode(self, words: Words) -> np.ndarray:
        """Return the float64 numbers `(P,)` that words `(P,)` stand for, the ring's upper half below zero."""
        unused = 64 - self.bits  # shifted up and back, so that the highest bit becomes the sign
        signed = (words.astype(np.uint64) << np.uint64(unused)).view(np.int64) >> np.int64(unused)
        return np.ldexp(signed.astype(np.float64), -self.fraction_bits)


@dataclass(frozen=True)
class Terms:
    """The size of a secure sum: `num_numbers` of each of `num_asked` clients, of whom `num_least` stay at least."""

    num_asked: int
    num_least: int
    num_numbers: int


@dataclass(frozen=True)
class NoisyFormat:
    """How numbers are written to which a share of noise is added, and the share's variance in squared units.

    Rotated numbers have a norm of at most `largest` units when they are rounded; None where they are truncated.
    """

    numbers: FixedPoint
    variance: int
    largest: float | None = None
