"""The tasks of a round's clients: what each trains from, for the server and for itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from flora.core.clusters import clusters_of
from flora.core.rng import Rng
from flora.core.states import FRESH, ServerState
from flora.engine.tasks import ClientTask
from flora.federated.federation import Federation


def server_tasks(
    federation: Federation,
    view: ServerState,
    clients: Iterable[int],
    rng: Rng,
    clusters: Mapping[int, int] | None = None,
) -> tuple[ClientTask, ...]:
    """The tasks whose results are sent, of `clients` in their order, in the round after `view`, which they see.

    `clusters` says which of the server's models each of them trains, where there are several.
    """
    round, adapter, roles = view.round + 1, view.adapter, federation.roles
    is_last_phase = federation.server.strategy.before_the_others(federation.local) is not None
    trained = roles.sent(adapter, round) if is_last_phase else roles.trained(adapter, round)
    setup = dataclasses.replace(federation.setup(round, trained), server_correction=view.correction)
    tasks, models = [], clusters_of(adapter)
    for client in clients:
        if clusters:
            start = models[clusters[client]]
        elif federation.roles.keeps_all:  # what it keeps is another adapter
            start = federation.received(adapter, client)
        else:
            start = federation.client_adapter(view, client)
        tasks.append(federation.task(client, start, setup, rng, view.clients.get(client, FRESH)))
    return tuple(tasks)


def first_tasks(
    federation: Federation, view: ServerState, tasks: Iterable[ClientTask], rng: Rng
) -> tuple[ClientTask, ...]:
    """The tasks of the same clients for what stays with them, where they train that before what `tasks` train."""
    local = federation.server.strategy.before_the_others(federation.local)
    if local is None:
        return ()
    names, roles = view.adapter, federation.roles
    setup = federation.setup(view.round + 1, filter(roles.stays, roles.trained(names, view.round + 1)), local)
    return tuple(federation.task(task.client, task.adapter, setup, rng) for task in tasks)


def personal_tasks(
    federation: Federation, view: ServerState, tasks: Iterable[ClientTask], rng: Rng
) -> tuple[ClientTask, ...]:
    """The tasks of the same clients for adapters that they train for themselves, drawn to what `tasks` start from."""
    local = federation.personal.in_round(federation.local)
    if local is None:
        return ()
    setup = federation.setup(view.round + 1, federation.roles.trained(view.adapter, view.round + 1), local)
    return tuple(
        dataclasses.replace(
            federation.task(task.client, federation.client_adapter(view, task.client), setup, rng), anchor=task.adapter
        )
        for task in tasks
    )
