"""Compute accuracies: of one or more adapters on the common test images, and on the clients' held-out examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from flora.clip.prediction import PLAIN, Prediction, bound
from flora.clip.towers.towers import AdaptedClip
from flora.core.records import Evaluation
from flora.core.tree import StateLike
from flora.engine.losses import logits_in_batches
from flora.features.features import Features

MAX_DOMAINS = 1000


@torch.no_grad()
def evaluate(
    model: AdaptedClip,
    adapters: StateLike | None,
    features: Features,
    *,
    batch_size: int,
    prediction: Prediction = PLAIN,
) -> list[Evaluation]:
    """Classify every example of `features` with each of K adapters `(K, ...)`: one `Evaluation` an adapter.

    Without adapters it is the frozen model that classifies (zero-shot), once.
    The loss is the cross-entropy over all classes, whatever the training objective. `prediction` says how logits come
    about.
    """
    stack = {name: tensor.to(model.device) for name, tensor in (adapters or {}).items()}
    num_adapters = len(next(iter(stack.values()))) if adapters else 1
    predicted, losses = [], []
    with bound(model, stack):
        classes = model.class_features(num_adapters)
    batches = logits_in_batches(model, stack, classes, features, batch_size=batch_size, prediction=prediction)
    for logits, labels in zip(batches, features.labels.split(batch_size), strict=True):
        targets = labels.to(model.device).unsqueeze(0).expand(num_adapters, -1)
        predicted.append(logits.argmax(dim=-1))
        losses.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
    all_predicted = torch.cat(predicted, dim=1).cpu().numpy()
    all_losses = torch.cat(losses, dim=1).double().cpu().numpy()
    all_labels, all_classes = features.labels.cpu().numpy(), classes.cpu().numpy()
    return [
        Evaluation(own == all_labels, *each)
        for own, *each in zip(all_predicted, all_losses, all_predicted, all_classes, strict=True)
    ]


def class_accuracy(evaluation: Evaluation, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, float | None]:
    """Accuracy by class name; None for a class without examples."""
    totals = np.bincount(labels, minlength=len(class_names))
    right = np.bincount(labels, weights=evaluation.correct, minlength=len(class_names))
    return {
        name: float(right[index] / totals[index]) if totals[index] else None for index, name in enumerate(class_names)
    }


def balanced_accuracy(by_class: Mapping[str, float | None]) -> tuple[float, float]:
    """The mean over classes of the accuracy on each, and the worst class's, of the classes that have examples."""
    known = [accuracy for accuracy in by_class.values() if accuracy is not None]
    return sum(known) / len(known), min(known)


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


def unheld_accuracies(correct: np.ndarray, labels: np.ndarray, holds: np.ndarray) -> np.ndarray:
    """Accuracy on the examples of classes that a client never held, for each of K clients, `(K,)`.

    `correct` `(K or 1, N)` says what its adapter gets right, `labels` `(N,)` are the examples' classes, `holds`
    `(K, C)` is True for the classes of which it has a training example. NaN for a client that holds all that occur.
    """
    is_class = labels[:, None] == np.arange(holds.shape[1])
    right, totals = correct.astype(np.float64) @ is_class, is_class.sum(axis=0)
    number = (~holds * totals).sum(axis=1)
    return np.divide((~holds * right).sum(axis=1), number, out=np.full(len(holds), np.nan), where=number > 0)


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
    model: AdaptedClip,
    adapters: StateLike,
    features: Features,
    examples: Sequence[np.ndarray],
    *,
    batch_size: int,
    prediction: Prediction = PLAIN,
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
    stack = {name: tensor.to(model.device) for name, tensor in adapters.items()}
    with bound(model, stack):
        classes = model.class_features(number)
    width = max(1, batch_size // number)
    for start in range(0, places.shape[1], width):
        part = slice(start, start + width)
        stem = features.take(places[:, part].flatten().to(features.device), model.device)
        logits = prediction.logits(model, stack, stem, classes)
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
