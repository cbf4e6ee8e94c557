"""Evaluate a run: make the record of each round, and the columns of `clients.csv`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from flora.clip.towers.towers import AdaptedClip
from flora.core import tree
from flora.core.memory import peak_memory_bytes
from flora.core.records import Evaluation, RoundRecord
from flora.core.states import ServerState
from flora.core.tree import StateLike
from flora.engine.dealing import ARRAYS
from flora.evaluation.accuracy import (
    client_means,
    evaluate,
    harmonic_mean,
    own_accuracies,
    spread,
    unheld_accuracies,
)
from flora.evaluation.local_only import clients_with_own_adapters, own_adapters, train_local_only
from flora.evaluation.metrics import ServerView, complete, computed
from flora.evaluation.shares import evaluate_in_shares
from flora.experiment.build import Experiment
from flora.features.features import Features
from flora.federated.round import RoundResult
from flora.runs.other_accuracies import by_template, on_other_data


@dataclass(frozen=True, eq=False)
class ClientResults:
    """Accuracies on each client's held-out examples, `(num_clients,)`, NaN where it has none.

    `server` is the server's adapter, `own` each client's own, if they have any: the server's for who has none.
    `has_own` says who has one. `losses` are the server's adapter's mean losses on the same examples. `test` is that
    adapter on the common test images, if they were evaluated at the same time.
    """

    server: np.ndarray
    losses: np.ndarray
    own: np.ndarray | None = None
    has_own: np.ndarray | None = None
    test: Evaluation | None = None


@dataclass(frozen=True, eq=False)
class LocalOnlyResults:
    """Accuracies of the clients that are also trained without the others, `(num_clients,)`, NaN for who is not.

    `test` and `held_out` are what a client reaches alone, on the common test images and on its own held-out examples,
    `unheld` on the test images of classes that it has no example of. `personal_test` and `personal_unheld` are its own
    adapter of the federated run on the test images, NaN where it has none; None if no client can have one.
    """

    test: np.ndarray
    held_out: np.ndarray
    unheld: np.ndarray
    personal_test: np.ndarray | None = None
    personal_unheld: np.ndarray | None = None

    @classmethod
    def of_nobody(cls, num_clients: int) -> LocalOnlyResults:
        """Where no client is trained without the others."""
        return cls(*(np.full(num_clients, np.nan) for _ in range(3)))


def measure(
    experiment: Experiment, state: ServerState, result: RoundResult | None
) -> tuple[RoundRecord, ClientResults | None]:
    """The record of the round that led to `state` (no result: round 0), evaluated if due; the clients' accuracies."""
    config, engine = experiment.config.evaluation, experiment.federation.engine
    started = engine.seconds()
    is_last = state.round == experiment.config.rounds
    results: dict[str, Any] = {}
    clients: ClientResults | None = None
    test: Evaluation | None = None
    if is_last or state.round % config.every == 0:
        test = evaluate_test_images(experiment, state)
        results = _measure_server(experiment, state, test)
    if is_last or (config.clients_every and state.round and state.round % config.clients_every == 0):
        clients = replace(measure_clients(experiment, state), test=test)
    if clients is not None:
        sizes = experiment.held_out_sizes
        results |= _figures("client", clients.server, sizes) | _figures("personal", clients.own, sizes)
    measured = result.metrics() if result else {}
    measured["eval_seconds"] = engine.seconds() - started
    measured["peak_memory_bytes"] = peak_memory_bytes(engine.model.device)
    return RoundRecord(
        state.round,
        complete({**results, **measured}),
        cohort=result.cohort if result else (),
        rejected_clients=result.rejected_clients if result else (),
    ), clients


def evaluate_test_images(experiment: Experiment, state: ServerState) -> Evaluation:
    """Evaluate the server's adapter on the common test images."""
    keeps = experiment.config.evaluation.auroc
    return _evaluate(experiment, server_stack(state), experiment.test, keep_probabilities=keeps)[0]


def _measure_server(experiment: Experiment, state: ServerState, evaluation: Evaluation) -> dict[str, Any]:
    """Return what a round's record says of the server's adapter; `evaluation` is it on the common test images."""
    stack = server_stack(state)
    labels = experiment.test.labels.cpu().numpy()
    results = computed(ServerView(state, evaluation, labels, experiment.class_names, experiment.test_domains))
    results["unheld_accuracy"] = _mean(unheld_accuracies(evaluation.correct[None], labels, experiment.held_classes))
    is_warm = experiment.federation.server_training.synthetic is not None
    if not state.round and (is_warm or experiment.has_start):
        begun = tree.expand(experiment.initial_adapter, 1)
        name = "warm_up_accuracy" if is_warm else "start_accuracy"
        results[name] = _evaluate(experiment, begun, experiment.test)[0].accuracy
    accuracy_of = partial(_accuracy, experiment, stack)
    results |= by_template(experiment, accuracy_of)
    if state.round in (0, experiment.config.rounds):
        results |= on_other_data(experiment, accuracy_of)
    if state.round and not experiment.federation.communication.broadcast.is_identity:
        _, view = experiment.federation.broadcast(state)
        accuracy = _evaluate(experiment, tree.expand(view.adapter, 1), experiment.test)[0].accuracy
        results |= {"broadcast_accuracy": accuracy, "model_privacy_gap": evaluation.accuracy - accuracy}
    if experiment.new is not None:
        new_model, features = experiment.new
        accuracy = _evaluate(experiment, stack, features, new_model)[0].accuracy
        results |= {"new_accuracy": accuracy, "harmonic_mean": harmonic_mean(evaluation.accuracy, accuracy)}
    return results


def _accuracy(experiment: Experiment, stack: StateLike | None, model: AdaptedClip, features: Features) -> float:
    """The accuracy of an adapter, or of the frozen model without one, in `model` on `features`."""
    return _evaluate(experiment, stack, features, model)[0].accuracy


def _evaluate(
    experiment: Experiment,
    adapters: StateLike | None,
    features: Features,
    model: AdaptedClip | None = None,
    *,
    keep_probabilities: bool = False,
) -> Sequence[Evaluation]:
    """Evaluate adapters `(K, ...)` on `features` in the way that the configuration says, each process a share."""
    config, engine = experiment.config.evaluation, experiment.federation.engine
    model = model or engine.model

    def compute(stack: StateLike | None) -> list[Evaluation]:
        number = len(next(iter(stack.values()))) if stack else 1
        batch_size = max(1, config.batch_size // number)
        compute_share = partial(
            evaluate,
            model,
            stack,
            batch_size=batch_size,
            prediction=config.prediction,
            keep_probabilities=keep_probabilities,
        )
        return evaluate_in_shares(engine.processes, compute_share, features, batch_size=batch_size)

    key = id(model), id(features), config.batch_size, config.prediction, keep_probabilities
    return engine.evaluate(key, adapters, compute)


def _mean(accuracies: np.ndarray) -> float | None:
    """The mean of those that are not NaN; None if all are."""
    known = accuracies[~np.isnan(accuracies)]
    return float(known.mean()) if len(known) else None


def server_stack(state: ServerState) -> tree.State | None:
    """The server's adapter `(1, ...)`; None in round 0, which is the frozen model: some adapters change it at once."""
    return tree.expand(state.adapter, 1) if state.round else None


def _figures(whose: str, accuracies: np.ndarray | None, sizes: np.ndarray) -> dict[str, float]:
    """The spread of accuracies over clients and their mean weighted by `sizes`, as fields of a record."""
    found = None if accuracies is None else spread(accuracies)
    if accuracies is None or found is None:
        return {}
    known = ~np.isnan(accuracies)
    figures = {**asdict(found), "weighted_mean": float(np.average(accuracies[known], weights=sizes[known]))}
    return {f"{whose}_accuracy_{name}": each for name, each in figures.items()}


def measure_clients(experiment: Experiment, state: ServerState) -> ClientResults:
    """Accuracy on each client's held-out examples."""
    sizes, federation = experiment.held_out_sizes, experiment.federation
    with_own = clients_with_own_adapters(federation, state)
    server, losses = np.full(len(sizes), np.nan), np.full(len(sizes), np.nan)
    if len(experiment.held_out):
        evaluation = _evaluate(experiment, server_stack(state), experiment.held_out)[0]
        server, losses = client_means(evaluation.correct, sizes), client_means(evaluation.losses, sizes)
    if with_own is None:
        return ClientResults(server, losses)
    own, ends = server.copy(), np.cumsum(sizes)
    for clients, adapters in own_adapters(federation, state, with_own[sizes[with_own] > 0]):
        own[clients] = _of_blocks(
            experiment, clients, adapters, lambda some, part: _on_held_out(experiment, ends, some, part)
        )
    return ClientResults(server, losses, own, np.isin(np.arange(len(sizes)), with_own))


def _of_blocks(
    experiment: Experiment,
    clients: Sequence[int],
    adapters: StateLike,
    evaluate_some: Callable[[Sequence[int], StateLike], np.ndarray],
) -> np.ndarray:
    """Evaluate each client's own of `adapters` `(K, ...)`, as many at once as fit; return the numbers `(K, ...)`."""
    number = len(clients)

    def block(places: Sequence[int]) -> np.ndarray:
        # A residual `(1, ...)` is the same for all.
        part = {name: tensor[places] if len(tensor) == number else tensor for name, tensor in adapters.items()}
        return evaluate_some([clients[place] for place in places], part)

    parts = experiment.federation.engine.in_blocks(range(number), block, travel=ARRAYS)
    return np.concatenate(list(parts))


def _on_held_out(experiment: Experiment, ends: np.ndarray, clients: Sequence[int], adapters: StateLike) -> np.ndarray:
    """Accuracy of each of `adapters` `(K, ...)` on its client's held-out examples, `(K,)`; these end at `ends`."""
    starts, config = ends - experiment.held_out_sizes, experiment.config.evaluation
    examples = [np.arange(starts[client], ends[client]) for client in clients]
    return own_accuracies(
        experiment.federation.engine.model,
        adapters,
        experiment.held_out,
        examples,
        batch_size=config.batch_size,
        prediction=config.prediction,
    )


def _on_test_images(experiment: Experiment, clients: Sequence[int], adapters: StateLike) -> np.ndarray:
    """Accuracy of `adapters` `(K, ...)` on the common test images, and on those of classes not held, `(K, 2)`."""
    config, number = experiment.config.evaluation, len(clients)
    evaluations = evaluate(
        experiment.federation.engine.model,
        adapters,
        experiment.test,
        batch_size=max(1, config.batch_size // number),
        prediction=config.prediction,
    )
    correct = np.stack([each.correct for each in evaluations])
    unheld = unheld_accuracies(correct, experiment.test.labels.cpu().numpy(), experiment.held_classes[clients])
    return np.stack([correct.mean(axis=1), unheld], axis=1)


def measure_local_only(
    experiment: Experiment, state: ServerState, *, advance: Callable[[int], object]
) -> LocalOnlyResults:
    """Evaluate `evaluation.num_local_only` clients without the others, and with adapters of their own.

    These are as of `state`. `advance` is told of each round done.
    """
    number, federation = experiment.config.evaluation.num_local_only, experiment.federation
    chosen = np.unique(np.linspace(0, len(federation.clients) - 1, number).round().astype(int))
    adapters = train_local_only(federation, experiment.initial_adapter, chosen, advance=advance)
    results, ends = LocalOnlyResults.of_nobody(len(federation.clients)), np.cumsum(experiment.held_out_sizes)
    own = federation.engine.model.adapter.models(adapters)[-1]
    clients = chosen.tolist()
    results.test[chosen], results.unheld[chosen] = _of_test_images(experiment, clients, own)
    results.held_out[chosen] = _of_blocks(
        experiment, clients, own, lambda some, part: _on_held_out(experiment, ends, some, part)
    )
    with_own = clients_with_own_adapters(federation, state)
    if with_own is None:
        return results
    personal, unheld = (np.full(len(federation.clients), np.nan) for _ in range(2))
    for clients, own in own_adapters(federation, state, np.intersect1d(chosen, with_own)):
        personal[clients], unheld[clients] = _of_test_images(experiment, clients, own)
    return replace(results, personal_test=personal, personal_unheld=unheld)


def _of_test_images(
    experiment: Experiment, clients: Sequence[int], adapters: StateLike
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of each client's own of `adapters` on all test images, and on those of classes not held, `(K,)`."""
    found = _of_blocks(experiment, clients, adapters, lambda some, part: _on_test_images(experiment, some, part))
    return found[:, 0], found[:, 1]


def local_only_figures(results: LocalOnlyResults) -> dict[str, Any]:
    """Return what the summary says of the clients that are trained without the others, on the common test images."""
    accuracies = results.test[~np.isnan(results.test)].tolist()
    return {
        "num_local_only": len(accuracies),
        "local_only_accuracy_mean": sum(accuracies) / len(accuracies) if accuracies else None,
        "local_only_accuracy_best": max(accuracies, default=None),
        "local_only_unheld_accuracy": _mean(results.unheld),
        "personal_unheld_accuracy": None if results.personal_unheld is None else _mean(results.personal_unheld),
    }


def compare_held_out(results: ClientResults, local_only: LocalOnlyResults) -> dict[str, Any]:
    """The summary's `held_out_...`: means over the clients that were also trained alone and have held-out examples."""
    both = ~np.isnan(results.server) & ~np.isnan(local_only.held_out)
    number = int(both.sum())
    if not number:
        return {"held_out_num_clients": 0}
    figures = {"federated": results.server, "local_only": local_only.held_out, "personal": results.own}
    means = {
        f"held_out_{how}_accuracy": float(accuracies[both].mean())
        for how, accuracies in figures.items()
        if accuracies is not None
    }
    return {"held_out_num_clients": number, **means}


CLIENT_COLUMNS: tuple[tuple[str, str], ...] = (
    ("client", "its id"),
    ("name", "what the data call it, where they do"),
    ("num_train", "its training examples"),
    ("num_unlabelled", "its training images without a label, where there are some"),
    ("pseudo_label_coverage", "share of these whose label was sure in the last round that it took part in"),
    ("pseudo_label_precision", "share of these labels that were right"),
    ("num_held_out", "the examples that it keeps for its own test"),
    ("num_rounds", "the rounds in which its update came"),
    ("rank", "its rank, where clients have their own"),
    ("accuracy", "accuracy of the server's adapter of the last round on its own held-out examples"),
    ("loss", "its mean loss on them"),
    ("test_accuracy", "accuracy of the same on the common test images"),
    ("local_only_accuracy", "what it reaches without the others, on the common test images"),
    ("local_only_held_out_accuracy", "what it reaches without the others, on its own held-out examples"),
    ("personal_accuracy", "accuracy of its own adapter on its own held-out examples, where clients have one"),
    ("personal_adapter", "whether that is its `own` or, because it has none, the `server`'s"),
    ("personal_test_accuracy", "accuracy of its own adapter on the common test images, of those also trained alone"),
)
"""The columns of `clients.csv`, in their order."""


def client_columns(
    experiment: Experiment, results: ClientResults, local_only: LocalOnlyResults, records: Sequence[RoundRecord]
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
        "test_accuracy": _cells(np.full(len(clients), records[-1].accuracy)),
        "local_only_accuracy": _cells(local_only.test),
        "local_only_held_out_accuracy": _cells(local_only.held_out),
    }
    if any(client.name is not None for client in clients):
        columns["name"] = [client.name for client in clients]
    if results.own is not None and results.has_own is not None:
        columns["personal_accuracy"] = _cells(results.own)
        columns["personal_adapter"] = ["own" if has_own else "server" for has_own in results.has_own]
    if local_only.personal_test is not None:
        columns["personal_test_accuracy"] = _cells(local_only.personal_test)
    if ranks is not None:
        columns["rank"] = ranks.tolist()
    if any(len(client.unlabelled) for client in clients):
        columns |= _pseudo_label_columns(records, [len(client.unlabelled) for client in clients])
    return {name: columns[name] for name, _ in CLIENT_COLUMNS if name in columns}


def _pseudo_label_columns(records: Sequence[RoundRecord], numbers: list[int]) -> dict[str, list[Any]]:
    """What clients' images without a label came to, in the last round that each took part in."""
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
