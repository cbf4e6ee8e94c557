"""What noise guarantees: epsilon of Gaussian mechanisms at a given delta, by dp-accounting (extra `[privacy]`).

Two data sets are neighbours if one has everything that the other has, and one record more: a client where clients are
protected, an example where examples are. `noise_multiplier` is the noise's standard deviation over the largest norm
that one record adds to a sum. All bounds are upper ones.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flora.core.errors import UserError

ACCOUNTANTS = ("pld", "rdp")
"""Privacy loss distributions, which are nearly exact, and Renyi divergences, which are looser and quick."""

PRECISION = 1e-3
"""By how much, in relative terms, a noise multiplier that was searched may lie above the smallest that does."""

MAX_MULTIPLIER = 1e6


def require_accounting() -> None:
    """Raise `UserError` naming the extra if the library that does the accounting is missing."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise UserError("privacy: dp-accounting is not installed; pip install 'flora-clip[privacy]'")


@functools.lru_cache(maxsize=4096)
def spent_epsilon(
    noise_multiplier: float, num_rounds: int, sampling_fraction: float | None, delta: float, accountant: str = "pld"
) -> float:
    """Return the epsilon at `delta` of `num_rounds` sums with Gaussian noise, each over a Poisson sample.

    `sampling_fraction` is the probability with which a record takes part in a sum, independently of all others; None
    where records are not sampled that way, and nothing is gained by it. Infinite without noise.

    Sources: sampled Gaussian arXiv:1908.10530 (Renyi) and arXiv:2106.02848 (privacy loss distributions), with the
    neighbours' worse direction; without sampling arXiv:1805.06530, theorem 8, which is exact.
    """
    require_accounting()
    if num_rounds == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    fraction = 1.0 if sampling_fraction is None else min(float(sampling_fraction), 1.0)
    if accountant == "rdp":
        return _renyi_epsilon(noise_multiplier, num_rounds, fraction, delta)
    if fraction == 1.0:
        # Sums with the same noise reveal as much as one with less of it.
        return _gaussian_epsilon(noise_multiplier / math.sqrt(num_rounds), delta)
    composed: Any = _sampled_release(noise_multiplier, fraction, _grid(noise_multiplier, num_rounds)).self_compose(
        num_rounds
    )
    return float(composed.get_epsilon_for_delta(delta))


def smallest_multiplier(spent: Callable[[float], float], target_epsilon: float) -> float:
    """Return the smallest noise multiplier, to `PRECISION`, of which `spent` says at most `target_epsilon`.

    Raises `UserError` if none below a million does.
    """

    def suffices(multiplier: float) -> bool:
        return spent(multiplier) <= target_epsilon

    high = 1.0
    while not suffices(high):
        high *= 2
        if high > MAX_MULTIPLIER:
            raise UserError(
                f"privacy: no noise multiplier below {MAX_MULTIPLIER:,.0f} gives epsilon {target_epsilon:g}"
            )
    low = high / 2
    while low > PRECISION and suffices(low):
        high, low = low, low / 2
    while high / low > 1 + PRECISION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Attendance:
    """How often a client can take part, whatever is drawn.

    `fraction` is the probability with which each takes part in a round, independently of all others (a Poisson sample);
    None where cohorts are chosen in another way. `turn`: the cohort's size and the number of clients, where all take
    part in turn; None: any client may take part in every round.
    """

    fraction: float | None = None
    turn: tuple[int, int] | None = None

    def most(self, num_rounds: int) -> int:
        """Return in how many of the first rounds a client takes part at most."""
        if self.turn is None:
            return num_rounds
        cohort, number = self.turn
        return min(-(-num_rounds * cohort // number), num_rounds)

    @property
    def separation(self) -> int:
        """How many rounds lie between the starts of two rounds of the same client, at least."""
        return 1 if self.turn is None else max(self.turn[1] // self.turn[0], 1)


def tree_sensitivity(num_rounds: int, restart_every: int | None, num_participations: int, separation: int) -> float:
    """Return the norm of what one client adds to all nodes of the trees over `num_rounds` rounds, in clip norms.

    A new tree begins every `restart_every` rounds (None: never). A client takes part in at most `num_participations`
    of the rounds, any two of them `separation` or more apart. A node that stands for m rounds has then at most
    c = ceil(m / separation) of them, so the squares over the nodes of one size sum up to at most those of as many nodes
    with c each, and one with the rest. Exact for one participation (arXiv:2103.00039, appendix D), else a bound.
    """
    largest = num_rounds if restart_every is None else min(restart_every, num_rounds)
    squares, size = 0, 1
    taken = min(num_participations, -(-num_rounds // separation))
    while size <= largest and taken:
        most = min(taken, -(-size // separation))
        nodes, rest = divmod(taken, most)
        squares += nodes * most**2 + rest**2
        size *= 2
    return math.sqrt(squares)


def _gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(noise_multiplier, delta))


def _renyi_epsilon(noise_multiplier: float, num_rounds: int, fraction: float, delta: float) -> float:
    from dp_accounting.rdp import compute_epsilon

    orders, divergences = _renyi_divergences(noise_multiplier, fraction)
    return float(compute_epsilon(orders, num_rounds * divergences, delta)[0])


@functools.lru_cache(maxsize=256)
def _renyi_divergences(noise_multiplier: float, fraction: float) -> tuple[Any, Any]:
    """Orders, and the Renyi divergences at these of one sum over a Poisson sample."""
    from absl import logging as absl_logging
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    event = GaussianDpEvent(noise_multiplier)
    # It warns of orders that it can't compute and leaves out, which makes the bound looser and no less a bound.
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        accountant = RdpAccountant().compose(event if fraction == 1 else PoissonSampledDpEvent(fraction, event))
        return accountant.orders, accountant.rdp
    finally:
        absl_logging.set_verbosity(verbosity)


def _grid(noise_multiplier: float, num_rounds: int) -> float:
    """Return how far apart the losses lie that a distribution is computed at.

    Its error grows with the number of rounds and the square of this, and is always upwards: less than 1 in 500 of
    epsilon as it is chosen here, mostly 1 in 100,000. Steps of 4 times the rounds let rounds share a distribution.
    """
    steps = 4 ** max(0, math.ceil(math.log(num_rounds / 100, 4)))
    return 1e-3 / math.sqrt(steps) * max(1.0, (0.5 / noise_multiplier) ** 2)


@functools.lru_cache(maxsize=16)
def _sampled_release(noise_multiplier: float, fraction: float, interval: float) -> Any:
    """The privacy loss distribution of one sum over a Poisson sample, at losses `interval` apart."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(noise_multiplier, sampling_prob=fraction, value_discretization_interval=interval)
