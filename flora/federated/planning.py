"""The tasks of a round's clients: what each trains from, for the server and for itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from flora.core.rng import Rng
from flora.core.states import FRESH, ServerState
from flora.engine.tasks import ClientTask
from flora.federated.federation import Federation


def server_tasks(federation: Federation, view: ServerState, clients: Iterable[int], rng: Rng) -> tuple[ClientTask, ...]:
    """The tasks whose results are sent, of `clients` in their order, in the round after `view`, which they see."""
    round, adapter = view.round + 1, view.adapter
    setup = dataclasses.replace(
        federation.setup(round, federation.roles.trained(adapter, round)), server_correction=view.correction
    )
    tasks = []
    for client in clients:
        if federation.roles.keeps_all:  # what it keeps is another adapter
            start = federation.received(adapter, client)
        else:
            start = federation.client_adapter(view, client)
        task = federation.task(client, start, setup, rng)
        tasks.append(dataclasses.replace(task, state=view.clients.get(client, FRESH)))
    return tuple(tasks)


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
