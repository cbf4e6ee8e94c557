"""Asynchronous rounds (FedBuff): clients work all the time; the server steps when a buffer of updates is full."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable

import numpy as np

from flora.communication.network import CohortOutcome, Network, Profiles, durations
from flora.core import tree
from flora.core.errors import UserError
from flora.core.records import ServerState
from flora.core.rng import Rng
from flora.federated import in_flight as pending
from flora.federated.federation import CLOCK, Federation
from flora.federated.synchronous import Delivery, broadcast, start_of, trained

# Times in a row that the server waits for somebody to ask, before it goes on with what it has.
MAX_WAITS = 100
# Clients in a row that drop out before one update arrives, after which a run is given up.
MAX_DROPPED = 10_000


def deliver_buffered(federation: Federation, state: ServerState, rng: Rng) -> Delivery:
    """The next updates to arrive, as many as the strategy's buffer holds (arXiv:2106.06639, algorithm 1).

    As many clients as the cohort has are at work at any time: whoever delivers, or drops out, is replaced at once by
    one that can be asked then, with the server's adapter as it is then. What a client will send is computed when it is
    asked, since nothing that happens later changes it, and lies in what the server keeps for it until it arrives. An
    update that is t rounds old counts 1 / sqrt(1 + t). Nobody delivers twice between two steps of the server.
    """
    round, clock = state.round + 1, float(state.strategy[CLOCK])
    received, downlink_bytes = broadcast(federation, state)
    there = dataclasses.replace(state, adapter=received)
    work = _Work(federation, state, rng, downlink_bytes)
    now = work.until_full(clock, federation.strategy.buffer_size)
    begin = {client: start_of(federation, there, client) for client in sorted(work.training)}
    fresh, kept = trained(federation, there, begin, rng)
    known = {update.client: (round, update) for update in fresh}
    known |= {
        client: pending.read(client, own, int(federation.sizes[client]))
        for client, own in state.clients.items()
        if pending.is_on_its_way(own)
    }
    before = {client: pending.without(own) for client, own in state.clients.items()}
    clients = {**before, **kept}
    for arrival, client, is_gone in work.queue:
        own = pending.gone(arrival) if is_gone else pending.write(*known[client], arrival)
        clients[client] = {**clients.get(client, {}), **own}
    arrived = sorted(work.arrived)
    staleness = [round - known[client][0] for client in arrived]
    updates = [
        dataclasses.replace(update, delta=tree.scale(update.delta, (1 + late) ** -0.5))
        for late, (_, update) in zip(staleness, (known[client] for client in arrived), strict=True)
    ]
    return Delivery(
        updates=updates,
        begin=begin,
        there=there,
        before={client: own for client, own in before.items() if own},
        kept={client: own for client, own in clients.items() if own},
        trip=CohortOutcome(
            np.array(arrived, dtype=np.int64),
            dropped=np.array(sorted(work.dropped), dtype=np.int64),
            seconds=now - clock,
        ),
        uplink_bytes=sum(update.num_bytes for update in updates),
        downlink_bytes=sum(downlink_bytes(client) for client in work.asked),
        staleness=staleness,
    )


class _Work:
    """Who is at work, until when, and whether it is gone by then: the `queue`.

    `asked` lists who was asked in this round, `training` those of them that deliver, in this round or later; `arrived`
    and `dropped` say whose time has come.
    """

    def __init__(
        self, federation: Federation, state: ServerState, rng: Rng, downlink_bytes: Callable[[int], int]
    ) -> None:
        assert federation.network is not None and federation.profiles is not None  # as `check_experiment` has seen to
        self._network: Network = federation.network
        self._profiles: Profiles = federation.profiles
        self._federation, self._state, self._rng, self._downlink_bytes = federation, state, rng, downlink_bytes
        self._at_work = federation.cohort_size(state.round + 1)
        self._num_draws = 0
        self.queue: list[tuple[float, int, bool]] = []
        for client, own in state.clients.items():
            if pending.is_on_its_way(own) or pending.is_gone(own):
                self.queue.append((pending.arrival(own), client, pending.is_gone(own)))
        heapq.heapify(self.queue)
        self.asked: list[int] = []
        self.training: set[int] = set()
        self.arrived: list[int] = []
        self.dropped: list[int] = []

    def until_full(self, now: float, size: int) -> float:
        """Let time pass until `size` updates have arrived; when that is.

        Raises `UserError` if everybody drops out for so long that it will hardly ever be.
        """
        self._ask(now)
        num_waits = num_dropped = 0
        while len(self.arrived) < size and num_waits < MAX_WAITS:
            if self.queue:
                (now, client, is_gone), num_waits = heapq.heappop(self.queue), 0
                (self.dropped if is_gone else self.arrived).append(client)
                num_dropped = num_dropped + 1 if is_gone else 0
                if num_dropped == MAX_DROPPED:
                    raise UserError(
                        f"round {self._state.round + 1}: {num_dropped:,} clients in a row dropped out, and the buffer "
                        f"has {len(self.arrived)} of {size} updates: lower server.strategy.buffer or network.dropout"
                    )
            else:
                now, num_waits = now + self._network.wait_seconds, num_waits + 1
            if len(self.arrived) < size:
                self._ask(now)
        return now

    def _ask(self, now: float) -> None:
        """Fill up those at work with clients that can be asked now."""
        number, draw, federation = self._at_work - len(self.queue), self._num_draws, self._federation
        if number <= 0:
            return
        self._num_draws += 1
        own = self._rng.child("network", draw)
        busy = {*self.arrived, *(client for _, client, _ in self.queue)}
        present = federation.available(now, own.child("available"))
        free = present[~np.isin(present, list(busy))]
        if not len(free):
            return
        stream = self._rng.child("cohort", draw) if draw else self._rng.child("cohort")
        chosen = federation.cohort(free, min(number, len(free)), stream)
        takes = durations(
            self._network,
            self._profiles,
            chosen,
            [federation.num_steps(client) for client in chosen],
            [self._downlink_bytes(client) for client in chosen],
            [federation.uplink_bytes(self._state.adapter, self._state.round + 1, client) for client in chosen],
        )
        is_gone = own.child("dropout").numpy().random(len(chosen)) < self._profiles.dropout[chosen]
        for client, seconds, gone in zip(chosen.tolist(), takes.tolist(), is_gone.tolist(), strict=True):
            self.asked.append(client)
            self.training |= set() if gone else {client}
            heapq.heappush(self.queue, (now + seconds, client, gone))
