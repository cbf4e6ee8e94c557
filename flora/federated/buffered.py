"""Asynchronous rounds (FedBuff): clients work all the time; the server steps when a buffer of updates is full."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flora.communication.network import ClientLoad, CohortOutcome
from flora.core import tree
from flora.core.errors import UserError
from flora.core.registry import option, register
from flora.core.rng import Rng
from flora.core.states import FRESH, ClientState, ClientUpdate, InFlight, ServerState
from flora.federated.federation import Awaited, Federation, Received, RoundPlan, RoundSchedule
from flora.federated.planning import server_tasks

# Times in a row that the server waits for somebody to ask, before it goes on with what it has.
MAX_WAITS = 100
# Clients in a row that drop out before one update arrives, after which a run is given up.
MAX_DROPPED = 10_000


@register("buffered")
@dataclass(frozen=True)
class Buffered(RoundSchedule):
    """Asynchronous: the server steps when `buffer` updates have come in, however old (FedBuff, arXiv:2106.06639).

    As many clients as the cohort has are at work at any time: whoever delivers, or drops out, is replaced at once by
    one that can be asked then, with the server's adapter as it is then. Nobody delivers twice between two steps of the
    server, and an update that is t rounds old counts 1 / sqrt(1 + t). Needs a network, whose clock says what arrives.
    """

    waits_for_buffer = True
    buffer: int = option("updates in a step of the server", 10, at_least=1)

    def plan(self, federation: Federation, state: ServerState) -> RoundPlan:
        """Plan the round after `state`: who is at work, and who arrives in it.

        What a client will send is computed when it is asked, since nothing that happens later changes it, and waits in
        the server's state until it arrives.
        """
        round = state.round + 1
        rng = federation.rng.child("round", round)
        broadcast, view = federation.broadcast(state)
        load = federation.load(state, broadcast)
        work = _Work(federation, state, rng, load)
        now = work.until_full(state.clock, self.buffer)
        return RoundPlan(
            round=round,
            rng=rng,
            view=view,
            tasks=server_tasks(federation, view, sorted(work.training), rng),
            personal_tasks=(),
            outcome=CohortOutcome(
                np.array(sorted(work.arrived), dtype=np.int64),
                dropped=np.array(sorted(work.dropped), dtype=np.int64),
                seconds=now - state.clock,
            ),
            downlink_bytes=sum(map(load.downlink_bytes, work.asked)),
            awaited=tuple(sorted(work.queue)),
        )

    def receive(self, plan: RoundPlan, trained: Mapping[int, tuple[ClientUpdate, ClientState]]) -> Received:
        known = {client: each.in_flight for client, each in plan.view.clients.items() if each.in_flight is not None}
        known |= {client: InFlight(plan.round, 0.0, update) for client, (update, _) in trained.items()}
        updates, staleness = [], []
        for client in plan.outcome.clients.tolist():
            update, late = known[client].update, plan.round - known[client].round
            assert update is not None
            updates.append(dataclasses.replace(update, delta=tree.scale(update.delta, (1 + late) ** -0.5)))
            staleness.append(late)
        before = {client: dataclasses.replace(each, in_flight=None) for client, each in plan.view.clients.items()}
        clients = before | {client: carried for client, (_, carried) in trained.items() if not carried.is_empty}
        for arrival_seconds, client, is_gone in plan.awaited:
            in_flight = InFlight(plan.round, arrival_seconds, None)
            if not is_gone:
                in_flight = dataclasses.replace(known[client], arrival_seconds=arrival_seconds)
            clients[client] = dataclasses.replace(clients.get(client, FRESH), in_flight=in_flight)
        return Received(updates, _not_empty(clients), _not_empty(before), staleness)


def _not_empty(clients: Mapping[int, ClientState]) -> dict[int, ClientState]:
    return {client: each for client, each in clients.items() if not each.is_empty}


class _Work:
    """Who is at work, until when, and whether it is gone by then: the `queue`.

    `asked` lists who was asked in this round, `training` those of them that deliver, in this round or later; `arrived`
    and `dropped` say whose time has come.
    """

    def __init__(self, federation: Federation, state: ServerState, rng: Rng, load: ClientLoad) -> None:
        self._participation, self._round, self._rng, self._load = federation.participation, state.round + 1, rng, load
        self._at_work = self._participation.cohort_size(self._round)
        self._num_draws = 0
        self.queue: list[Awaited] = [
            Awaited(each.in_flight.arrival_seconds, client, each.in_flight.update is None)
            for client, each in state.clients.items()
            if each.in_flight is not None
        ]
        heapq.heapify(self.queue)
        self.asked: list[int] = []
        self.training: set[int] = set()
        self.arrived: list[int] = []
        self.dropped: list[int] = []

    def until_full(self, now: float, size: int) -> float:
        """Let time pass until `size` updates have arrived; return when that is.

        Raises `UserError` if everybody drops out for so long that it will hardly ever be.
        """
        network = self._participation.network
        assert network is not None  # as `check_experiment` has seen to
        self._ask(now)
        num_waits = num_dropped = 0
        while len(self.arrived) < size and num_waits < MAX_WAITS:
            if self.queue:
                (now, client, is_gone), num_waits = heapq.heappop(self.queue), 0
                (self.dropped if is_gone else self.arrived).append(client)
                num_dropped = num_dropped + 1 if is_gone else 0
                if num_dropped == MAX_DROPPED:
                    raise UserError(
                        f"round {self._round}: {num_dropped:,} clients in a row dropped out, and the buffer has "
                        f"{len(self.arrived)} of {size} updates: lower server.schedule.buffer or network.dropout"
                    )
            else:
                now, num_waits = now + network.wait_seconds, num_waits + 1
            if len(self.arrived) < size:
                self._ask(now)
        return now

    def _ask(self, now: float) -> None:
        """Fill up those at work with clients that can be asked now."""
        number, draw, participation = self._at_work - len(self.queue), self._num_draws, self._participation
        if number <= 0:
            return
        assert participation.profiles is not None
        self._num_draws += 1
        network_rng = self._rng.child("network", draw)
        busy = {*self.arrived, *(client for _, client, _ in self.queue)}
        present = participation.available(now, network_rng.child("available"))
        free = present[~np.isin(present, list(busy))]
        if not len(free):
            return
        stream = self._rng.child("cohort", draw) if draw else self._rng.child("cohort")
        chosen = participation.cohort(self._round, free, min(number, len(free)), stream)
        takes = participation.durations(chosen, self._load)
        is_gone = network_rng.child("dropout").numpy().random(len(chosen)) < participation.profiles.dropout[chosen]
        for client, seconds, gone in zip(chosen.tolist(), takes.tolist(), is_gone.tolist(), strict=True):
            self.asked.append(client)
            self.training |= set() if gone else {client}
            heapq.heappush(self.queue, Awaited(now + seconds, client, gone))
