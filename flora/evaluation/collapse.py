"""How far apart the classes' text features are: what is lost where all classes come to mean the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def over_adapters(measure: Callable[[np.ndarray], float | None], features: np.ndarray) -> float | None:
    """Measure class features `(C, d)`; of those of K adapters `(K, C, d)` return the mean, None if one is None."""
    if features.ndim == 2:
        return measure(features)
    measures = [each for each in map(measure, features) if each is not None]
    return sum(measures) / len(measures) if len(measures) == len(features) else None


def effective_rank(features: np.ndarray) -> float | None:
    """The effective rank of class features `(C, d)` about their mean: exp of the entropy of the singular values.

    From 1 (all differ along one direction) to min(C - 1, d) (all directions alike); 0 where all are the same, None
    where a number is not finite.
    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007, of unit features from which the mean is taken away.
    """
    if not np.isfinite(features).all():
        return None
    unit = _unit(features)
    values = np.linalg.svd(unit - unit.mean(axis=0), compute_uv=False)
    if values[0] <= len(unit) * np.finfo(np.float32).eps:  # rounding is all that is left
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def mean_cosine(features: np.ndarray) -> float | None:
    """The mean cosine over all pairs of different classes, of features `(C, d)`: 1 where all are the same.

    None where a number is not finite.
    """
    if not np.isfinite(features).all():
        return None
    unit = _unit(features)
    number = len(unit)
    return float((np.square(unit.sum(axis=0)).sum() - number) / (number * (number - 1)))


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.finfo(np.float64).tiny)
