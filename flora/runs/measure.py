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
from flora.evaluation.accuracy import (
    client_macro_f1,
    client_means,
    evaluate,
    harmonic_mean,
    own_predictions,
    places_of_clients,
    spread,
    unheld_accuracies,
)
from flora.evaluation.local_only import clients_with_own_adapters, own_adapters, train_centralized, train_local_only
from flora.evaluation.metrics import ServerView, complete, computed
from flora.evaluation.several import for_each_adapter, of_rows, one_after_the_other
from flora.experiment.build import Experiment
from flora.features.features import Features
from flora.federated.clusters import nearest_clusters
from flora.federated.round import RoundResult
from flora.runs.evaluating import evaluate_adapters, of_blocks, server_stacks
from flora.runs.other_accuracies import by_template, on_other_data
from flora.runs.scenarios import ScenarioResults, measure_scenarios


@dataclass(frozen=True, eq=False)
class ClientResults:
    """Accuracies on each client's held-out examples, `(num_clients,)`, NaN where it has none.

    `server` is the server's adapter, `own` each client's own, if they have any: the server's for who has none.
    `has_own` says who has one. `losses` and `macro_f1` are the server's adapter's mean losses and macro F1 on the same
    examples. `own_predictions` `(N, 2)` has a row a held-out example, one client's after the other's: the class that
    its client's own adapter predicts and its probability, NaN where it has none. `test` is the server's adapter on the
    common test images, if they were evaluated at the same time. Where the server keeps several models, `clusters`
    says which of them fits each client best, and `server` and what goes with it are that one's. `scenarios` is what is
    measured after the last round.
    """

    server: np.ndarray
    losses: np.ndarray
    macro_f1: np.ndarray
    own: np.ndarray | None = None
    has_own: np.ndarray | None = None
    own_predictions: np.ndarray | None = None
    test: Evaluation | None = None
    clusters: np.ndarray | None = None
    scenarios: ScenarioResults | None = None


@dataclass(frozen=True, eq=False)
class CentralizedResults:
    """What training on all images in one place reaches.

    `test` is its accuracy on the common test images, `held_out` on each client's held-out examples, `(num_clients,)`,
    NaN where it has none.
    """

    test: float
    held_out: np.ndarray


@dataclass(frozen=True, eq=False)
class LocalOnlyResults:
    """Accuracies of the clients that are also trained without the others, `(num_clients,)`, NaN for who is not.

    `test` and `held_out` are what a client reaches alone, on the common test images and on its own held-out examples,
    `unheld` on the test images of classes that it has no example of. `personal_test` and `personal_unheld` are its own
    adapter of the federated run on the test images, NaN where it has none; None if no client can have one.
    `centralized` is what one client with the training images of all reaches, None if that is not asked for.
    """

    test: np.ndarray
    held_out: np.ndarray
    unheld: np.ndarray
    personal_test: np.ndarray | None = None
    personal_unheld: np.ndarray | None = None
    centralized: CentralizedResults | None = None

    @classmethod
    def of_nobody(cls, num_clients: int) -> LocalOnlyResults:
        """Where no client is trained without the others."""
        test, held_out, unheld = np.full((3, num_clients), np.nan)
        return cls(test, held_out, unheld)


def measure(
    experiment: Experiment, state: ServerState, result: RoundResult | None
) -> tuple[RoundRecord, ClientResults | None]:
    """The record of the round that led to `state` (no result: round 0), evaluated if due; the clients' accuracies."""
    config, engine = experiment.config.evaluation, experiment.federation.engine
    started = engine.seconds()
    is_last = state.round == experiment.last_round
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
    scenarios = clients.scenarios if clients is not None else None
    if scenarios is None and not state.round:
        scenarios = measure_scenarios(experiment, state)
    results |= scenarios.figures() if scenarios is not None else {}
    measured = result.metrics() if result else {}
    measured["eval_seconds"] = engine.seconds() - started
    measured["peak_memory_bytes"] = peak_memory_bytes(engine.model.device)
    return RoundRecord(
        state.round,
        complete({**results, **measured}, publishes=experiment.publishes),
        cohort=result.cohort if result else (),
        rejected_clients=result.rejected_clients if result else (),
    ), clients


def evaluate_test_images(experiment: Experiment, state: ServerState) -> Evaluation:
    """Evaluate the server's adapter on the common test images, or each cluster's, one after the other."""
    keeps = experiment.config.evaluation.auroc
    stacks = server_stacks(state)
    return one_after_the_other(
        [evaluate_adapters(experiment, stack, experiment.test, keep_probabilities=keeps)[0] for stack in stacks]
    )


def _measure_server(experiment: Experiment, state: ServerState, evaluation: Evaluation) -> dict[str, Any]:
    """Return what a round's record says of the server's adapter; `evaluation` is it on the common test images."""
    labels = for_each_adapter(experiment.test.labels.cpu().numpy(), evaluation)
    domains = experiment.test_domains
    domains = None if domains is None else for_each_adapter(domains, evaluation)
    results = computed(ServerView(state, evaluation, labels, experiment.class_names, domains))
    results["unheld_accuracy"] = _mean(unheld_accuracies(evaluation.correct[None], labels, experiment.held_classes))
    is_warm = experiment.federation.server_training.synthetic is not None
    if not state.round and (is_warm or experiment.has_start):
        begun = tree.expand(experiment.initial_adapter, 1)
        name = "warm_up_accuracy" if is_warm else "start_accuracy"
        results[name] = evaluate_adapters(experiment, begun, experiment.test)[0].accuracy
    accuracy_of = partial(_accuracy, experiment, server_stacks(state))
    results |= by_template(experiment, accuracy_of)
    if state.round in (0, experiment.config.rounds):
        results |= on_other_data(experiment, accuracy_of)
    if state.round and not experiment.federation.communication.broadcast.is_identity:
        _, view = experiment.federation.broadcast(state)
        accuracy = _accuracy(experiment, server_stacks(view), experiment.federation.engine.model, experiment.test)
        results |= {"broadcast_accuracy": accuracy, "model_privacy_gap": evaluation.accuracy - accuracy}
    if experiment.new is not None:
        accuracy = accuracy_of(experiment.new.model, experiment.new.features)
        results |= {"new_accuracy": accuracy, "harmonic_mean": harmonic_mean(evaluation.accuracy, accuracy)}
    return results


def _accuracy(
    experiment: Experiment, stacks: Sequence[StateLike | None], model: AdaptedClip, features: Features
) -> float:
    """The mean accuracy of adapters `(1, ...)`, or of the frozen model for None, in `model` on `features`."""
    accuracies = [evaluate_adapters(experiment, stack, features, model)[0].accuracy for stack in stacks]
    return sum(accuracies) / len(accuracies)


def _mean(accuracies: np.ndarray) -> float | None:
    """The mean of those that are not NaN; None if all are."""
    known = accuracies[~np.isnan(accuracies)]
    return float(known.mean()) if len(known) else None


def _figures(whose: str, accuracies: np.ndarray | None, sizes: np.ndarray) -> dict[str, float]:
    """The spread of accuracies over clients and their mean weighted by `sizes`, as fields of a record."""
    statistics = None if accuracies is None else spread(accuracies)
    if accuracies is None or statistics is None:
        return {}
    known = ~np.isnan(accuracies)
    figures = {**asdict(statistics), "weighted_mean": float(np.average(accuracies[known], weights=sizes[known]))}
    return {f"{whose}_accuracy_{name}": each for name, each in figures.items()}


def measure_clients(experiment: Experiment, state: ServerState) -> ClientResults:
    """Accuracy on each client's held-out examples, and after the last round what the scenarios ask for."""
    results = _on_held_out(experiment, state)
    is_last = state.round == experiment.last_round
    return replace(results, scenarios=measure_scenarios(experiment, state)) if is_last else results


def _on_held_out(experiment: Experiment, state: ServerState) -> ClientResults:
    """Accuracy on each client's held-out examples."""
    sizes, federation = experiment.held_out_sizes, experiment.federation
    with_own = clients_with_own_adapters(federation, state)
    server, losses, f1 = (np.full(len(sizes), np.nan) for _ in range(3))
    stacks, clusters = server_stacks(state), None
    if len(stacks) > 1:
        clusters = nearest_clusters(federation, state.adapter, range(len(sizes)))
    if len(experiment.held_out):
        evaluations = [evaluate_adapters(experiment, stack, experiment.held_out)[0] for stack in stacks]
        evaluation = evaluations[0] if clusters is None else of_rows(evaluations, np.repeat(clusters, sizes))
        server, losses = client_means(evaluation.correct, sizes), client_means(evaluation.losses, sizes)
        labels = experiment.held_out.labels.cpu().numpy()
        f1 = client_macro_f1(labels, evaluation.predicted, sizes, len(experiment.class_names))
    if with_own is None:
        return ClientResults(server, losses, f1, clusters=clusters)
    predictions = np.full((len(experiment.held_out), 2), np.nan)
    for clients, adapters in own_adapters(federation, state, with_own[sizes[with_own] > 0]):
        said = of_blocks(experiment, clients, adapters, partial(_predicted_of_held_out, experiment))
        predictions[np.concatenate(places_of_clients(sizes, clients))] = said
    is_own = np.isin(np.arange(len(sizes)), with_own)
    right = predictions[:, 0] == experiment.held_out.labels.cpu().numpy()
    own = np.where(is_own, client_means(right, sizes), server)
    return ClientResults(server, losses, f1, own, is_own, predictions)


def _predicted_of_held_out(experiment: Experiment, clients: Sequence[int], adapters: StateLike) -> np.ndarray:
    """What each of `adapters` `(K, ...)` predicts of its client's held-out examples, one client's after the other's.

    Returns `(N, 2)`, the class and its probability.
    """
    config = experiment.config.evaluation
    predictions = own_predictions(
        experiment.federation.engine.model,
        adapters,
        experiment.held_out,
        places_of_clients(experiment.held_out_sizes, clients),
        batch_size=config.batch_size,
        prediction=config.prediction,
    )
    return np.stack([predictions.classes, predictions.probabilities], axis=1)


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
    results = LocalOnlyResults.of_nobody(len(federation.clients))
    own = federation.engine.model.adapter.models(adapters)[-1]
    clients = chosen.tolist()
    results.test[chosen], results.unheld[chosen] = _of_test_images(experiment, clients, own)
    predicted = of_blocks(experiment, clients, own, partial(_predicted_of_held_out, experiment))[:, 0]
    sizes = experiment.held_out_sizes
    labels = experiment.held_out.labels.cpu().numpy()[np.concatenate(places_of_clients(sizes, clients))]
    results.held_out[chosen] = client_means(predicted == labels, sizes[chosen])
    with_own = clients_with_own_adapters(federation, state)
    if with_own is None:
        return results
    personal, unheld = (np.full(len(federation.clients), np.nan) for _ in range(2))
    for clients, own in own_adapters(federation, state, np.intersect1d(chosen, with_own)):
        personal[clients], unheld[clients] = _of_test_images(experiment, clients, own)
    return replace(results, personal_test=personal, personal_unheld=unheld)


def measure_centralized(experiment: Experiment, *, advance: Callable[[int], object]) -> CentralizedResults:
    """Train one client on the training images of all, and evaluate it. `advance` is told of each round done."""
    federation, sizes = experiment.federation, experiment.held_out_sizes
    trained = train_centralized(federation, experiment.initial_adapter, advance=advance)
    adapter = federation.engine.model.adapter.models(trained)[-1]
    held_out = np.full(len(sizes), np.nan)
    if len(experiment.held_out):
        held_out = client_means(evaluate_adapters(experiment, adapter, experiment.held_out)[0].correct, sizes)
    return CentralizedResults(evaluate_adapters(experiment, adapter, experiment.test)[0].accuracy, held_out)


def _of_test_images(
    experiment: Experiment, clients: Sequence[int], adapters: StateLike
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of each client's own of `adapters` on all test images, and on those of classes not held, `(K,)`."""
    accuracies = of_blocks(experiment, clients, adapters, lambda some, part: _on_test_images(experiment, some, part))
    return accuracies[:, 0], accuracies[:, 1]


def local_only_figures(results: LocalOnlyResults) -> dict[str, Any]:
    """Return what the summary says of the clients that are trained without the others, on the common test images."""
    accuracies = results.test[~np.isnan(results.test)].tolist()
    return {
        "num_local_only": len(accuracies),
        "local_only_accuracy_mean": sum(accuracies) / len(accuracies) if accuracies else None,
        "local_only_accuracy_best": max(accuracies, default=None),
        "local_only_unheld_accuracy": _mean(results.unheld),
        "personal_unheld_accuracy": None if results.personal_unheld is None else _mean(results.personal_unheld),
        "centralized_accuracy": None if results.centralized is None else results.centralized.test,
    }


def compare_held_out(results: ClientResults, local_only: LocalOnlyResults) -> dict[str, Any]:
    """The summary's `held_out_...`: means over the clients that were also trained alone and have held-out examples."""
    both = ~np.isnan(results.server) & ~np.isnan(local_only.held_out)
    number = int(both.sum())
    if not number:
        return {"held_out_num_clients": 0}
    figures = {"federated": results.server, "local_only": local_only.held_out, "personal": results.own}
    if local_only.centralized is not None:
        figures["centralized"] = local_only.centralized.held_out
    means = {
        f"held_out_{how}_accuracy": float(accuracies[both].mean())
        for how, accuracies in figures.items()
        if accuracies is not None
    }
    return {"held_out_num_clients": number, **means}
