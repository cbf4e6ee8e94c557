"""Which of the server's models each client takes, where the server keeps several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flora.core.clusters import clusters_of
from flora.core.rng import Rng
from flora.core.states import ServerState
from flora.core.tree import State, StateLike
from flora.engine.dealing import ARRAYS
from flora.federated.federation import Federation


def chosen_clusters(federation: Federation, view: ServerState, clients: Sequence[int], rng: Rng) -> dict[int, int]:
    """The cluster whose model each of `clients` trains in the round after `view`, by id; empty without clusters."""
    strategy = federation.server.strategy
    if strategy.num_clusters == 1:
        return {}
    if strategy.is_random(view.round + 1):
        places = rng.numpy().permutation(len(clients)) % strategy.num_clusters
    else:
        places = nearest_clusters(federation, view.adapter, clients)
    return dict(zip(clients, places.tolist(), strict=True))


def nearest_clusters(federation: Federation, adapter: StateLike, clients: Sequence[int]) -> np.ndarray:
    """The cluster whose model has the lowest mean loss on each client's training examples, `(len(clients),)`.

    Of models that are the same in every number it is the first, so that rounding decides nothing between them.
    """
    models = clusters_of(adapter)
    different = [
        place for place, model in enumerate(models) if not any(_is_same(model, each) for each in models[:place])
    ]
    setup = federation.setup(1, federation.roles.trained(models[0], 1))
    tasks = [federation.task(client, models[place], setup, Rng(0)) for client in clients for place in different]
    parts = list(federation.engine.in_blocks(tasks, federation.engine.mean_losses, travel=ARRAYS))
    losses = np.concatenate([np.empty(0), *parts]).reshape(len(clients), len(different))
    return np.array(different)[losses.argmin(axis=1)]


def _is_same(one: State, other: State) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())
