"""What clients have sent of private gradients by now, over all rounds in which they trained for the server."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from flora.core.states import FRESH, ClientState
from flora.federated.federation import Federation, RoundPlan
from flora.privacy.examples import NUM_RELEASES, Exposure


def count_releases(
    federation: Federation, plan: RoundPlan, clients: Mapping[int, ClientState]
) -> Mapping[int, ClientState]:
    """Return `clients` after a round, with its releases counted of all who sent something.

    So of those whose update was left out, or came too late, too: it has been seen. A client whose update is still on
    its way counts from the moment it trained.
    """
    local = federation.local
    if local.privacy is None:
        return clients
    counted = dict(clients)
    for client in (*(task.client for task in plan.tasks), *plan.outcome.late.tolist()):
        number = len(federation.clients[client].train)
        before = _num_releases(plan.view.clients.get(client, FRESH))
        more = local.privacy.num_releases(number, local.batch_size, local.num_steps(number))
        counted[client] = dataclasses.replace(counted.get(client, FRESH), privacy=local.privacy.counted(before + more))
    return counted


def exposures(federation: Federation, clients: Mapping[int, ClientState]) -> dict[int, Exposure]:
    """Return how much each client has released of its examples by now, by id; nothing of those that never did."""
    local = federation.local
    if local.privacy is None:
        return {}
    return {
        client: Exposure(
            _num_releases(state),
            local.privacy.sampling_fraction(len(federation.clients[client].train), local.batch_size),
        )
        for client, state in clients.items()
        if state.privacy
    }


def example_epsilon(federation: Federation, clients: Mapping[int, ClientState]) -> float | None:
    """The largest epsilon that a client's examples have spent by now; None without privacy."""
    privacy = federation.local.privacy
    return None if privacy is None else privacy.largest_epsilon(exposures(federation, clients).values())


def _num_releases(state: ClientState) -> int:
    return int(state.privacy[NUM_RELEASES]) if state.privacy else 0
