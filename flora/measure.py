"""How good what a run has come to is: records, and results by client."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flora import tree
from flora.experiment import Experiment
from flora.federated.apart import clients_with_own_adapters, own_adapters, train_alone
from flora.federated.evaluation import (
    class_accuracy,
    client_accuracies,
    evaluate,
    harmonic_mean,
    own_accuracies,
    spread,
)
from flora.federated.memory import peak_memory_bytes
from flora.federated.round import RoundResult
from flora.records import Evaluation, RoundRecord, ServerState


@dataclass(frozen=True, eq=False)
class ClientResults:
    """Accuracies on each client's held-out examples, `(num_clients,)`, NaN where it has none.

    `server` is the server's adapter, `own` each client's own, if they have any: the server's for who has none.
    """

    server: np.ndarray
    own: np.ndarray | None


def measure(
    experiment: Experiment, state: ServerState, result: RoundResult | None
) -> tuple[RoundRecord, ClientResults | None]:
    """The record of the round that led to `state` (no result: round 0), evaluated if due; the clients' accuracies."""
    config, started = experiment.config.evaluation, time.perf_counter()
    is_last = state.round == experiment.config.rounds
    results: dict[str, Any] = {}
    clients: ClientResults | None = None
    if is_last or state.round % config.every == 0:
        results = _measure_server(experiment, state)
    if is_last or (config.clients_every and state.round and state.round % config.clients_every == 0):
        clients = measure_clients(experiment, state)
    if clients is not None:
        results |= _figures("client", clients.server) | _figures("personal", clients.own)
    return RoundRecord(
        round=state.round,
        accuracy=results.pop("accuracy", None),
        loss=results.pop("loss", None),
        train_loss=result.train_loss if result else None,
        num_clients=result.num_clients if result else 0,
        uplink_bytes=result.uplink_bytes if result else 0,
        downlink_bytes=result.downlink_bytes if result else 0,
        train_seconds=result.train_seconds if result else 0.0,
        eval_seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(experiment.federation.model.device),
        learning_rate=result.learning_rate if result else None,
        num_steps=result.num_steps if result else 0,
        num_examples=result.num_examples if result else 0,
        aggregation_error=result.aggregation_error if result else None,
        rejected_clients=result.rejections if result else (),
        simulated_seconds=result.simulated_seconds if result else None,
        num_dropped=result.num_dropped if result else 0,
        num_late=result.num_late if result else 0,
        mean_staleness=result.mean_staleness if result else None,
        **results,
    ), clients


def _measure_server(experiment: Experiment, state: ServerState) -> dict[str, Any]:
    """What a round's record says of the server's adapter on the common test images."""
    stack = _server_stack(state)
    model, size = experiment.federation.model, experiment.config.evaluation.batch_size
    evaluation = evaluate(model, stack, experiment.test, batch_size=size)[0]
    by_class = class_accuracy(evaluation, experiment.test.labels.cpu().numpy(), experiment.class_names)
    results = {"accuracy": evaluation.accuracy, "loss": evaluation.loss, "class_accuracy": by_class}
    if state.round and not experiment.federation.communication.broadcast.is_identity:
        read, _ = experiment.federation.broadcast(state)
        accuracy = evaluate(model, tree.expand(read, 1), experiment.test, batch_size=size)[0].accuracy
        results |= {"broadcast_accuracy": accuracy, "model_privacy_gap": evaluation.accuracy - accuracy}
    if experiment.new is not None:
        new_model, features = experiment.new
        accuracy = evaluate(new_model, stack, features, batch_size=size)[0].accuracy
        results |= {"new_accuracy": accuracy, "harmonic_mean": harmonic_mean(evaluation.accuracy, accuracy)}
    return results


def _server_stack(state: ServerState) -> tree.State | None:
    """The server's adapter `(1, ...)`; None in round 0, which is the frozen model: some adapters change it at once."""
    return tree.expand(state.adapter, 1) if state.round else None


def _figures(whose: str, accuracies: np.ndarray | None) -> dict[str, float]:
    """The spread of accuracies over clients, as fields of a record."""
    found = None if accuracies is None else spread(accuracies)
    return {f"{whose}_accuracy_{name}": each for name, each in asdict(found).items()} if found else {}


def measure_clients(experiment: Experiment, state: ServerState) -> ClientResults:
    """Accuracy on each client's held-out examples."""
    sizes, federation = experiment.held_out_sizes, experiment.federation
    size = experiment.config.evaluation.batch_size
    with_own = clients_with_own_adapters(federation, state)
    server = np.full(len(sizes), np.nan)
    if len(experiment.held_out):
        evaluation = evaluate(federation.model, _server_stack(state), experiment.held_out, batch_size=size)[0]
        server = client_accuracies(evaluation, sizes)
    if with_own is None:
        return ClientResults(server, None)
    own, ends = server.copy(), np.cumsum(sizes)
    for clients, adapters in own_adapters(federation, state, with_own[sizes[with_own] > 0]):
        examples = [np.arange(ends[client] - sizes[client], ends[client]) for client in clients]
        own[clients] = own_accuracies(federation.model, adapters, experiment.held_out, examples, batch_size=size)
    return ClientResults(server, own)


def measure_alone(experiment: Experiment, *, advance: Callable[[int], object]) -> dict[int, float]:
    """Test accuracy, by client, of `evaluation.num_alone` clients that train without the others.

    `advance` is told of each round done.
    """
    number, federation = experiment.config.evaluation.num_alone, experiment.federation
    chosen = np.unique(np.linspace(0, len(federation.clients) - 1, number).round().astype(int))
    adapters = train_alone(federation, experiment.initial_adapter, chosen, advance=advance)
    results: list[Evaluation] = []
    for start in range(0, len(chosen), federation.clients_per_block):
        block = {name: tensor[start : start + federation.clients_per_block] for name, tensor in adapters.items()}
        size = max(1, experiment.config.evaluation.batch_size // len(next(iter(block.values()))))
        own = federation.model.adapter.views(block)[-1]
        results += evaluate(federation.model, own, experiment.test, batch_size=size)
    return {int(client): result.accuracy for client, result in zip(chosen, results, strict=True)}


def client_columns(experiment: Experiment, results: ClientResults, alone: dict[int, float]) -> dict[str, list[Any]]:
    """The columns of `clients.csv` by name, with an entry for each client; a missing result is empty text."""
    federation = experiment.federation
    clients = federation.clients

    def cells(accuracies: np.ndarray) -> list[str]:
        return ["" if np.isnan(accuracy) else f"{accuracy:.6f}" for accuracy in accuracies]

    columns: dict[str, list[Any]] = {
        "client": list(range(len(clients))),
        "num_train": [len(client.train) for client in clients],
        "num_held_out": [len(client.held_out) for client in clients],
        "accuracy": cells(results.server),
        "alone_accuracy": [f"{alone[index]:.6f}" if index in alone else "" for index in range(len(clients))],
    }
    if results.own is not None:
        columns["personal_accuracy"] = cells(results.own)
    if federation.ranks is not None:
        columns["rank"] = federation.ranks.tolist()
    return columns
