"""Measure what single scenarios ask for: clients that never train, and classes that only other clients hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flora.client.personalization import FineTuning
from flora.core.states import ServerState
from flora.core.tree import StateLike
from flora.evaluation.accuracy import client_means, harmonic_mean, own_accuracies, places_of_clients
from flora.evaluation.held_classes import accuracies_by_holding
from flora.evaluation.local_only import clients_with_own_adapters, own_adapters
from flora.experiment.build import Experiment
from flora.runs.evaluating import evaluate_adapters, of_blocks, server_stacks


@dataclass(frozen=True, eq=False)
class UnseenResults:
    """Accuracies of the clients that never train, on the examples that each holds out, `(num_unseen,)`; NaN without.

    `server` is the server's adapter, `tuned` what one pass over a client's training examples makes of it; NaN in
    round 0.
    """

    server: np.ndarray
    tuned: np.ndarray


@dataclass(frozen=True, eq=False)
class ScenarioResults:
    """What the scenarios ask for, None where they don't.

    `by_holding` `(num_clients, 2)` are accuracies on the test images of the classes that a client holds, and of the
    others, with its own adapter or the server's; NaN where there are none.
    """

    unseen: UnseenResults | None = None
    by_holding: np.ndarray | None = None

    def figures(self) -> dict[str, Any]:
        """Return what a round's record says of them."""
        figures: dict[str, Any] = {}
        if self.unseen is not None:
            figures |= _mean_and_deviation("unseen_accuracy", self.unseen.server)
            figures |= _mean_and_deviation("unseen_tuned_accuracy", self.unseen.tuned)
        if self.by_holding is not None:
            figures |= _mean_and_deviation("held_class_accuracy", self.by_holding[:, 0])
            figures |= _mean_and_deviation("other_class_accuracy", self.by_holding[:, 1])
            if {"held_class_accuracy", "other_class_accuracy"} <= figures.keys():
                figures["held_other_harmonic_mean"] = harmonic_mean(
                    figures["held_class_accuracy"], figures["other_class_accuracy"]
                )
        return figures


def _mean_and_deviation(name: str, accuracies: np.ndarray) -> dict[str, float]:
    """The mean and the deviation (n) of those that are not NaN, by name; nothing if all are."""
    known = accuracies[~np.isnan(accuracies)]
    return {name: float(known.mean()), f"{name}_std": float(known.std())} if len(known) else {}


def measure_scenarios(experiment: Experiment, state: ServerState) -> ScenarioResults:
    """Measure the server's adapter and the clients' own after a round; of round 0, the frozen model."""
    return ScenarioResults(
        _unseen(experiment, state) if experiment.unseen else None,
        _by_holding(experiment, state) if experiment.config.evaluation.held_classes else None,
    )


def _unseen(experiment: Experiment, state: ServerState) -> UnseenResults:
    """Evaluate the server's adapter on the clients that never train, and after a round let each fine-tune it."""
    federation, features = experiment.federation, experiment.unseen_held_out
    sizes = np.array([len(client.held_out) for client in experiment.unseen])
    server, tuned = np.full((2, len(sizes)), np.nan)
    if not len(features):
        return UnseenResults(server, tuned)
    server = client_means(evaluate_adapters(experiment, server_stacks(state)[0], features)[0].correct, sizes)
    if not state.round:
        return UnseenResults(server, tuned)
    first = len(federation.clients)
    with_them = replace(
        federation.with_clients([*federation.clients, *experiment.unseen]),
        personal=FineTuning(epochs=1),
        ranks=None,
        rng=federation.rng.child("unseen"),
    )

    def accuracies(clients: Sequence[int], adapters: StateLike) -> np.ndarray:
        config = experiment.config.evaluation
        return own_accuracies(
            federation.engine.model,
            adapters,
            features,
            places_of_clients(sizes, np.array(clients) - first),
            batch_size=config.batch_size,
            prediction=config.prediction,
        )

    for clients, adapters in own_adapters(with_them, replace(state, clients={}), first + np.flatnonzero(sizes)):
        tuned[np.array(clients) - first] = of_blocks(experiment, clients, adapters, accuracies)
    return UnseenResults(server, tuned)


def _by_holding(experiment: Experiment, state: ServerState) -> np.ndarray:
    """Accuracies `(num_clients, 2)` on test images of the classes that each client holds, and of the others."""
    federation, config, holds = experiment.federation, experiment.config.evaluation, experiment.held_classes

    def accuracies(holds: np.ndarray, adapters: StateLike) -> np.ndarray:
        return accuracies_by_holding(
            federation.engine.model,
            adapters,
            experiment.test,
            holds,
            batch_size=max(1, config.batch_size // len(holds)),
            prediction=config.prediction,
        )

    # Clients that hold the same classes are one to an adapter that all of them have.
    kinds, places = np.unique(holds, axis=0, return_inverse=True)
    server = server_stacks(state)[0] or {}
    measured = of_blocks(
        experiment, range(len(kinds)), server, lambda some, part: accuracies(kinds[np.array(some)], part)
    )[places.reshape(-1)]
    with_own = clients_with_own_adapters(federation, state) if state.round else None
    if with_own is not None:
        for clients, adapters in own_adapters(federation, state, with_own):
            measured[clients] = of_blocks(
                experiment, clients, adapters, lambda some, part: accuracies(holds[np.array(some)], part)
            )
    return measured
