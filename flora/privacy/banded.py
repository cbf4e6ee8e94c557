"""Noise of which each round takes back a part of that of the rounds before, so that their sum stays small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flora.core import tree
from flora.core.registry import option, register
from flora.core.tree import State, StateLike
from flora.privacy.accounting import Attendance, spent_epsilon
from flora.privacy.bounds import gaussian
from flora.privacy.mechanisms import FixedNorm, Streams


@register("banded")
@dataclass(frozen=True, kw_only=True)
class Banded(FixedNorm):
    """Rounds' noise is correlated by a banded matrix (BandMF, arXiv:2306.08153), a square root (arXiv:2405.13763).

    For cohorts that are not sampled. The sums of all rounds so far are A x, with A the lower triangular matrix of ones
    and x the rounds' sums. With A = B C, what is released is B (C x + z), where z is independent Gaussian noise: round
    t gets the noise (C^-1 z)_t. C is the square root of A without all but its first `bands` diagonals. Every client's
    rounds together are one release of C x (arXiv:2202.08312, for updates that depend on what was released before):
    epsilon is that of one Gaussian whose sensitivity is `sensitivity`, for the rounds in which a client can take part,
    and their distance, which `in_turn` bounds; nothing is gained by sampling.

    Round t's noise is drawn again from the streams of the rounds up to it, so that nothing has to be stored: t vectors
    in round t. Differs from arXiv:2306.08153: C is not optimised, its columns are not of one length, and the last
    bands - 1 noise vectors are not kept (algorithm 9); there is no amplification.
    """

    same_tensors: ClassVar[bool] = True

    bands: int = option(
        "diagonals of the matrix: how many rounds share noise, best as many as lie between two rounds of a client; 1: "
        "each round has noise of its own",
        at_least=1,
    )

    def epsilon(self, noise_multiplier: float, num_rounds: int, attendance: Attendance) -> float:
        taken = attendance.most(num_rounds)
        largest = sensitivity(square_root(self.bands, num_rounds), taken, attendance.separation)
        if not largest:
            return 0.0
        return spent_epsilon(noise_multiplier / largest, 1, None, self.delta, self.accountant)

    def on_sum(self, like: StateLike, deviation: float, round: int, streams: Streams) -> State:
        first, *others = inverse(square_root(self.bands, round)).tolist()
        noise = gaussian(like, first * deviation, streams(round))
        for back, weight in enumerate(others, start=1):
            if weight:
                noise = tree.add(noise, gaussian(like, deviation, streams(round - back)), weight)
        return noise


def square_root(bands: int, number: int) -> np.ndarray:
    """Return the first column of C for `number` rounds, `(number,)`: zeros from `bands` on.

    C is constant along its diagonals, and before they are cut C C is the lower triangular matrix of ones:
    c_0 = 1, c_k = c_(k-1) (2 k - 1) / (2 k). Source: arXiv:2405.13763, theorem 1 without momentum and decay.
    """
    later = np.arange(1, number)
    column = np.cumprod(np.concatenate([np.ones(min(number, 1)), (2 * later - 1) / (2 * later)]))
    column[bands:] = 0.0
    return column


def inverse(column: np.ndarray) -> np.ndarray:
    """Return the first column of C^-1, `(number,)`, given that of C, a lower triangular Toeplitz matrix of diagonal 1.

    C^-1 is one of these, too; its column is what the recursion z_t - sum over k of c_k x_(t - k) makes of 1, 0, 0, ...
    """
    first_column = np.zeros(len(column))
    first_column[:1] = 1.0
    bands = int(np.count_nonzero(column))
    for place in range(1, len(column)):
        reach = min(place, bands - 1)
        first_column[place] = -column[1 : reach + 1] @ first_column[place - reach : place][::-1]
    return first_column


def sensitivity(column: np.ndarray, num_participations: int, separation: int) -> float:
    """Return the largest norm, in clip norms, of what one client adds to C x over all rounds, from C's first `column`.

    A client takes part in at most `num_participations` of the rounds, any two of them `separation` or more apart. The
    first column of C has no negative numbers and never rises, so the worst is as often as possible from the first round
    on, and always the same update: the norm of the sum of these columns (arXiv:2405.13763, theorem 2). With no more
    bands than `separation` the columns don't overlap: at most sqrt(num_participations) times the norm of the first.
    """
    total = np.zeros(len(column))
    for start in range(0, len(column), separation)[:num_participations]:
        total[start:] += column[: len(column) - start]
    return float(np.linalg.norm(total))
