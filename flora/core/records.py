"""What is written down of a run: rejected updates, evaluations, the record of a round, the summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rejection:
    """A client whose update was left out of a round: why, and at which of its steps it failed, if that is known."""

    client: int
    step: int | None
    reason: str


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Results of one adapter on a set of examples, all `(N,)`, or of K adapters on it one after the other, `(K * N,)`.

    `predicted` are classes, `correct` says which of them are right, `losses` are cross-entropies in double precision.
    `confidences` are the probabilities of what was predicted, in double precision, `label_ranks` how many classes are
    more probable than the right one. `class_features` `(C, embed_dim)`, of several adapters `(K, C, embed_dim)`, are
    what images were compared with. `probabilities` `(N, C)` are those of all classes, in double precision, if they
    were asked for.
    """

    correct: np.ndarray
    losses: np.ndarray
    predicted: np.ndarray
    confidences: np.ndarray
    label_ranks: np.ndarray
    class_features: np.ndarray
    probabilities: np.ndarray | None = None

    @property
    def accuracy(self) -> float:
        """The fraction that is right; NaN without examples."""
        return float(self.correct.mean()) if len(self.correct) else float("nan")

    @property
    def loss(self) -> float:
        """The mean loss; NaN without examples."""
        return float(self.losses.mean()) if len(self.losses) else float("nan")


class _ByName:
    """Lets what is in a mapping be read as attributes."""

    _mapping: str

    def __getattr__(self, name: str) -> Any:
        mapping = self.__dict__.get(self._mapping, {})
        if name in mapping:
            return mapping[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {', '.join(mapping)}")


@dataclass(frozen=True)
class RoundRecord(_ByName):
    """One line of `rounds.jsonl`: the metrics of a round, by name, which are attributes too (`record.accuracy`).

    Round 0 is zero-shot, and has neither training nor traffic. `cohort` are the ids of the clients whose updates came,
    those in `rejected_clients` included; None in a record of a version that did not say.
    """

    _mapping = "metrics"

    round: int
    metrics: Mapping[str, Any]
    cohort: tuple[int, ...] | None = None
    rejected_clients: tuple[Rejection, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return {
            "round": self.round,
            **self.metrics,
            "rejected_clients": [asdict(each) for each in self.rejected_clients],
            "cohort": None if self.cohort is None else list(self.cohort),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RoundRecord:
        """The inverse of `to_dict`."""
        metrics = {key: value for key, value in fields.items() if key not in ("round", "rejected_clients", "cohort")}
        rejected = tuple(Rejection(**each) for each in fields["rejected_clients"])
        cohort = fields.get("cohort")
        return cls(fields["round"], metrics, None if cohort is None else tuple(cohort), rejected)


@dataclass(frozen=True)
class Summary(_ByName):
    """`summary.json`: the figures of a whole run by name, which are attributes too (`summary.last_accuracy`).

    The result is the LAST round; the best round is chosen on the test set and only shown.
    """

    _mapping = "figures"

    figures: Mapping[str, Any]
