"""Train clients without the server, for comparison, and put together the adapters that clients have of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flora.client.corrections import NoCorrection
from flora.client.local_training import LocalTraining
from flora.core import tree
from flora.core.low_rank import is_residual
from flora.core.states import FRESH, ClientData, ClientState, ServerState
from flora.core.tree import State, StateLike
from flora.federated.federation import Federation


def train_local_only(
    federation: Federation, adapter: State, clients: np.ndarray, *, advance: Callable[[int], object]
) -> State:
    """Train each of `clients` without the others: as many rounds from `adapter`, on its own data only.

    Returns their adapters `(len(clients), ...)`, in the order of `clients`. Nothing is averaged, nor corrected. A
    client whose round ends in numbers that are not finite stays where it was before. `advance` is told of each round
    done.
    """
    local = dataclasses.replace(federation.local.alone, correction=NoCorrection())
    adapters: dict[int, State] = {client: federation.received(adapter, client) for client in clients.tolist()}
    states: dict[int, ClientState] = {}
    for round in range(1, federation.num_rounds + 1):
        rng = federation.rng.child("alone", round)
        setup = federation.setup(round, federation.roles.trained(adapter, round), local)
        tasks = [
            dataclasses.replace(federation.task(client, start, setup, rng), state=states.get(client, FRESH))
            for client, start in adapters.items()
        ]
        for result in federation.engine.train(tasks):
            if result.is_finite:
                adapters[result.client] = {**adapters[result.client], **result.adapter}
                states[result.client] = result.state
        advance(1)
    return tree.stack([adapters[client] for client in clients.tolist()])


def train_centralized(federation: Federation, adapter: State, *, advance: Callable[[int], object]) -> State:
    """Train one client on the training examples of all, as `train_local_only` does; return its adapter `(1, ...)`.

    An example that several clients have is there once.
    """
    train, unlabelled = (
        np.unique(np.concatenate([getattr(client, kind) for client in federation.clients]))
        for kind in ("train", "unlabelled")
    )
    everyone = ClientData(train, np.empty(0, np.int64), unlabelled=np.setdiff1d(unlabelled, train))
    in_one_place = dataclasses.replace(
        federation.with_clients([everyone]), ranks=None, rng=federation.rng.child("centralized")
    )
    return train_local_only(in_one_place, adapter, np.array([0]), advance=advance)


def clients_with_own_adapters(federation: Federation, state: ServerState) -> np.ndarray | None:
    """The sorted ids `(N,)` of clients whose adapters are not the server's; None if no client can ever have its own.

    These are all where clients train on after the last round, else those that ever took part.
    """
    if federation.personal.at_end(federation.local) is not None:
        return np.arange(len(federation.clients))
    if not federation.roles.own(state.adapter):
        return None
    return np.array(sorted(client for client, carried in state.clients.items() if carried.own), dtype=int)


def own_adapters(
    federation: Federation, state: ServerState, clients: np.ndarray
) -> Iterator[tuple[list[int], StateLike]]:
    """The adapters of `clients` by groups: who is in it, and what each would answer with, to be bound, `(K, ...)`.

    What is the server's of them is as clients would read it of the next broadcast.
    Where clients train on after the last round, that is done here, after whatever round it is; one that diverges then
    keeps what it had.
    """
    _, view = federation.broadcast(state)
    local = federation.personal.at_end(federation.local)
    residual = {name: tensor.unsqueeze(0) for name, tensor in view.adapter.items() if is_residual(name)}

    def together(group: Sequence[int]) -> tuple[list[int], StateLike]:
        adapters = {client: federation.client_adapter(view, client) for client in group}
        if local is not None:
            adapters = _trained_on(federation, view, adapters, local)
        names = [name for name in view.adapter if name not in residual]
        stack = tree.stack([tree.select(adapters[client], names) for client in group])
        return list(group), federation.engine.model.adapter.models({**stack, **residual})[-1]

    yield from federation.engine.in_blocks(clients.tolist(), together)


def _trained_on(
    federation: Federation, view: ServerState, adapters: dict[int, State], local: LocalTraining
) -> dict[int, State]:
    """Fine-tune each client's adapter on its examples; return them by client id. One that diverges stays as it was."""
    tuned = dict(adapters)
    rng = federation.rng.child("personal", view.round)
    setup = federation.setup(view.round, federation.roles.ever_trained(view.adapter), local)
    for result in federation.engine.train(
        [federation.task(client, each, setup, rng) for client, each in adapters.items()]
    ):
        if result.is_finite:
            tuned[result.client] = {**adapters[result.client], **result.adapter}
        else:
            federation.engine.log(
                f"client {result.client}'s own adapter diverged after the last round, and stays as it was"
            )
    return tuned
