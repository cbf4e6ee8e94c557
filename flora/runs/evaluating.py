"""Evaluate adapters of a run in its way: the server's, or each client's own, by blocks and processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from flora.clip.towers.towers import AdaptedClip
from flora.core import tree
from flora.core.clusters import clusters_of
from flora.core.records import Evaluation
from flora.core.states import ServerState
from flora.core.tree import StateLike
from flora.engine.dealing import ARRAYS
from flora.evaluation.accuracy import evaluate
from flora.evaluation.shares import evaluate_in_shares
from flora.experiment.build import Experiment
from flora.features.features import Features


def server_stacks(state: ServerState) -> list[tree.State | None]:
    """The server's adapter `(1, ...)`, or one for each cluster.

    None in round 0, which is the frozen model: some adapters change it at once.
    """
    return [tree.expand(each, 1) for each in clusters_of(state.adapter)] if state.round else [None]


def evaluate_adapters(
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


def of_blocks(
    experiment: Experiment,
    clients: Sequence[int],
    adapters: StateLike,
    evaluate_some: Callable[[Sequence[int], StateLike], np.ndarray],
) -> np.ndarray:
    """Evaluate each client's own of `adapters` `(K, ...)`, as many at once as fit; return all that comes of it."""
    number = len(clients)

    def block(places: Sequence[int]) -> np.ndarray:
        # A residual `(1, ...)` is the same for all.
        part = {name: tensor[places] if len(tensor) == number else tensor for name, tensor in adapters.items()}
        return evaluate_some([clients[place] for place in places], part)

    parts = experiment.federation.engine.in_blocks(range(number), block, travel=ARRAYS)
    return np.concatenate(list(parts))
