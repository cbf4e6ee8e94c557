"""Differential privacy by noise that clients share: none of them has all of it, and the server sees the noisy sum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flora.core import tree
from flora.core.errors import UserError
from flora.core.registry import option, register
from flora.core.tree import State, StateLike
from flora.privacy.accounting import Attendance, spent_epsilon
from flora.privacy.discrete import MOST_DEVIATION
from flora.privacy.fixed_point import FixedPoint, NoisyFormat, Terms
from flora.privacy.mechanisms import FixedNorm, Streams
from flora.privacy.rotation import rotated_size, rounded_norm

LEAST_DEVIATION = 16
"""In units. What a sum of discrete Gaussians differs from one by, tau of theorem 1, is then below 1e-1000."""
ROOM = 10
"""Standard deviations of a client's noise for which the ring has room; what is beyond, one number in 1e23, may wrap
around, which reveals nothing more."""
ROOM_OF_SUM = 6
"""Standard deviations of a number of a rotated sum for which the ring has room: one number in 5e8 is beyond."""
MOST_OF_ROUNDING = 2.0
"""How many times as long rounding may make an update, and so how many times as large the noise."""
ENCODINGS = ("truncated", "rotated")


@register("distributed_discrete_gaussian")
@dataclass(frozen=True)
class DistributedDiscreteGaussian(FixedNorm):
    """Each client adds its share of discrete Gaussian noise to the words of a secure sum (arXiv:2102.06387).

    Against the server, too: it sees the noisy sum alone. The shares of as many clients as `server.secure_sum` needs at
    least come to `noise_multiplier`, so that those of the clients in a sum never come to less. Epsilon is by theorem 1,
    epsilon = D / (sqrt(n) s) + tau sqrt(d) for epsilon^2 / 2 concentrated differential privacy: with shares s of 16
    units and more its tau is nothing, and a round is 1 / (2 noise_multiplier^2), added up over rounds; nothing is
    gained by sampling. Neighbours differ in one client's update being zero: it adds its noise all the same.

    `encoding: rotated` is the paper's: a randomised Hadamard transform, then rounding at random on condition that the
    norm grows no larger than theorem 1 says; D is that norm, and the noise is as many times larger. Differs from the
    paper: units are powers of two, and the ring has room for 6 deviations of a sum, where the authors' code takes 4.
    `truncated` differs more: numbers are rounded toward zero, which makes no norm larger, and are not rotated. That
    pulls each toward zero by up to a unit, which is nothing in 32 bits and everything in 16.
    """

    noises_in_sum: ClassVar[bool] = True

    accountant: str = option("how epsilon is computed: by Renyi divergences", "rdp", choices=("rdp",))
    encoding: str = option(
        "how numbers become whole ones: rounded toward zero (truncated), or rotated at random and then rounded at "
        "random (rotated), which does with fewer bits",
        "truncated",
        choices=ENCODINGS,
    )

    def epsilon(self, noise_multiplier: float, num_rounds: int, attendance: Attendance) -> float:
        # Concentrated differential privacy bounds the divergences by those of continuous Gaussian noise.
        return spent_epsilon(noise_multiplier, attendance.most(num_rounds), None, self.delta, self.accountant)

    def on_sum(self, like: StateLike, deviation: float, round: int, streams: Streams) -> State:
        return tree.scale({name: tensor.double() for name, tensor in like.items()}, 0.0)

    def num_sent(self, num_numbers: int) -> int:
        return rotated_size(num_numbers) if self.encoding == "rotated" else num_numbers

    def format_of(self, bits: int, limit: float, noise_multiplier: float, terms: Terms) -> NoisyFormat:
        assert isinstance(self.clip_norm, float | int)
        if self.encoding == "rotated":
            return rotated_format(bits, float(self.clip_norm), noise_multiplier, terms)
        share = noise_multiplier * self.clip_norm / math.sqrt(terms.num_least)
        fmt = noisy_format(bits, limit, terms.num_asked, share)
        typical = self.clip_norm / math.sqrt(terms.num_numbers) / fmt.numbers.unit
        if typical < 1:
            raise UserError(
                f"server.secure_sum.bits: in {bits} bits the numbers of an update are {typical:.2g} units in the mean, "
                "which truncated is nothing: more bits are needed, or privacy.encoding=rotated"
            )
        return fmt


def noisy_format(bits: int, limit: float, num_clients: int, deviation: float) -> NoisyFormat:
    """Return the finest numbers for a sum over `num_clients`, each within `limit` and with noise of this deviation.

    Raises `UserError` if the ring has no room for noise of 16 units.
    """
    fitting = FixedPoint.for_sum(bits, limit + ROOM * deviation, num_clients)
    fraction_bits = min(fitting.fraction_bits, math.floor(math.log2((MOST_DEVIATION - 1) / deviation)))
    units = math.ldexp(deviation, fraction_bits)
    if units < LEAST_DEVIATION:
        raise UserError(
            f"server.secure_sum.bits: in {bits} bits a client's noise is {units:.3g} units, expected at least "
            f"{LEAST_DEVIATION}: more bits are needed, or more noise"
        )
    return NoisyFormat(FixedPoint(bits, fraction_bits, limit, np.trunc), math.ceil(units**2))


def rotated_format(bits: int, clip_norm: float, noise_multiplier: float, terms: Terms) -> NoisyFormat:
    """Return the finest rotated numbers whose noisy sum stays inside the ring.

    The sum's numbers are taken to vary as those of n rotated vectors of the largest norm c that all point the same way:
    by n c / sqrt(d), and by 1 / 2 and s for each client's rounding and noise (theorem 34, equation 61, flatness 1).
    Raises `UserError` if rounding would make updates more than twice as long, or shares have less than 16 units.
    """
    number, size = terms.num_asked, rotated_size(terms.num_numbers)
    fraction_bits = math.floor(math.log2(2 ** (bits - 1) / clip_norm))
    while True:
        norm = math.ldexp(clip_norm, fraction_bits)
        largest = rounded_norm(norm, size)
        share = noise_multiplier * largest / math.sqrt(terms.num_least)
        if largest > MOST_OF_ROUNDING * norm:
            problem = (
                f"rounding makes updates {largest / norm:.3g} times as long, expected at most {MOST_OF_ROUNDING:g}"
            )
            raise UserError(f"server.secure_sum.bits: in {bits} bits {problem}: more bits are needed, or less noise")
        deviation = math.sqrt((number * norm) ** 2 / size + number * (0.25 + share**2))
        if share < MOST_DEVIATION and ROOM_OF_SUM * deviation < 2 ** (bits - 1):
            break
        fraction_bits -= 1
    if share < LEAST_DEVIATION:
        raise UserError(
            f"server.secure_sum.bits: in {bits} bits a client's noise is {share:.3g} units, expected at least "
            f"{LEAST_DEVIATION}: more bits are needed, or more noise"
        )
    return NoisyFormat(FixedPoint(bits, fraction_bits, math.inf), math.ceil(share**2), largest)
