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
from flora.privacy.fixed_point import FixedPoint
from flora.privacy.mechanisms import FixedNorm, Streams

LEAST_DEVIATION = 16
"""In units. What a sum of discrete Gaussians differs from one by, tau of theorem 1, is then below 1e-1000."""
ROOM = 10
"""Standard deviations of a client's noise for which the ring has room; what is beyond, one number in 1e23, may wrap
around, which reveals nothing more."""


@register("distributed_discrete_gaussian")
@dataclass(frozen=True)
class DistributedDiscreteGaussian(FixedNorm):
    """Each client adds its share of discrete Gaussian noise to the words of a secure sum (arXiv:2102.06387).

    Against the server, too: it sees the noisy sum alone. The shares of as many clients as `server.secure_sum` needs at
    least come to `noise_multiplier`, so that those of the clients in a sum never come to less. Epsilon is by theorem 1:
    with shares of 16 units and more its tau is nothing, and a round is concentrated differential privacy of
    1 / (2 noise_multiplier^2), added up over rounds; nothing is gained by sampling. Neighbours differ in one client's
    update being zero: it adds its noise all the same. Differs from the paper: numbers are rounded toward zero, which
    makes no norm larger, in place of at random under a condition, and are not rotated: 32 bits have room for them.
    """

    noises_in_sum: ClassVar[bool] = True

    accountant: str = option("how epsilon is computed: by Renyi divergences", "rdp", choices=("rdp",))

    def epsilon(self, noise_multiplier: float, num_rounds: int, attendance: Attendance) -> float:
        # Concentrated differential privacy bounds the divergences by those of continuous Gaussian noise.
        return spent_epsilon(noise_multiplier, attendance.most(num_rounds), None, self.delta, self.accountant)

    def on_sum(self, like: StateLike, deviation: float, round: int, streams: Streams) -> State:
        return tree.scale({name: tensor.double() for name, tensor in like.items()}, 0.0)


@dataclass(frozen=True)
class NoisyFormat:
    """How numbers are written to which a share of noise is added, and the share's variance in squared units."""

    numbers: FixedPoint
    variance: int


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
