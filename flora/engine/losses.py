"""What adapters make of examples without training: their logits, losses, and labels for images without one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flora.client.self_training import PseudoLabels
from flora.clip.prediction import PLAIN, Prediction
from flora.clip.towers.towers import AdaptedClip
from flora.core import tree
from flora.core.low_rank import is_residual
from flora.core.tree import StateLike
from flora.engine.tasks import ClientTask
from flora.features.features import Features


def logits_in_batches(
    model: AdaptedClip,
    stack: StateLike,
    classes: Tensor,
    features: Features,
    *,
    batch_size: int,
    prediction: Prediction = PLAIN,
) -> Iterator[Tensor]:
    """Yield the logits `(K, n, C)` that K adapters `(K, ...)`, or the frozen model without any, give all examples.

    `batch_size` examples at a time, in their order; all adapters see the same. `classes` `(K, C, d)` are the classes'
    features with these adapters.
    """
    for start in range(0, len(features), batch_size):
        places = torch.arange(start, min(start + batch_size, len(features)), device=features.device)
        stem = features.take(places, model.device)
        repeated = stem.unsqueeze(0).expand(len(classes), *stem.shape).flatten(0, 1)
        yield prediction.logits(model, stack, repeated, classes)


@torch.no_grad()
def example_losses(
    model: AdaptedClip, features: Features, tasks: Sequence[ClientTask], *, batch_size: int
) -> list[np.ndarray]:
    """The cross-entropy of each task's examples with the adapter that it starts from, `(N,)`.

    At most `batch_size` examples of each client go in at once. Where an adapter stands for several models it is the sum
    over them, as in training. Images are not augmented.
    """
    losses = torch.zeros(len(tasks), max(len(task.examples) for task in tasks), dtype=torch.float64)
    for logits, places, columns in _logits(model, features, tasks, [task.examples for task in tasks], batch_size):
        targets = features.labels[places].to(logits.device)
        losses[:, columns] += F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").double().cpu()
    return [own[: len(task.examples)].numpy() for own, task in zip(losses, tasks, strict=True)]


@torch.no_grad()
def pseudo_labels(model: AdaptedClip, features: Features, tasks: Sequence[ClientTask]) -> list[PseudoLabels]:
    """The labels that the adapter of each task gives its client's images without one.

    It sees a weakly changed view of each. Where it stands for several models, it is the first that labels.
    """
    local = tasks[0].setup.local
    options = local.active_self_training
    assert options is not None
    examples = [task.unlabelled for task in tasks]
    parts: list[Tensor] = []
    if any(map(len, examples)):
        weak = features.views["weak"]
        logits = _logits(model, weak, tasks, examples, local.batch_size, is_training=True)
        parts = [each.cpu() for each, _, _ in itertools.islice(logits, -(-max(map(len, examples)) // local.batch_size))]
    all_logits = torch.cat([torch.zeros(len(tasks), 0, len(model.class_names)), *parts], dim=1)
    return [
        options.label(own, features.labels[own].numpy(), each[: len(own)], task.rng)
        for task, own, each in zip(tasks, examples, all_logits, strict=True)
    ]


def _logits(
    model: AdaptedClip,
    features: Features,
    tasks: Sequence[ClientTask],
    examples: Sequence[np.ndarray],
    batch_size: int,
    *,
    is_training: bool = False,
) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Yield the logits `(K, n, C)` of up to `batch_size` of each client's `examples` at a time, places in `features`.

    With each go the places `(K, n)` and the columns that they have among each client's own; who has fewer than the most
    gets its first one again. An adapter that stands for several models yields all columns for one after the other. With
    `is_training` images are changed at random, as tasks' streams say.
    """
    most = max(len(each) for each in examples)
    places = torch.zeros(len(examples), most, dtype=torch.int64)
    for row, each in zip(places, examples, strict=True):
        if len(each):
            row[:] = int(each[0])
            row[: len(each)] = torch.from_numpy(each)
    stack = _stack(model, tasks)
    for bound in model.adapter.models(stack):
        with model.adapter.bind(bound):
            classes = model.class_features(len(examples))
            for start in range(0, most, batch_size):
                columns = slice(start, min(start + batch_size, most))
                chosen = places[:, columns]
                streams = [task.rng.child("weak", start) for task in tasks] if is_training else None
                stem = features.take(chosen.flatten().to(features.device), model.device, streams)
                yield model.logits(stem, classes), chosen, columns


def _stack(model: AdaptedClip, tasks: Sequence[ClientTask]) -> dict[str, Tensor]:
    """The adapters that tasks start from, `(K, ...)` on the model's device; a residual, which all share, `(1, ...)`."""
    first = tasks[0].adapter
    names = [name for name in first if not is_residual(name)]
    stack = tree.stack([tree.select(task.adapter, names) for task in tasks])
    shared = {name: tensor.unsqueeze(0) for name, tensor in first.items() if is_residual(name)}
    return {name: tensor.to(model.device) for name, tensor in {**stack, **shared}.items()}
