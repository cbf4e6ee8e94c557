"""What one adapter says of images: the most probable classes and their probabilities."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from flora.clip.prediction import Prediction, bound
from flora.clip.towers.towers import AdaptedClip
from flora.core.tree import StateLike
from flora.engine.losses import logits_in_batches
from flora.features.features import Features


def most_probable(logits: Tensor, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The `number` most probable classes of each image, the first the predicted one, and their probabilities.

    Both are `(B, number)`, of logits `(B, C)`; probabilities are of all C classes, in double precision. Of equal ones
    the first comes first.
    """
    order = logits.argsort(dim=-1, descending=True, stable=True)[:, :number]
    probabilities = logits.double().softmax(dim=-1).gather(-1, order)
    return order.cpu().numpy(), probabilities.cpu().numpy()


@torch.no_grad()
def predict(
    model: AdaptedClip, stack: StateLike | None, features: Features, *, batch_size: int, prediction: Prediction
) -> Iterator[Tensor]:
    """Yield the logits `(B, C)` of all examples in their order, with one adapter `(1, ...)` or the frozen model."""
    on_device = {name: tensor.to(model.device) for name, tensor in (stack or {}).items()}
    with bound(model, on_device):
        classes = model.class_features(1)
    batches = logits_in_batches(model, on_device, classes, features, batch_size=batch_size, prediction=prediction)
    for logits in batches:
        yield logits[0]
