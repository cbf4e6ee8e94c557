"""Train clients without the server, for comparison, and put together the adapters that clients have of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from flora.client.corrections import NoCorrection
from flora.client.personalization import OWN
from flora.client.training import LocalTraining
from flora.core import tree
from flora.core.low_rank import is_residual
from flora.core.records import ServerState
from flora.core.tree import State, StateLike
from flora.federated.federation import Federation


def train_alone(
    federation: Federation, adapter: State, clients: np.ndarray, *, advance: Callable[[int], object]
) -> State:
    """What each of `clients` reaches without the others: as many rounds from `adapter`, on its own data only.

    Returns their adapters `(len(clients), ...)`, in the order of `clients`. Nothing is averaged, nor corrected. A
    client whose round ends in numbers that are not finite stays where it was before. `advance` is told of each round
    done.
    """
    local = dataclasses.replace(federation.local, correction=NoCorrection())
    alone: dict[int, State] = {client: federation.received(adapter, client) for client in clients.tolist()}
    kept: dict[int, State] = {}
    for round in range(1, federation.num_rounds + 1):
        rng = federation.rng.child("alone", round)
        for block, result in federation.train(clients, alone, kept, round=round, rng=rng, local=local):
            for place, (client, own) in enumerate(zip(block.clients, tree.unstack(result.adapters), strict=True)):
                if result.failed_steps[place] < 0 and tree.is_finite(own):
                    alone[client] = {**alone[client], **own}
                    if result.kept[place]:
                        kept[client] = result.kept[place]
        advance(1)
    return tree.stack([alone[client] for client in clients.tolist()])


def clients_with_own_adapters(federation: Federation, state: ServerState) -> np.ndarray | None:
    """The clients whose adapters are not the server's, in order; None if no client can ever have its own.

    These are all where clients train on after the last round, else those that ever took part.
    """
    if federation.personal.at_end(federation.local) is not None:
        return np.arange(len(federation.clients))
    if not federation.own_names(state.adapter):
        return None
    return np.array(sorted(client for client, kept in state.clients.items() if tree.strip_prefix(OWN, kept)), dtype=int)


def own_adapters(
    federation: Federation, state: ServerState, clients: np.ndarray
) -> Iterator[tuple[list[int], StateLike]]:
    """The adapters of `clients` by blocks: who is in it, and what each would answer with, to be bound, `(K, ...)`.

    What is the server's of them is as clients would read it of the next broadcast.
    Where clients train on after the last round, that is done here, after whatever round it is; one that diverges then
    keeps what it had.
    """
    state = dataclasses.replace(state, adapter=federation.broadcast(state)[0])
    local = federation.personal.at_end(federation.local)
    size = federation.clients_per_block
    for start in range(0, len(clients), size):
        block = clients[start : start + size].tolist()
        own = {client: federation.own_adapter(state, client) for client in block}
        if local is not None:
            own = _trained_on(federation, state, own, local)
        residual = {name: tensor.unsqueeze(0) for name, tensor in state.adapter.items() if is_residual(name)}
        names = [name for name in state.adapter if name not in residual]
        stack = tree.stack([{name: own[client][name] for name in names} for client in block])
        yield block, federation.model.adapter.views({**stack, **residual})[-1]


def _trained_on(
    federation: Federation, state: ServerState, own: dict[int, State], local: LocalTraining
) -> dict[int, State]:
    """Where clients come to from adapters of their own, each on its examples."""
    ended = dict(own)
    rng = federation.rng.child("personal", state.round)
    names = federation.trained_ever(state.adapter)
    cohort = np.array(list(own))
    for block, result in federation.train(cohort, own, {}, round=state.round, rng=rng, names=names, local=local):
        for place, client in enumerate(block.clients):
            after = {name: tensor[place] for name, tensor in result.adapters.items()}
            if result.failed_steps[place] < 0 and tree.is_finite(after):
                ended[client] = {**own[client], **after}
            else:
                federation.log(f"client {client}'s own adapter diverged after the last round, and stays as it was")
    return ended
