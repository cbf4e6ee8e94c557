"""Store updates that are still on their way to the server as tensors, so that checkpoints can hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from flora.core import tree
from flora.core.records import ClientUpdate
from flora.core.tree import State, StateLike

# What precedes the names of an update that is on its way; when a client would have delivered that is gone.
PENDING = "pending."
GONE = "gone.arrival"


def is_on_its_way(own: StateLike) -> bool:
    """Whether the client's update has not arrived yet."""
    return f"{PENDING}arrival" in own


def is_gone(own: StateLike) -> bool:
    """Whether the client was asked, and will not deliver."""
    return GONE in own


def arrival(own: StateLike) -> float:
    """When the client delivers, or would have, in seconds on the simulated clock."""
    return float(own[GONE if is_gone(own) else f"{PENDING}arrival"])


def without(own: StateLike) -> State:
    """What else the client keeps."""
    return {name: tensor for name, tensor in own.items() if not name.startswith(PENDING) and name != GONE}


def gone(arrival: float) -> State:
    """A client that will not deliver."""
    return {GONE: _number(arrival)}


def write(round: int, update: ClientUpdate, arrival: float) -> State:
    """An update that was asked for in a round. What is sent beside its delta is not kept."""
    numbers = {
        "arrival": arrival,
        "round": round,
        "loss": update.loss,
        "num_steps": update.num_steps,
        "num_bytes": update.num_bytes,
        "failed_step": -1 if update.failed_step is None else update.failed_step,
    }
    own = {name: _number(value) for name, value in numbers.items()} | tree.add_prefix("delta.", update.delta)
    return tree.add_prefix(PENDING, own)


def read(client: int, own: StateLike, num_examples: int) -> tuple[int, ClientUpdate]:
    """The inverse of `write`: the round, and the update."""
    found = tree.strip_prefix(PENDING, own)
    failed_step = int(found["failed_step"])
    return int(found["round"]), ClientUpdate(
        client=client,
        num_examples=num_examples,
        delta=tree.strip_prefix("delta.", found),
        loss=float(found["loss"]),
        num_steps=int(found["num_steps"]),
        num_bytes=int(found["num_bytes"]),
        failed_step=None if failed_step < 0 else failed_step,
    )


def like(sent: StateLike) -> State:
    """Names and shapes of all this, for clients that send such tensors."""
    update = ClientUpdate(client=0, num_examples=0, delta=dict(sent), loss=0.0, num_steps=0)
    return write(0, update, 0.0) | gone(0.0)


def _number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)
