"""The bound of a client's update, fixed or adapted to a quantile of the updates' norms, and the noise on their sum."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from flora.core import tree
from flora.core.registry import Component, OptionError, option, register
from flora.core.rng import Rng
from flora.core.tree import FlatState, Layout, State, StateLike

MAX_EXPONENT = 5.0


@dataclass(frozen=True)
class ClipNorm(Component):
    """How the bound of updates changes from round to round, by a noisy count of those within it."""

    @property
    @abstractmethod
    def first(self) -> float:
        """The bound of round 1."""

    @abstractmethod
    def deviation(self, noise_multiplier: float, expected: float) -> float:
        """Return the standard deviation of the noise on the count, where `expected` clients are expected."""

    @abstractmethod
    def multiplier_of_sum(self, noise_multiplier: float, expected: float) -> float:
        """Return the noise multiplier of the sum, which with the count's spends as much as `noise_multiplier`.

        Raises `OptionError` if the count alone would spend more.
        """

    @abstractmethod
    def after(self, clip_norm: float, num_within: int, num_updates: int, expected: float, noise: float) -> float:
        """Return the next round's bound, where `num_within` of `num_updates` lay within this one; `noise` is drawn."""


@register("adaptive")
@dataclass(frozen=True)
class AdaptiveNorm(ClipNorm):
    """A bound that follows a quantile of the updates' norms, by a noisy count of those below it (arXiv:1905.03871).

    After each round it is multiplied by exp(-learning_rate (share - quantile)), where `share` is the noisy share of the
    expected cohort that lay within it (equation 2, geometric). The count takes a part of the noise multiplier, so that
    count and sum together spend what the accountant is told (theorem 1).
    """

    quantile: float = option("share of the updates that shall lie within the bound", 0.5, at_least=0, at_most=1)
    initial: float = option("the first round's bound", 0.1, above=0)
    learning_rate: float = option("how fast the bound follows", 0.2, above=0)
    count_noise: float | None = option(
        "standard deviation of the count's noise; none: a twentieth of the expected cohort, and at least the noise "
        "multiplier",
        None,
        above=0,
    )

    @property
    def first(self) -> float:
        return self.initial

    def deviation(self, noise_multiplier: float, expected: float) -> float:
        return max(expected / 20, noise_multiplier) if self.count_noise is None else self.count_noise

    def multiplier_of_sum(self, noise_multiplier: float, expected: float) -> float:
        deviation = self.deviation(noise_multiplier, expected)
        if 2 * deviation <= noise_multiplier:
            raise OptionError(
                "privacy.clip_norm.count_noise", f"expected more than half the noise multiplier, {noise_multiplier:.4g}"
            )
        return 1 / math.sqrt(noise_multiplier**-2 - (2 * deviation) ** -2)

    def after(self, clip_norm: float, num_within: int, num_updates: int, expected: float, noise: float) -> float:
        """Return the next round's bound: see `ClipNorm.after`.

        What is released is the sum of 1/2 for each that lay within and -1/2 for each that did not, so that a client
        changes it by 1/2 (section 2.2). Differs from the paper: no round changes the bound by more than e**5, for the
        sake of cohorts of which one client is expected, or fewer.
        """
        share = (num_within - num_updates / 2 + noise) / expected + 0.5
        exponent = -self.learning_rate * (share - self.quantile)
        return clip_norm * math.exp(max(-MAX_EXPONENT, min(MAX_EXPONENT, exponent)))


def bounded(delta: StateLike, clip_norm: float) -> tuple[StateLike, bool]:
    """Return a delta in double precision, scaled down to a norm of `clip_norm` over all its tensors if it is larger.

    Also whether it was within the bound.
    """
    state = tree.flat(delta)
    norm = tree.norm(state)
    factor = 1.0 if norm <= clip_norm else clip_norm / norm
    return FlatState(state.vector.double() * factor, state.layout), norm <= clip_norm


def summed(states: Iterable[StateLike], like: StateLike) -> State:
    """The sum of states with the names and shapes of `like`, in double precision and in their order; maybe of none."""
    layout = Layout.of(like)
    total = torch.zeros(layout.size, dtype=torch.float64)
    for state in states:
        total += tree.flatten(state, layout)
    return tree.unflatten(total, like)


def gaussian(like: StateLike, deviation: float, rng: Rng) -> State:
    """Gaussian noise in the shapes of `like`, in double precision, by a seeded generator: for research alone."""
    vector = torch.randn(tree.count(like), dtype=torch.float64, generator=rng.torch())
    return tree.unflatten(vector * deviation, like)
