"""The server's state as tensors by name, and back: how checkpoints store it.

`server` holds `optimizer.NAME`, `correction.NAME`, `privacy.NAME` and `clock`; each client's state holds
`optimizer.NAME`, `correction.NAME`, `own.NAME`, `feedback.NAME`, and of an update that is on its way
`in_flight.NAME` and `in_flight.delta.NAME`, or `dropped.NAME` where none will come.
"""

from __future__ import annotations

import dataclasses

import torch

from flora.core import tree
from flora.core.states import ClientState, ClientUpdate, InFlight, ServerState
from flora.core.tree import State, StateLike

# The numbers of an update on its way, and of when it arrives; an update's `extra` is not kept.
UPDATE_NUMBERS = ("client", "num_examples", "loss", "num_steps", "num_bytes")


def server_tensors(state: ServerState) -> State:
    """All of a server's state but its round, its adapter and its clients."""
    clock = torch.tensor([state.clock], dtype=torch.float64)
    named = tree.add_prefix("optimizer.", state.optimizer) | tree.add_prefix("correction.", state.correction)
    return named | tree.add_prefix("privacy.", state.privacy) | {"clock": clock}


def server_state(round: int, adapter: State, server: StateLike, clients: dict[int, ClientState]) -> ServerState:
    """The inverse of `server_tensors`, with the other parts of the state."""
    return ServerState(
        round,
        adapter,
        optimizer=tree.strip_prefix("optimizer.", server),
        correction=tree.strip_prefix("correction.", server),
        clock=float(server["clock"]),
        clients=clients,
        privacy=tree.strip_prefix("privacy.", server),
    )


def client_tensors(state: ClientState) -> State:
    """A client's state."""
    named: State = {}
    for part in ("optimizer", "correction", "own", "feedback"):
        named |= tree.add_prefix(f"{part}.", getattr(state, part))
    return named if state.in_flight is None else named | _in_flight_tensors(state.in_flight)


def client_state(named: StateLike) -> ClientState:
    """The inverse of `client_tensors`."""
    parts = {part: tree.strip_prefix(f"{part}.", named) for part in ("optimizer", "correction", "own", "feedback")}
    in_flight = None
    if "dropped.round" in named:
        in_flight = InFlight(int(named["dropped.round"]), float(named["dropped.arrival_seconds"]), None)
    elif "in_flight.round" in named:
        in_flight = _in_flight(tree.strip_prefix("in_flight.", named))
    return ClientState(**parts, in_flight=in_flight)


def client_layout(like: ClientState) -> State:
    """Names, types and shapes of all that a client's state may hold; `like` has an update on its way if one may be."""
    layout = client_tensors(like)
    if like.in_flight is not None:
        layout |= _in_flight_tensors(dataclasses.replace(like.in_flight, update=None))
    return layout


def _in_flight_tensors(in_flight: InFlight) -> State:
    numbers: dict[str, float] = {"round": in_flight.round, "arrival_seconds": in_flight.arrival_seconds}
    update = in_flight.update
    if update is None:
        return tree.add_prefix("dropped.", {name: _number(value) for name, value in numbers.items()})
    numbers |= {name: getattr(update, name) for name in UPDATE_NUMBERS}
    numbers["failed_step"] = -1 if update.failed_step is None else update.failed_step
    tensors = {name: _number(value) for name, value in numbers.items()} | tree.add_prefix("delta.", update.delta)
    return tree.add_prefix("in_flight.", tensors)


def _in_flight(named: StateLike) -> InFlight:
    failed_step = int(named["failed_step"])
    update = ClientUpdate(
        client=int(named["client"]),
        num_examples=int(named["num_examples"]),
        delta=tree.strip_prefix("delta.", named),
        loss=float(named["loss"]),
        num_steps=int(named["num_steps"]),
        num_bytes=int(named["num_bytes"]),
        failed_step=None if failed_step < 0 else failed_step,
    )
    return InFlight(int(named["round"]), float(named["arrival_seconds"]), update)


def _number(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)
