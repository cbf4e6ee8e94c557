"""Evaluate adapters in shares: each process of a run takes some of the batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from flora.core.processes import Message, Processes
from flora.core.records import Evaluation
from flora.features.features import Features

# What an evaluation holds of each example.
COLUMNS = ("correct", "losses", "predicted", "confidences", "label_ranks", "probabilities")


def evaluate_in_shares(
    processes: Processes, compute: Callable[[Features], list[Evaluation]], features: Features, *, batch_size: int
) -> list[Evaluation]:
    """Return what `compute` makes of all `features`, in all processes, each of which computes some of the batches."""
    if processes.size == 1:
        return compute(features)
    batches = range(0, len(features), batch_size)
    share = np.array_split(batches, processes.size)[processes.rank]
    evaluations: list[Evaluation] = []
    if len(share):
        part = features.subset(np.arange(share[0], min(share[-1] + batch_size, len(features))))
        evaluations = compute(part)
    everyone = processes.exchange(_message(evaluations, with_classes=processes.is_first))
    tensors = [message.tensors for message in everyone if message.tensors]
    classes = tensors[0]["class_features"].numpy()
    columns = {
        name: torch.cat([each[name] for each in tensors], dim=1).numpy() for name in COLUMNS if name in tensors[0]
    }
    return [
        Evaluation(class_features=own_classes, **{name: column[row] for name, column in columns.items()})
        for row, own_classes in enumerate(classes)
    ]


def _message(evaluations: Sequence[Evaluation], *, with_classes: bool) -> Message:
    """Evaluations of one share, `(K, n)` each; the classes' features are the same in all of them."""
    if not evaluations:
        return Message()
    names = [name for name in COLUMNS if getattr(evaluations[0], name) is not None]
    names += ["class_features"] * with_classes
    stacks = {name: np.stack([getattr(each, name) for each in evaluations]) for name in names}
    return Message(None, {name: torch.from_numpy(stack) for name, stack in stacks.items()})
