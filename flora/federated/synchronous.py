"""One synchronous round: broadcast the adapter, train the cohort, collect the updates that arrive."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from flora.client.personalization import OWN
from flora.client.training import CORRECTION, BlockResult
from flora.communication.network import CohortOutcome
from flora.communication.options import FEEDBACK, payload_bytes
from flora.core import tree
from flora.core.records import ClientUpdate, ServerState
from flora.core.rng import Rng
from flora.core.tree import State, StateLike
from flora.data.batching import ClientBlock
from flora.federated.federation import Federation


@dataclass(frozen=True, eq=False)
class Delivery:
    """What comes back in a round.

    `updates` are in the order of ids, so that sums don't depend on how the cohort was cut into blocks; `begin` is what
    each client trained from, `there` the state as clients see it. `kept` is what all clients carry from now on, by id,
    and `before` what they carry if their update is left out. `staleness` is by how many rounds each update is late.
    """

    updates: list[ClientUpdate]
    begin: Mapping[int, State]
    there: ServerState
    before: Mapping[int, State]
    kept: dict[int, State]
    trip: CohortOutcome
    uplink_bytes: int
    downlink_bytes: int
    staleness: list[int] = field(default_factory=list)


def deliver(federation: Federation, state: ServerState, rng: Rng) -> Delivery:
    """Ask a cohort for updates, and wait for them."""
    round = state.round + 1
    received, downlink_bytes = broadcast(federation, state)
    there = dataclasses.replace(state, adapter=received)
    trip = federation.trip(state, rng, downlink_bytes=downlink_bytes)
    begin = {client: start_of(federation, there, client) for client in trip.clients.tolist()}
    updates, kept = trained(federation, there, begin, rng)
    # What comes too late has travelled all the same.
    late = sum(federation.uplink_bytes(state.adapter, round, client) for client in trip.late)
    return Delivery(
        updates=updates,
        begin=begin,
        there=there,
        before=state.clients,
        kept={**state.clients, **kept},
        trip=trip,
        uplink_bytes=sum(update.num_bytes for update in updates) + late,
        downlink_bytes=sum(downlink_bytes(client) for client in trip.asked),
    )


def broadcast(federation: Federation, state: ServerState) -> tuple[State, Callable[[int], int]]:
    """The adapter as clients get it, and how many bytes go to a client."""
    received, sent = federation.broadcast(state)
    is_extra = federation.local.correction.is_broadcast
    extra = {name: tensor for name, tensor in state.strategy.items() if is_extra and name.startswith(CORRECTION)}

    def downlink_bytes(client: int) -> int:
        if isinstance(sent, bytes):
            return len(sent) + (payload_bytes(extra) if extra else 0)
        return federation.payload_bytes({**sent, **extra}, client)

    return received, downlink_bytes


def start_of(federation: Federation, there: ServerState, client: int) -> State:
    """What a client trains from: the server's adapter, with what the strategy or the adapter leaves with clients."""
    if federation.personal.in_round(federation.local) is not None:  # what it keeps is another adapter
        return federation.received(there.adapter, client)
    return federation.own_adapter(there, client)


def trained(
    federation: Federation, there: ServerState, begin: Mapping[int, State], rng: Rng
) -> tuple[list[ClientUpdate], dict[int, State]]:
    """What the clients in `begin` send, in the order of ids, and what each keeps, if anything."""
    updates: list[ClientUpdate] = []
    kept: dict[int, State] = {}
    memory = tree.strip_prefix(CORRECTION, there.strategy)
    for block, result in federation.train(
        np.array(list(begin)), begin, there.clients, round=there.round + 1, rng=rng, server_memory=memory
    ):
        for place, client in enumerate(block.clients):
            lost = tree.strip_prefix(FEEDBACK, there.clients.get(client, {}))
            update, own = _update(federation, begin[client], block, result, place, lost, rng)
            updates.append(update)
            if own:
                kept[client] = own
    return sorted(updates, key=lambda update: update.client), kept


def _update(
    federation: Federation,
    begin: State,
    block: ClientBlock,
    result: BlockResult,
    place: int,
    lost: StateLike,
    rng: Rng,
) -> tuple[ClientUpdate, State]:
    """What one client of a block sends, which began with `begin` and `lost` some of its last deltas; what it keeps."""
    client, num_steps = block.clients[place], block.num_steps[place]
    trained = {name: tensor[place] for name, tensor in result.adapters.items()}
    # Copies, so that no client keeps its whole block in memory.
    own = {name: tensor.clone() for name, tensor in trained.items() if federation.stays(name)}
    failed_step = int(result.failed_steps[place])
    if failed_step < 0 and not tree.is_finite(own):
        failed_step = num_steps - 1
    delta = {name: tensor - begin[name] for name, tensor in trained.items() if name not in own}
    extra = tree.add_prefix(CORRECTION, result.sent[place])
    delta, lost, num_bytes = federation.upload(delta, lost, extra, client, rng.child("client", client, "upload"))
    update = ClientUpdate(
        client=client,
        num_examples=int(federation.sizes[client]),
        delta=delta,
        num_bytes=num_bytes,
        loss=float(result.losses[place]),
        num_steps=num_steps,
        extra=result.sent[place],
        failed_step=failed_step if failed_step >= 0 else None,
    )
    return update, result.kept[place] | tree.add_prefix(OWN, own) | tree.add_prefix(FEEDBACK, lost)
