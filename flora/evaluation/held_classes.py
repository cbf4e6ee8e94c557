"""Compute clients' accuracies on the classes that they hold, and on those that only others do."""

from __future__ import annotations

import numpy as np
import torch

from flora.clip.prediction import PLAIN, Prediction, bound
from flora.clip.towers.towers import AdaptedClip
from flora.core.tree import StateLike
from flora.engine.losses import logits_in_batches
from flora.features.features import Features


@torch.no_grad()
def accuracies_by_holding(
    model: AdaptedClip,
    adapters: StateLike | None,
    features: Features,
    holds: np.ndarray,
    *,
    batch_size: int,
    prediction: Prediction = PLAIN,
) -> np.ndarray:
    """Accuracy on the examples of the classes that each of K clients holds, and on those of the others, `(K, 2)`.

    `holds` `(K, C)` is True for the classes that a client holds. The examples of either part are told apart among the
    classes of that part, as base and new classes are (arXiv:2203.05557, section 4.1). `adapters` are `(K, ...)`, one
    for each client, or `(1, ...)` for all; None is the frozen model. NaN where a part has no example.
    """
    stack = {name: tensor.to(model.device) for name, tensor in (adapters or {}).items()}
    num_adapters = len(next(iter(stack.values()))) if stack else 1
    with bound(model, stack):
        classes = model.class_features(num_adapters)
    is_held = torch.from_numpy(holds).to(model.device)
    right, number = np.zeros((2, len(holds), 2))
    batches = logits_in_batches(model, stack, classes, features, batch_size=batch_size, prediction=prediction)
    for logits, labels in zip(batches, features.labels.split(batch_size), strict=True):
        targets = labels.to(model.device)
        for place, part in enumerate((is_held, ~is_held)):
            predicted = torch.where(part.unsqueeze(1), logits, -torch.inf).argmax(dim=-1)
            counts = part[:, targets]
            right[:, place] += ((predicted == targets) & counts).sum(dim=1).cpu().numpy()
            number[:, place] += counts.sum(dim=1).cpu().numpy()
    return np.divide(right, number, out=np.full(right.shape, np.nan), where=number > 0)
