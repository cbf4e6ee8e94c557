"""The link between the server and its clients: what is sent is packed, counted, and read on the other side."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from flora.communication.compressors import Compressor
from flora.communication.options import CommunicationOptions, payload_bytes
from flora.core import tree
from flora.core.contracts import checked_state, refuse
from flora.core.low_rank import rank_first, residuals_at_their_smallest
from flora.core.rng import Rng
from flora.core.tree import State, StateLike


@dataclass(frozen=True, eq=False)
class Broadcast:
    """What the server sends in a round, and what clients read of it.

    `read` are the tensors that were sent, as clients have them; `payload` is what travels of them: packed bytes, or the
    tensors themselves. `extra`, what a correction sends, travels with it as it is. `counted` are its bytes, by rank.
    """

    read: State
    payload: StateLike | bytes
    extra: State
    counted: dict[int | None, int] = field(init=False, default_factory=dict)


@dataclass(frozen=True, eq=False)
class Upload:
    """What a client sends: the `delta` as the server reads it, after `num_bytes` of it have travelled.

    `feedback` is what was lost of it, which the client adds to its next delta, where there is error feedback.
    """

    delta: StateLike
    feedback: State
    num_bytes: int


@dataclass(frozen=True, eq=False)
class Link:
    """How what travels is packed; clients of a lower rank, of `ranks` `(num_clients,)`, get and send fewer numbers."""

    options: CommunicationOptions
    ranks: np.ndarray | None = None
    _counted: dict[tuple[int, int | None], int] = field(init=False, default_factory=dict)

    def broadcast(self, sent: State, extra: State, rng: Rng) -> Broadcast:
        """Send the tensors `sent` to the clients, and `extra` with them, which is not compressed."""
        compressor = self.options.broadcast
        if compressor.is_identity:
            return Broadcast(sent, sent, extra)
        payload, read = _through("communication.broadcast", compressor, sent, rng)
        return Broadcast(read, payload, extra)

    def downlink_bytes(self, broadcast: Broadcast, client: int) -> int:
        """Return how many bytes of a broadcast go to a client."""
        if isinstance(broadcast.payload, bytes):
            return len(broadcast.payload) + _extra_bytes(broadcast.extra)
        counted, rank = broadcast.counted, self._rank(client)
        if rank not in counted:
            sent = residuals_at_their_smallest({**broadcast.payload, **_named(broadcast.extra)})
            counted[rank] = self._payload_bytes(sent, client)
        return counted[rank]

    def upload(self, delta: StateLike, feedback: StateLike, extra: StateLike, client: int, rng: Rng) -> Upload:
        """Send a client's delta, with what was lost of those before, its `feedback`; `extra` travels as it is."""
        compressor = self.options.upload
        if compressor.is_identity or not tree.is_finite(delta):
            sent = {**delta, **_named(extra)} if extra else delta
            return Upload(delta, {}, self._payload_bytes(sent, client))
        meant = tree.add(delta, feedback) if feedback else dict(delta)
        payload, read = _through("communication.upload", compressor, meant, rng)
        lost = tree.subtract(meant, read) if self.options.error_feedback else {}
        return Upload(read, lost, len(payload) + _extra_bytes(extra))

    def uplink_bytes(self, sent: StateLike, extra: StateLike, client: int, round: int) -> int:
        """Return how many bytes a client sends of a delta like `sent` in a round, whatever its numbers are."""
        kind = round, self._rank(client)
        if kind not in self._counted:
            for other in [known for known in self._counted if known[0] != round]:
                del self._counted[other]
            self._counted[kind] = self.upload(tree.scale(sent, 0.0), {}, extra, client, Rng(0)).num_bytes
        return self._counted[kind]

    def _payload_bytes(self, state: StateLike, client: int) -> int:
        """Return how many bytes the state takes on its way to or from a client."""
        rank = self._rank(client)
        return payload_bytes(state if rank is None else rank_first(state, rank))

    def _rank(self, client: int) -> int | None:
        return None if self.ranks is None else int(self.ranks[client])


def _named(extra: StateLike) -> State:
    """Return what a correction sends, under names that no tensor of an adapter has."""
    return tree.add_prefix("correction.", extra)


def _extra_bytes(extra: StateLike) -> int:
    return payload_bytes(_named(extra)) if extra else 0


def _through(setting: str, compressor: Compressor, state: State, rng: Rng) -> tuple[bytes, State]:
    """Return what travels of a state that is compressed, and what is read of it."""
    payload = compressor.encode(state, rng)
    if not isinstance(payload, bytes):
        refuse(setting, compressor, f"a {type(payload).__name__} to send, expected bytes")
    return payload, checked_state(setting, compressor, compressor.decode(payload, state), state)
