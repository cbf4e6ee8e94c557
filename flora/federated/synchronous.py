"""Synchronous rounds: the server asks a cohort, waits for it, and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flora.core.registry import register
from flora.core.states import ClientState, ClientUpdate, ServerState
from flora.federated.clusters import chosen_clusters
from flora.federated.federation import Federation, Received, RoundPlan, RoundSchedule
from flora.federated.planning import first_tasks, personal_tasks, server_tasks


@register("synchronous")
@dataclass(frozen=True)
class Synchronous(RoundSchedule):
    """The server asks a cohort and steps when all have delivered, or when it waits no longer (arXiv:1602.05629)."""

    def plan(self, federation: Federation, state: ServerState) -> RoundPlan:
        round = state.round + 1
        rng = federation.rng.child("round", round)
        broadcast, view = federation.broadcast(state)
        load = federation.load(state, broadcast)
        outcome = federation.participation.outcome(round, state.clock, load, rng)
        clients = outcome.clients.tolist()
        clusters = chosen_clusters(federation, view, clients, rng.child("clusters"))
        tasks = server_tasks(federation, view, clients, rng, clusters)
        return RoundPlan(
            round=round,
            rng=rng,
            view=view,
            tasks=tasks,
            personal_tasks=personal_tasks(federation, view, tasks, rng.child("personal")),
            outcome=outcome,
            downlink_bytes=sum(map(load.downlink_bytes, outcome.asked)),
            # What comes too late has travelled all the same.
            late_uplink_bytes=sum(map(load.uplink_bytes, outcome.late.tolist())),
            first_tasks=first_tasks(federation, view, tasks, rng.child("first")),
            clusters=clusters,
        )

    def receive(self, plan: RoundPlan, trained: Mapping[int, tuple[ClientUpdate, ClientState]]) -> Received:
        updates = [update for _, (update, _) in sorted(trained.items())]
        carried = {client: carried for client, (_, carried) in trained.items() if not carried.is_empty}
        return Received(updates, clients={**plan.view.clients, **carried}, before=plan.view.clients)
