"""Evaluate adapters in shares: each process of a run takes some of the batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flora.clip.prediction import Prediction
from flora.clip.towers.towers import AdaptedClip
from flora.core.processes import Message, Processes
from flora.core.records import Evaluation
from flora.core.tree import StateLike
from flora.evaluation.accuracy import evaluate
from flora.features.features import Features

ARRAYS = ("correct", "losses", "predicted")


def evaluate_in_shares(
    processes: Processes,
    model: AdaptedClip,
    adapters: StateLike | None,
    features: Features,
    *,
    batch_size: int,
    prediction: Prediction,
) -> list[Evaluation]:
    """Return what `evaluate` does, in all processes, each of which computes some of the same batches."""
    if processes.size == 1:
        return evaluate(model, adapters, features, batch_size=batch_size, prediction=prediction)
    batches = range(0, len(features), batch_size)
    own = np.array_split(batches, processes.size)[processes.rank]
    found: list[Evaluation] = []
    if len(own):
        part = features.subset(np.arange(own[0], min(own[-1] + batch_size, len(features))))
        found = evaluate(model, adapters, part, batch_size=batch_size, prediction=prediction)
    everyone = processes.exchange(_message(found, with_classes=processes.is_first))
    tensors = [message.tensors for message in everyone if message.tensors]
    classes = tensors[0]["class_features"].numpy()
    columns = [torch.cat([each[name] for each in tensors], dim=1).numpy() for name in ARRAYS]
    return [Evaluation(*each) for each in zip(*columns, classes, strict=True)]


def _message(evaluations: Sequence[Evaluation], *, with_classes: bool) -> Message:
    """Evaluations of one share, `(K, n)` each; the classes' features are the same in all of them."""
    if not evaluations:
        return Message()
    names = (*ARRAYS, "class_features") if with_classes else ARRAYS
    stacks = {name: np.stack([getattr(each, name) for each in evaluations]) for name in names}
    return Message(None, {name: torch.from_numpy(stack) for name, stack in stacks.items()})
