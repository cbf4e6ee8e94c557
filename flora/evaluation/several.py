"""Evaluations of several adapters on the same examples, as one evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flora.core.records import Evaluation
from flora.evaluation.shares import COLUMNS


def one_after_the_other(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The evaluations of several adapters on the same examples as one, in which each example is there for each."""
    if len(evaluations) == 1:
        return evaluations[0]
    columns = {name: [getattr(each, name) for each in evaluations] for name in COLUMNS}
    joined: dict[str, Any] = {
        name: None if parts[0] is None else np.concatenate(parts) for name, parts in columns.items()
    }
    return Evaluation(**joined, class_features=np.stack([each.class_features for each in evaluations]))


def of_rows(evaluations: Sequence[Evaluation], rows: np.ndarray) -> Evaluation:
    """One evaluation of N examples, each with the adapter that `rows` `(N,)` names by its place in `evaluations`."""
    if len(evaluations) == 1:
        return evaluations[0]
    columns = {name: [getattr(each, name) for each in evaluations] for name in COLUMNS}
    picked: dict[str, Any] = {
        name: None if parts[0] is None else np.stack(parts)[rows, np.arange(len(rows))]
        for name, parts in columns.items()
    }
    return Evaluation(**picked, class_features=np.stack([each.class_features for each in evaluations]))


def for_each_adapter(values: np.ndarray, evaluation: Evaluation) -> np.ndarray:
    """Repeat values of N examples `(N,)` for each of the K adapters of an evaluation: `(K * N,)`."""
    return np.tile(values, max(len(evaluation.correct) // max(len(values), 1), 1))
