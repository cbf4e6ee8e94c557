"""How well an attack tells members from others: its ROC curve; and the scores of the likelihood ratio attack.

A score says how sure an attack is that something was part of the training; the larger, the surer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flora.core.rng import Rng
from flora.privacy.binomial import Interval, clopper_pearson

CONFIDENCE = 0.95
# Draws of the bootstrap, and how many numbers are drawn at once.
DRAWS = 1000
NUMBERS_AT_ONCE = 2_000_000
# False-positive rates at which attacks are compared; each needs as many others as it takes to tell it from 0.
FALSE_POSITIVE_RATES = (0.01, 0.001)


@dataclass(frozen=True)
class Success:
    """How well an attack does: the area under its ROC curve, and its true-positive rate at small false-positive rates.

    0.5 is chance, 1 is certainty. `tpr` has a rate and its interval for each false-positive rate that the number of
    others can tell from 0. Intervals have 95 % confidence: the area's is of a bootstrap, the rates' are Clopper and
    Pearson's for the threshold that was chosen.
    """

    auc: float
    interval: Interval
    tpr: dict[float, tuple[float, Interval]]
    num_members: int
    num_others: int

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON types."""
        rates = {f"{rate:g}": {"tpr": tpr, "interval": list(interval)} for rate, (tpr, interval) in self.tpr.items()}
        return {
            "auc": self.auc,
            "interval": list(self.interval),
            "tpr_at_fpr": rates,
            "num_members": self.num_members,
            "num_others": self.num_others,
        }


def success(members: np.ndarray, others: np.ndarray, rng: Rng) -> Success | None:
    """Return how well scores tell `members` `(P,)` from `others` `(N,)`; None if there is nobody on one side."""
    if not len(members) or not len(others):
        return None
    tpr = {}
    for rate in FALSE_POSITIVE_RATES:
        if len(others) * rate >= 1:
            share = true_positive_rate(members, others, rate)
            tpr[rate] = share, clopper_pearson(round(share * len(members)), len(members), CONFIDENCE)
    return Success(
        auc(members, others),
        _bootstrap(*_counts(members, others), rng),
        tpr,
        len(members),
        len(others),
    )


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """Return the area under the ROC curve of scores of `members` `(P,)` and `others` `(N,)`: ties count half."""
    positive, negative = _counts(members, others)
    return float(_areas(positive[None], negative[None])[0])


def true_positive_rate(members: np.ndarray, others: np.ndarray, false_positive_rate: float) -> float:
    """Return the highest share of `members` `(P,)` at a threshold that at most that share of `others` `(N,)` reach."""
    positive, negative = _counts(members, others)
    return float(_rates(positive[None], negative[None], false_positive_rate)[0])


def advantage(member_losses: np.ndarray, other_losses: np.ndarray) -> float:
    """Return how much likelier one of `(P,)` members than of `(N,)` others has a loss of at most the members' mean.

    Source: arXiv:1709.01604, adversary 2 and definition 4, with the mean training loss as its threshold.
    """
    threshold = member_losses.mean()
    return float((member_losses <= threshold).mean() - (other_losses <= threshold).mean())


def _counts(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many members and how many others have each score that there is, the highest first: `(S,)` twice."""
    _, places = np.unique(-np.concatenate([members, others]), return_inverse=True)
    places = places.reshape(-1)
    number = int(places.max()) + 1
    return np.bincount(places[: len(members)], minlength=number), np.bincount(places[len(members) :], minlength=number)


def _areas(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """The areas under ROC curves of counts `(D, S)`, the highest score first: `(D,)`."""
    below = negative.sum(axis=1, keepdims=True) - negative.cumsum(axis=1)
    won = (positive * (below + negative / 2)).sum(axis=1)
    return np.asarray(won / (positive.sum(axis=1) * negative.sum(axis=1)))


def _rates(positive: np.ndarray, negative: np.ndarray, false_positive_rate: float) -> np.ndarray:
    """The true-positive rates of counts `(D, S)` at the lowest threshold that is strict enough: `(D,)`."""
    false = negative.cumsum(axis=1) <= false_positive_rate * negative.sum(axis=1, keepdims=True)
    return np.asarray((positive * false).sum(axis=1) / positive.sum(axis=1))


def _bootstrap(positive: np.ndarray, negative: np.ndarray, rng: Rng) -> Interval:
    """The interval of the area when members and others are drawn anew, each with replacement.

    All there is where one side has a single score: how that would vary nobody knows.
    """
    if min(positive.sum(), negative.sum()) < 2:
        return Interval(0.0, 1.0)
    generator, areas = rng.numpy(), []
    at_once = max(1, NUMBERS_AT_ONCE // len(positive))
    for start in range(0, DRAWS, at_once):
        number = min(at_once, DRAWS - start)
        drawn = [generator.multinomial(each.sum(), each / each.sum(), number) for each in (positive, negative)]
        areas.append(_areas(*drawn))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(areas), [tail, 1 - tail])
    return Interval(float(low), float(high))


def likelihood_ratios(observed: np.ndarray, references: np.ndarray, was_in: np.ndarray) -> np.ndarray:
    """Return the online scores of the likelihood ratio attack, `(N,)`: log N(observed; in) - log N(observed; out).

    `observed` `(N,)` are the audited adapter's logit-scaled confidences of the examples' labels, `references` `(R, N)`
    those of reference adapters, and `was_in` `(R, N)` says which of them trained on which example. Both normal
    distributions have a mean for each example and one variance for all examples, as arXiv:2112.03570 (section VI-B)
    has it for few references. An example needs a reference on each side.
    """
    inside, outside = _fitted(references, was_in), _fitted(references, ~was_in)

    def log_density(mean: np.ndarray, deviation: float) -> np.ndarray:
        return np.asarray(-(((observed - mean) / deviation) ** 2) / 2 - np.log(deviation))

    return log_density(*inside) - log_density(*outside)


def offline_scores(observed: np.ndarray, references: np.ndarray, was_in: np.ndarray) -> np.ndarray:
    """Return the offline scores, `(N,)`: by how many deviations an example exceeds what adapters without it give it.

    That orders examples as 1 - P[Z > observed] of arXiv:2112.03570 (equation 4) does; the references are as for
    `likelihood_ratios`, and those that trained on an example are not used for it.
    """
    mean, deviation = _fitted(references, ~was_in)
    return np.asarray((observed - mean) / deviation)


def _fitted(references: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean of the `chosen` references for each example, and one deviation for all examples."""
    number = chosen.sum(axis=0)
    mean = (references * chosen).sum(axis=0) / number
    freedom = (number - 1).clip(0).sum()
    squares = (((references - mean) * chosen) ** 2).sum()
    # With one reference for each example nothing is known of how they vary.
    variance = squares / freedom if freedom and squares > 0 else 1.0
    return mean, float(np.sqrt(variance))
