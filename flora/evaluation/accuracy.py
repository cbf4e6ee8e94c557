"""Compute accuracies: of one or more adapters on the common test images, and on the clients' held-out examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from flora.clip.prediction import PLAIN, Prediction, bound
from flora.clip.towers.towers import AdaptedClip
from flora.core.records import Evaluation
from flora.core.tree import StateLike
from flora.engine.losses import logits_in_batches
from flora.evaluation.classification import macro_f1
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
    keep_probabilities: bool = False,
) -> list[Evaluation]:
    """Classify every example of `features` with each of K adapters `(K, ...)`: one `Evaluation` an adapter.

    Without adapters it is the frozen model that classifies (zero-shot), once.
    The loss is the cross-entropy over all classes, whatever the training objective. `prediction` says how logits come
    about. With `keep_probabilities` those of all classes are kept, too: 8 bytes for each adapter, example and class.
    """
    stack = {name: tensor.to(model.device) for name, tensor in (adapters or {}).items()}
    num_adapters = len(next(iter(stack.values()))) if adapters else 1
    columns: list[list[torch.Tensor]] = [[] for _ in range(5 + keep_probabilities)]
    with bound(model, stack):
        classes = model.class_features(num_adapters)
        class_means = model.comparison.means(classes)
    batches = logits_in_batches(model, stack, classes, features, batch_size=batch_size, prediction=prediction)
    for logits, labels in zip(batches, features.labels.split(batch_size), strict=True):
        targets = labels.to(model.device).unsqueeze(0).expand(num_adapters, -1)
        for column, each in zip(columns, _outcomes(logits, targets), strict=False):
            column.append(each)
    correct, losses, predicted, confidences, ranks, *probabilities = (
        torch.cat(column, dim=1).cpu().numpy() for column in columns
    )
    all_classes = class_means.cpu().numpy()
    return [
        Evaluation(*each)
        for each in zip(correct, losses, predicted, confidences, ranks, all_classes, *probabilities, strict=True)
    ]


def _outcomes(logits: torch.Tensor, targets: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield what an `Evaluation` holds of logits `(K, B, C)` of examples with labels `(K, B)`, in its order."""
    predicted = logits.argmax(dim=-1)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    of_label, highest = (logits.gather(-1, each.unsqueeze(-1)) for each in (targets, predicted))
    yield predicted == targets
    yield losses.double()
    yield predicted
    # The log of the sum over classes is the loss plus the label's logit: it costs more than all else here.
    yield (highest - of_label).squeeze(-1).sub(losses).exp().clamp(max=1).double()
    yield (logits > of_label).sum(dim=-1)
    yield logits.double().softmax(dim=-1)


def class_accuracy(evaluation: Evaluation, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, float | None]:
    """Accuracy by class name, of labels `(N,)`; None for a class without examples."""
    totals = np.bincount(labels, minlength=len(class_names))
    right = np.bincount(labels, weights=evaluation.correct, minlength=len(class_names))
    return {
        name: float(right[index] / totals[index]) if totals[index] else None for index, name in enumerate(class_names)
    }


def balanced_accuracy(by_class: Mapping[str, float | None]) -> float:
    """The mean over classes of the accuracy on each, of the classes that have examples."""
    known = [accuracy for accuracy in by_class.values() if accuracy is not None]
    return sum(known) / len(known)


def worst_class_accuracy(by_class: Mapping[str, float | None]) -> float:
    """The accuracy on the class that is recognised worst, of those that have examples."""
    return min(accuracy for accuracy in by_class.values() if accuracy is not None)


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


def client_means(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The mean on each client's held-out part, `(num_clients,)`; NaN for a client without one.

    `sizes` `(num_clients,)` are the parts' numbers of examples; `values` (whether each is right, or its loss) cover
    them one after the other.
    """
    owners = np.repeat(np.arange(len(sizes)), sizes)
    totals = np.bincount(owners, weights=values, minlength=len(sizes))
    return np.divide(totals, sizes, out=np.full(len(sizes), np.nan), where=sizes > 0)


def places_of_clients(sizes: np.ndarray, clients: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """The places of each of `clients`' held-out examples among those of all, which are in the order of clients.

    `sizes` `(num_clients,)` are the numbers of all clients' examples.
    """
    ends = np.cumsum(sizes)
    return [np.arange(ends[client] - sizes[client], ends[client]) for client in clients]


def client_macro_f1(labels: np.ndarray, predicted: np.ndarray, sizes: np.ndarray, num_classes: int) -> np.ndarray:
    """Macro F1 on each client's held-out part, `(num_clients,)`; NaN for a client without one.

    `labels` and `predicted` cover the parts, of `sizes` `(num_clients,)` examples, one after the other.
    """
    parts = zip(*(np.split(each, np.cumsum(sizes)[:-1]) for each in (labels, predicted)), strict=True)
    scores = [macro_f1(own_labels, own_predicted, num_classes) for own_labels, own_predicted in parts]
    return np.array([np.nan if each is None else each for each in scores])


@dataclass(frozen=True, eq=False)
class OwnPredictions:
    """What adapters say of examples of their own, `(N,)`, one adapter's after the other's: classes, probabilities."""

    classes: np.ndarray
    probabilities: np.ndarray


@torch.no_grad()
def own_predictions(
    model: AdaptedClip,
    adapters: StateLike,
    features: Features,
    examples: Sequence[np.ndarray],
    *,
    batch_size: int,
    prediction: Prediction = PLAIN,
) -> OwnPredictions:
    """What each of K adapters `(K, ...)` predicts of examples of its own.

    `examples` are K lists of places in `features`; of all adapters together at most `batch_size` go in at once, but at
    least one of each. Probabilities are in double precision.
    """
    number = len(examples)
    sizes = torch.tensor([len(each) for each in examples])
    places = torch.zeros(number, int(sizes.max()), dtype=torch.int64)
    for row, each in zip(places, examples, strict=True):
        row[: len(each)] = torch.from_numpy(each)
    predicted, probabilities = torch.zeros_like(places), torch.zeros(places.shape, dtype=torch.float64)
    stack = {name: tensor.to(model.device) for name, tensor in adapters.items()}
    with bound(model, stack):
        classes = model.class_features(number)
    width = max(1, batch_size // number)
    for start in range(0, places.shape[1], width):
        part = slice(start, start + width)
        stem = features.take(places[:, part].flatten().to(features.device), model.device)
        logits = prediction.logits(model, stack, stem, classes)
        predicted[:, part] = logits.argmax(dim=-1).cpu()
        probabilities[:, part] = logits.double().softmax(dim=-1).amax(dim=-1).cpu()
    is_there = torch.arange(places.shape[1]) < sizes.unsqueeze(1)
    return OwnPredictions(predicted[is_there].numpy(), probabilities[is_there].numpy())


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

    The arguments are as for `own_predictions`.
    """
    predictions = own_predictions(model, adapters, features, examples, batch_size=batch_size, prediction=prediction)
    labels = features.labels.cpu().numpy()[np.concatenate(examples)]
    return client_means(predictions.classes == labels, np.array([len(each) for each in examples]))


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n) over clients, and the means of the worst and the best tenth of them."""

    mean: float
    std: float
    worst_decile: float
    best_decile: float


def spread(accuracies: np.ndarray) -> Spread | None:
    """The spread over clients' accuracies `(num_clients,)`, NaN being none; None if no client has one."""
    known = np.sort(accuracies[~np.isnan(accuracies)])
    if not len(known):
        return None
    tenth = max(1, len(known) // 10)
    return Spread(float(known.mean()), float(known.std()), float(known[:tenth].mean()), float(known[-tenth:].mean()))


def harmonic_mean(one: float, other: float) -> float:
    """2 / (1 / one + 1 / other), 0 if one of them is 0."""
    return 2 * one * other / (one + other) if one and other else 0.0
