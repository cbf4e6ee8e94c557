"""The columns of `clients.csv`: what each client has, how often it took part, and what it reaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flora.core.records import RoundRecord
from flora.core.states import ServerState
from flora.experiment.build import Experiment
from flora.federated.exposure import exposures
from flora.runs.measure import ClientResults, LocalOnlyResults

CLIENT_COLUMNS: tuple[tuple[str, str], ...] = (
    ("client", "its id"),
    ("name", "what the data call it, where they do"),
    ("num_train", "its training examples"),
    ("num_unlabelled", "its training images without a label, where there are some"),
    ("pseudo_label_coverage", "share of these whose label was sure in the last round that it took part in"),
    ("pseudo_label_precision", "share of these labels that were right"),
    ("num_held_out", "the examples that it keeps for its own test"),
    ("num_rounds", "the rounds in which its update came"),
    ("example_epsilon", "epsilon that its examples have spent by then, where clients train with `local.privacy`"),
    ("rank", "its rank, where clients have their own"),
    ("cluster", "which of the server's models fits its training examples best, where there are several"),
    ("accuracy", "accuracy of the server's adapter (its cluster's) of the last round on its own held-out examples"),
    ("loss", "its mean loss on them"),
    ("macro_f1", "its mean F1 on them, over the classes that are labelled or predicted"),
    ("test_accuracy", "accuracy of the same on the common test images"),
    ("local_only_accuracy", "what it reaches without the others, on the common test images"),
    ("local_only_held_out_accuracy", "what it reaches without the others, on its own held-out examples"),
    (
        "centralized_held_out_accuracy",
        "what all images in one place reach on them, where that is asked for",
    ),
    ("personal_accuracy", "accuracy of its own adapter on its own held-out examples, where clients have one"),
    ("personal_adapter", "whether that is its `own` or, because it has none, the `server`'s"),
    ("personal_test_accuracy", "accuracy of its own adapter on the common test images, of those also trained alone"),
    ("held_class_accuracy", "accuracy of its adapter on test images of its classes, with `evaluation.held_classes`"),
    ("other_class_accuracy", "the same on those of the classes that only others hold"),
    ("unseen", "yes: it never trains (`clients.held_out_fraction`)"),
    ("unseen_accuracy", "what the server's adapter of the last round gives such a client on its held-out examples"),
    ("unseen_tuned_accuracy", "what one pass of fine-tuning on its training examples makes of that"),
)
"""The columns of `clients.csv`, in their order."""


def client_columns(
    experiment: Experiment,
    state: ServerState,
    results: ClientResults,
    local_only: LocalOnlyResults,
    records: Sequence[RoundRecord],
) -> dict[str, list[Any]]:
    """The columns of `clients.csv` by name, with an entry for each client; a missing result is empty text."""
    clients, ranks = experiment.federation.clients, experiment.federation.ranks
    columns: dict[str, list[Any]] = {
        "client": list(range(len(clients))),
        "num_train": [len(client.train) for client in clients],
        "num_held_out": [len(client.held_out) for client in clients],
        "num_rounds": _num_rounds(records, len(clients)),
        "accuracy": _cells(results.server),
        "loss": _cells(results.losses),
        "macro_f1": _cells(results.macro_f1),
        "test_accuracy": _cells(np.full(len(clients), records[-1].accuracy)),
        "local_only_accuracy": _cells(local_only.test),
        "local_only_held_out_accuracy": _cells(local_only.held_out),
    }
    if any(client.name is not None for client in clients):
        columns["name"] = [client.name for client in clients]
    columns |= _cluster_columns(experiment, results)
    if results.own is not None and results.has_own is not None:
        columns["personal_accuracy"] = _cells(results.own)
        columns["personal_adapter"] = ["own" if has_own else "server" for has_own in results.has_own]
    if local_only.personal_test is not None:
        columns["personal_test_accuracy"] = _cells(local_only.personal_test)
    if local_only.centralized is not None:
        columns["centralized_held_out_accuracy"] = _cells(local_only.centralized.held_out)
    if ranks is not None:
        columns["rank"] = ranks.tolist()
    if any(len(client.unlabelled) for client in clients):
        columns |= _pseudo_label_columns(records, [len(client.unlabelled) for client in clients])
    privacy = experiment.federation.local.privacy
    if privacy is not None:
        spent = exposures(experiment.federation, state.clients)
        epsilons = [privacy.epsilon(spent[client]) if client in spent else 0.0 for client in range(len(clients))]
        columns["example_epsilon"] = _cells(np.array(epsilons))
    if results.scenarios is not None and results.scenarios.by_holding is not None:
        held, others = results.scenarios.by_holding.T
        columns |= {"held_class_accuracy": _cells(held), "other_class_accuracy": _cells(others)}
    if experiment.unseen:
        columns = _with_unseen(columns, experiment, results)
    return {name: columns[name] for name, _ in CLIENT_COLUMNS if name in columns}


def _cluster_columns(experiment: Experiment, results: ClientResults) -> dict[str, list[Any]]:
    """Which of the server's models is each client's, and how good that is; nothing where there is but one."""
    clusters = results.clusters
    if clusters is None:
        return {}
    columns: dict[str, list[Any]] = {"cluster": clusters.tolist()}
    if results.test is not None:
        by_cluster = np.split(results.test.correct, experiment.federation.server.strategy.num_clusters)
        columns["test_accuracy"] = _cells(np.array([each.mean() for each in by_cluster])[clusters])
    return columns


def _with_unseen(columns: dict[str, list[Any]], experiment: Experiment, results: ClientResults) -> dict[str, list[Any]]:
    """The columns with a row for each client that never trains below those that do; what it doesn't have is empty."""
    unseen, first = experiment.unseen, len(experiment.federation.clients)
    theirs: dict[str, list[Any]] = {
        "client": list(range(first, first + len(unseen))),
        "name": [client.name for client in unseen],
        "num_train": [len(client.train) for client in unseen],
        "num_held_out": [len(client.held_out) for client in unseen],
        "num_rounds": [0] * len(unseen),
        "unseen": ["yes"] * len(unseen),
    }
    accuracies = None if results.scenarios is None else results.scenarios.unseen
    if accuracies is not None:
        theirs |= {"unseen_accuracy": _cells(accuracies.server), "unseen_tuned_accuracy": _cells(accuracies.tuned)}
    new = {name: [""] * first for name in theirs if name.startswith("unseen")}
    return {name: column + theirs.get(name, [""] * len(unseen)) for name, column in (columns | new).items()}


def _pseudo_label_columns(records: Sequence[RoundRecord], numbers: list[int]) -> dict[str, list[Any]]:
    """The columns of clients' pseudo-labels, each client's in the last round that it took part in."""
    last: dict[str, list[int]] = {}
    for record in records:
        last |= record.metrics.get("client_pseudo_labels") or {}
    counts = np.array([last.get(str(client), [0, 0, 0]) for client in range(len(numbers))], dtype=np.float64)
    with np.errstate(invalid="ignore"):
        coverage, precision = counts[:, 1] / counts[:, 0], counts[:, 2] / counts[:, 1]
    return {
        "num_unlabelled": numbers,
        "pseudo_label_coverage": _cells(coverage),
        "pseudo_label_precision": _cells(precision),
    }


def _cells(accuracies: np.ndarray) -> list[str]:
    return ["" if np.isnan(accuracy) else f"{accuracy:.6f}" for accuracy in accuracies]


def _num_rounds(records: Sequence[RoundRecord], num_clients: int) -> list[Any]:
    """In how many rounds each client took part; empty text if some of the records don't say."""
    cohorts = [record.cohort for record in records if record.cohort is not None]
    if len(cohorts) < len(records):
        return [""] * num_clients
    counts = np.zeros(num_clients, np.int64)
    for cohort in cohorts:
        counts += np.bincount(np.array(cohort, np.int64), minlength=num_clients)
    return counts.tolist()
