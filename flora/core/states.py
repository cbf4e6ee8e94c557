"""The named types of federated state: what a client has, keeps and sends, and what the server knows between rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from flora.core.tree import State, StateLike


@dataclass(frozen=True, eq=False)
class ClientData:
    """One client's share: sorted indices into the training examples, and those it keeps for its own test.

    `name` is what the data call it, if they do. `unlabelled` are more of them, of which it does not know the labels.
    """

    train: np.ndarray
    held_out: np.ndarray
    name: str | None = None
    unlabelled: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """What one client sends after local training: `delta` = local - broadcast, without a client axis.

    It is what the server reads, after `num_bytes` of it have travelled.
    `failed_step` is the first of its steps, counted from 0, at which loss or gradient was not finite; `extra` is what
    a correction sends with the delta. `cluster` says which of the server's models the client trained, from 0.
    """

    client: int
    num_examples: int
    delta: StateLike
    loss: float
    num_steps: int
    num_bytes: int = 0
    failed_step: int | None = None
    extra: State = field(default_factory=dict)
    cluster: int = 0


@dataclass(frozen=True, eq=False)
class InFlight:
    """An update that has not arrived yet: it was asked for in `round` and arrives at `arrival_seconds` of the clock.

    Without an `update` the client has dropped out, and that is when the server will notice.
    """

    round: int
    arrival_seconds: float
    update: ClientUpdate | None


@dataclass(frozen=True, eq=False)
class ClientState:
    """What a client carries from one round to the next; all of it may be empty.

    `optimizer` is its optimiser's state and `correction` a correction's memory, flat vectors `(P,)` of what is trained;
    `own` are the adapter's tensors that it keeps for itself, by their names in the adapter; `feedback` is what
    compression lost of its last deltas; `privacy` counts what it has sent of private gradients. `in_flight` is an
    update of it that the server is waiting for.
    """

    optimizer: State = field(default_factory=dict)
    correction: State = field(default_factory=dict)
    own: State = field(default_factory=dict)
    feedback: State = field(default_factory=dict)
    in_flight: InFlight | None = None
    privacy: State = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether the client carries nothing."""
        parts = (self.optimizer, self.correction, self.own, self.feedback, self.in_flight, self.privacy)
        return not any(parts)


FRESH = ClientState()
"""A client that has not taken part yet."""


@dataclass(frozen=True, eq=False)
class ServerState:
    """All that the server knows between two rounds; with the configuration, all that a resumed run needs.

    `round` rounds are done. `adapter`, `optimizer` (the server optimizer's state) and `correction` (what a correction
    remembers at the server) are state dicts on the CPU without a client axis; `privacy` is what a mechanism of
    differential privacy carries from round to round, by name. `clock` are the seconds that have passed
    on the simulated network's clock. `clients` has, by client id, those that carry something.
    """

    round: int
    adapter: State
    optimizer: State = field(default_factory=dict)
    correction: State = field(default_factory=dict)
    clock: float = 0.0
    clients: Mapping[int, ClientState] = field(default_factory=dict)
    privacy: State = field(default_factory=dict)
