"""The tables of a run's last round: who is taken for whom, how sure to be believed, domains, images one by one."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flora.clip.towers.towers import AdaptedClip
from flora.core.errors import UserError
from flora.core.records import Evaluation
from flora.core.states import ServerState
from flora.evaluation.accuracy import domain_accuracy
from flora.evaluation.classification import NUM_BINS, confusion, macro_f1, reliability
from flora.evaluation.predicting import most_probable, predict
from flora.evaluation.several import for_each_adapter
from flora.experiment.build import Experiment
from flora.features.features import Features
from flora.runs.evaluating import server_stacks
from flora.runs.measure import ClientResults, evaluate_test_images

# What `predictions.csv` says of a held-out image with its client's own adapter, where clients have one.
OWN_COLUMNS = ("own_predicted", "own_probability")


@dataclass(frozen=True, eq=False)
class Table:
    """The content of a CSV file. `lists_images` says that its rows are those of `examples.csv`: see `with_images`."""

    columns: Sequence[str]
    rows: Iterable[Sequence[Any]]
    lists_images: bool = False


def last_tables(experiment: Experiment, state: ServerState, clients: ClientResults) -> dict[str, Table]:
    """The tables of the server's adapter after the last round, by file name.

    Where it keeps several models, each test image is there once for each. Of `predictions.csv` only what the model
    says; `with_images` adds whose each image is.
    """
    evaluation = clients.test or evaluate_test_images(experiment, state)
    labels = for_each_adapter(experiment.test.labels.cpu().numpy(), evaluation)
    domains, names = experiment.test_domains, experiment.class_names
    domains = None if domains is None else for_each_adapter(domains, evaluation)
    tables = {
        "confusion.csv": confusion_table(labels, evaluation, names),
        "reliability.csv": reliability_table(evaluation),
    }
    if domain_accuracy(evaluation, domains) is not None and domains is not None:
        tables["domains.csv"] = domain_table(labels, evaluation, domains, len(names))
    number = experiment.config.evaluation.predictions
    if number:
        columns, rows = prediction_columns(number), _predictions(experiment, state, number)
        if clients.own_predictions is not None:
            columns, rows = [*columns, *OWN_COLUMNS], _with_own(rows, clients.own_predictions, names)
        tables["predictions.csv"] = Table(columns, rows, lists_images=True)
    return tables


def confusion_table(labels: np.ndarray, evaluation: Evaluation, class_names: Sequence[str]) -> Table:
    """A row a class, as `labels` `(N,)` say; a column a class, as it is predicted; numbers of images."""
    counts = confusion(labels, evaluation.predicted, len(class_names))
    rows = [[name, *row] for name, row in zip(class_names, counts.tolist(), strict=True)]
    return Table(["label", *class_names], rows)


def reliability_table(evaluation: Evaluation) -> Table:
    """A row a bin of confidence; the means of an empty one are empty."""
    bins = reliability(evaluation.confidences, evaluation.correct)
    rows = [
        [
            f"{place / NUM_BINS:.6f}",
            f"{(place + 1) / NUM_BINS:.6f}",
            count,
            *(("", "") if not count else (f"{confidence:.6f}", f"{accuracy:.6f}")),
        ]
        for place, (count, confidence, accuracy) in enumerate(
            zip(bins.counts.tolist(), bins.confidences.tolist(), bins.accuracies.tolist(), strict=True)
        )
    ]
    return Table(["above", "up_to", "num_images", "confidence", "accuracy"], rows)


def domain_table(labels: np.ndarray, evaluation: Evaluation, domains: np.ndarray, num_classes: int) -> Table:
    """A row a domain, `domains` `(N,)`: its test images, accuracy, loss and macro F1. An empty name is none."""
    rows = []
    for name in np.unique(domains[domains != ""]):
        own = domains == name
        figures = (
            evaluation.correct[own].mean(),
            evaluation.losses[own].mean(),
            macro_f1(labels[own], evaluation.predicted[own], num_classes),
        )
        rows.append([str(name), int(own.sum()), *(f"{figure:.6f}" for figure in figures)])
    return Table(["domain", "num_images", "accuracy", "loss", "macro_f1"], rows)


def prediction_columns(number: int) -> list[str]:
    """What `predictions.csv` says of an image, with so many of its most probable classes."""
    more = [column for place in range(2, number + 1) for column in (f"class_{place}", f"probability_{place}")]
    return ["label", "predicted", "probability", *more]


def _predictions(experiment: Experiment, state: ServerState, number: int) -> Iterator[list[Any]]:
    """What the server's adapter says of the held-out, the test and the new images, in the order of `examples.csv`."""
    model = experiment.federation.engine.model
    splits: list[tuple[AdaptedClip, Features]] = [(model, experiment.held_out), (model, experiment.test)]
    if experiment.new is not None:
        splits.append((experiment.new.model, experiment.new.features))
    config = experiment.config.evaluation
    for own, features in splits:
        labels, names = iter(features.labels.tolist()), own.class_names
        for logits in predict(
            own, server_stacks(state)[0], features, batch_size=config.batch_size, prediction=config.prediction
        ):
            for classes, probabilities in zip(*most_probable(logits, number), strict=True):
                cells = [
                    cell
                    for place, probability in zip(classes, probabilities, strict=True)
                    for cell in (names[place], f"{probability:.6f}")
                ]
                yield [names[next(labels)], *cells, *[""] * (2 * number - len(cells))]


def _with_own(
    rows: Iterable[Sequence[Any]], predictions: np.ndarray, class_names: Sequence[str]
) -> Iterator[list[Any]]:
    """The rows with what the own adapters of the clients say of their held-out images, which are the first ones."""
    known = [["", ""] if np.isnan(own) else [class_names[int(own)], f"{each:.6f}"] for own, each in predictions]
    for row, own in zip(rows, itertools.chain(known, itertools.repeat(["", ""])), strict=False):
        yield [*row, *own]


def with_images(predictions: Table, examples: Path) -> Table:
    """`predictions` with the images that they are of, as the run's `examples.csv` has them in the same order.

    Raises `UserError` if that file is missing or has other images.
    """
    try:
        with examples.open(newline="", encoding="utf-8") as file:
            known = [row for row in csv.DictReader(file) if row["split"] in ("held_out", "test", "new")]
        shown = ("image", "split", "client", "name")
        rows = [[*(image[key] for key in shown), *row] for image, row in zip(known, predictions.rows, strict=True)]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{examples}: doesn't list the run's images: {error}") from None
    return Table([*shown, *predictions.columns], rows)
