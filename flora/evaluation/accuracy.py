"""Compute accuracies: of one or more adapters on the common test images, and on the clients' held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flora.clip.towers.towers import AdaptedClip
from flora.core.records import Evaluation
from flora.core.tree import StateLike
from flora.features.features import Features

MAX_DOMAINS = 1000


@torch.no_grad()
def evaluate(
    model: AdaptedClip, adapters: StateLike | None, features: Features, *, batch_size: int
) -> list[Evaluation]:
    """Classify every example of `features` with each of K adapters `(K, ...)`: one `Evaluation` an adapter.

    Without adapters it is the frozen model that classifies (zero-shot), once.
    The loss is the cross-entropy over all classes, whatever the training objective.
    """
    return evaluate_prompts([model], adapters, features, batch_size=batch_size)[0]


@torch.no_grad()
def evaluate_prompts(
    models: Sequence[AdaptedClip], adapters: StateLike | None, features: Features, *, batch_size: int
) -> list[list[Evaluation]]:
    """Classify as `evaluate` with the prompts of each of `models`: a list of evaluations a model.

    The models are one but for their prompts: an image's features are computed once for all of them.
    """
    model = models[0]
    stack = {name: tensor.to(model.device) for name, tensor in (adapters or {}).items()}
    num_adapters = len(next(iter(stack.values()))) if adapters else 1
    predicted: list[list[Tensor]] = [[] for _ in models]
    losses: list[list[Tensor]] = [[] for _ in models]
    with model.adapter.bind(stack) if adapters else nullcontext():
        classes = [each.class_features(num_adapters).transpose(1, 2) for each in models]
        for start in range(0, len(features), batch_size):
            stop = min(start + batch_size, len(features))
            stem = features.take(torch.arange(start, stop, device=features.device), model.device)
            repeated = stem.unsqueeze(0).expand(num_adapters, *stem.shape).flatten(0, 1)
            images = model.image_features(repeated, num_adapters)
            targets = features.labels[start:stop].to(model.device).unsqueeze(0).expand(num_adapters, -1)
            for place, texts in enumerate(classes):
                logits = model.logit_scale() * torch.bmm(images, texts)
                predicted[place].append(logits.argmax(dim=-1))
                losses[place].append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
    labels = features.labels.cpu().numpy()
    return [_evaluations(*parts, labels) for parts in zip(predicted, losses, strict=True)]


def _evaluations(predicted: Sequence[Tensor], losses: Sequence[Tensor], labels: np.ndarray) -> list[Evaluation]:
    """An evaluation for each of K adapters, from parts `(K, B)` of what was predicted and of the losses."""
    all_predicted = torch.cat(list(predicted), dim=1).cpu().numpy()
    all_losses = torch.cat(list(losses), dim=1).double().cpu().numpy()
    return [Evaluation(own == labels, each, own) for own, each in zip(all_predicted, all_losses, strict=True)]


def class_accuracy(evaluation: Evaluation, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, float | None]:
    """Accuracy by class name; None for a class without examples."""
    totals = np.bincount(labels, minlength=len(class_names))
    right = np.bincount(labels, weights=evaluation.correct, minlength=len(class_names))
    return {
        name: float(right[index] / totals[index]) if totals[index] else None for index, name in enumerate(class_names)
    }


def domain_accuracy(evaluation: Evaluation, domains: np.ndarray | None) -> dict[str, float] | None:
    """Accuracy by domain name, of examples that belong to the `domains` `(N,)`; an empty name is none.

    None without domains, and where there is only one, or more than `MAX_DOMAINS`: those are clients of a few images.
    """
    if domains is None:
        return None
    names, places = np.unique(domains, return_inverse=True)
    if not 2 <= np.count_nonzero(names != "") <= MAX_DOMAINS:
        return None
    means = np.bincount(places, weights=evaluation.correct) / np.bincount(places)
    return {str(name): float(mean) for name, mean in zip(names, means, strict=True) if name}


def client_accuracies(evaluation: Evaluation, sizes: np.ndarray) -> np.ndarray:
    """Accuracy on each client's held-out part, `(num_clients,)`; NaN for a client without one.

    `sizes` `(num_clients,)` are the parts' numbers of examples; `evaluation` covers them one after the other.
    """
    ends = np.cumsum(sizes)
    running = np.concatenate([[0], np.cumsum(evaluation.correct)])
    right = running[ends] - running[ends - sizes]
    return np.divide(right, sizes, out=np.full(len(sizes), np.nan), where=sizes > 0)


@torch.no_grad()
def own_accuracies(
    model: AdaptedClip, adapters: StateLike, features: Features, examples: Sequence[np.ndarray], *, batch_size: int
) -> np.ndarray:
    """Accuracy of each of K adapters `(K, ...)` on examples of its own, `(K,)`; NaN for one without.

    `examples` are K lists of places in `features`; of all adapters together at most `batch_size` go in at once, but at
    least one of each.
    """
    number = len(examples)
    sizes = np.array([len(each) for each in examples])
    places = torch.zeros(number, int(sizes.max()), dtype=torch.int64)
    for row, each in zip(places, examples, strict=True):
        row[: len(each)] = torch.from_numpy(each)
    targets = features.labels[places.to(features.labels.device)].to(model.device)
    right = torch.zeros(places.shape, dtype=torch.bool)
    with model.adapter.bind({name: tensor.to(model.device) for name, tensor in adapters.items()}):
        classes = model.class_features(number).transpose(1, 2)
        width = max(1, batch_size // number)
        for start in range(0, places.shape[1], width):
            part = slice(start, start + width)
            stem = features.take(places[:, part].flatten().to(features.device), model.device)
            logits = torch.bmm(model.image_features(stem, number), classes)
            right[:, part] = (logits.argmax(dim=-1) == targets[:, part]).cpu()
    right &= torch.arange(places.shape[1]) < torch.from_numpy(sizes).unsqueeze(1)
    return np.divide(right.sum(dim=1).numpy(), sizes, out=np.full(number, np.nan), where=sizes > 0)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n) over clients, and the means of the worst and the best tenth of them."""

    mean: float
    std: float
    worst_decile: float
    best_decile: float


def spread(accuracies: np.ndarray) -> Spread | None:
    """The spread over the clients that have a result, NaN being none; None if no client has one."""
    known = np.sort(accuracies[~np.isnan(accuracies)])
    if not len(known):
        return None
    tenth = max(1, len(known) // 10)
    return Spread(float(known.mean()), float(known.std()), float(known[:tenth].mean()), float(known[-tenth:].mean()))


def harmonic_mean(one: float, other: float) -> float:
    """2 / (1 / one + 1 / other), 0 if one of them is 0."""
    return 2 * one * other / (one + other) if one and other else 0.0
