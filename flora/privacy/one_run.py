"""A lower bound on epsilon from one run in which fair coins decided what was trained on (arXiv:2305.08846)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flora.privacy.binomial import crossing, probabilities

# Shares of the canaries of which the attack says whether they were in; of the others it says nothing.
GUESSED_SHARES = (1.0, 0.5, 0.25, 0.125)
# A bound above this is never stated: e^50 is beyond what any number of canaries could show.
MAX_EPSILON = 50.0


@dataclass(frozen=True)
class Guesses:
    """Of how many canaries an attack guesses whether they were in, and how often it is right."""

    num_canaries: int
    num_guesses: int
    num_right: int


@dataclass(frozen=True)
class LowerBound:
    """What guesses say of a mechanism: with `confidence` it is not (epsilon, delta)-DP for any smaller epsilon."""

    epsilon: float
    delta: float
    confidence: float
    guesses: Guesses


def guesses(scores: np.ndarray, was_in: np.ndarray, number: int) -> Guesses:
    """Guess that the `number` / 2 canaries of the highest scores were in, and as many of the lowest were not.

    `scores` and `was_in` are `(m,)`, in an order that the coins have no part in.
    """
    order, half = np.argsort(scores, kind="stable"), number // 2
    right = was_in[order[len(order) - half :]].sum() + (~was_in[order[:half]]).sum()
    return Guesses(len(scores), 2 * half, int(right))


def p_value(made: Guesses, epsilon: float, delta: float) -> float:
    """Return a bound on the probability that so many guesses are right if the mechanism is (epsilon, delta)-DP.

    With r guesses of m canaries, v of them right, and W ~ Binomial(r, e^epsilon / (1 + e^epsilon)), it is
    P[W >= v] + 2 m delta max over i = 1 ... v of P[v - i <= W < v] / i. Source: arXiv:2305.08846, theorem 5.2 and
    corollary 5.4: the number of right guesses is dominated by W, but for what delta adds.
    """
    distribution = probabilities(made.num_guesses, 1 / (1 + math.exp(-epsilon)))
    right = made.num_right
    tail = float(distribution[right:].sum())
    if not right or not delta:
        return min(tail, 1.0)
    below = distribution[:right][::-1].cumsum() / np.arange(1, right + 1)
    return min(tail + 2 * made.num_canaries * delta * float(below.max()), 1.0)


def epsilon_lower_bound(made: Guesses, delta: float, confidence: float) -> float:
    """Return the largest epsilon that the guesses refute with this confidence; 0 if they refute none."""
    level = 1 - confidence
    if p_value(made, 0.0, delta) >= level:
        return 0.0
    if p_value(made, MAX_EPSILON, delta) < level:
        return MAX_EPSILON
    return crossing(lambda epsilon: p_value(made, epsilon, delta), level, 0.0, MAX_EPSILON).low


def lower_bound(scores: np.ndarray, was_in: np.ndarray, *, delta: float, confidence: float = 0.95) -> LowerBound:
    """Return the best bound over some numbers of guesses, from scores `(N,)` and who `was_in` `(N,)`, bool.

    Each of them may be wrong with an equal part of 1 - `confidence`, so the best one is wrong with at most that.
    """
    numbers = sorted({max(2, 2 * round(share * len(scores) / 2)) for share in GUESSED_SHARES if len(scores) > 1})
    numbers = [number for number in numbers if number <= len(scores)]
    if not numbers:
        return LowerBound(0.0, delta, confidence, Guesses(len(scores), 0, 0))
    each = 1 - (1 - confidence) / len(numbers)
    made = [guesses(scores, was_in, number) for number in numbers]
    bounds = [epsilon_lower_bound(one, delta, each) for one in made]
    best = int(np.argmax(bounds))
    return LowerBound(bounds[best], delta, confidence, made[best])
