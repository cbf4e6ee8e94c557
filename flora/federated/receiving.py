"""What the server reads of what clients send, and what they carry on to their next round."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from flora.core import tree
from flora.core.states import FRESH, ClientState, ClientUpdate
from flora.core.tree import FlatState, StateLike
from flora.engine.tasks import ClientResult, ClientTask
from flora.federated.federation import Federation, RoundPlan


def send_updates(
    federation: Federation, plan: RoundPlan, results: Iterable[ClientResult]
) -> dict[int, tuple[ClientUpdate, ClientState]]:
    """Let each client send what it has trained: its update as the server reads it, and what it carries on, by id."""
    tasks = {task.client: task for task in plan.tasks}
    staying = frozenset(filter(federation.roles.stays, plan.view.adapter))
    starts: dict[int, FlatState] = {}
    sent = {}
    for result in results:
        task = tasks[result.client]
        if id(task.adapter) not in starts:  # mostly all clients start from one adapter
            names = (name for name in result.adapter if name not in staying)
            starts = {id(task.adapter): tree.flat(tree.select(task.adapter, names))}
        sent[task.client] = _send(federation, plan, task, result, starts[id(task.adapter)])
    return sent


def _send(
    federation: Federation, plan: RoundPlan, task: ClientTask, result: ClientResult, start: FlatState
) -> tuple[ClientUpdate, ClientState]:
    """Send a client's delta from `start`, what is sent of it; return it as the server reads it, and its state."""
    client, trained = task.client, result.adapter
    # Copies, so that no client keeps the memory of all that shared its steps.
    staying = {}
    if len(trained) > len(start):
        staying = {name: tensor.clone() for name, tensor in trained.items() if name not in start}
    failed_step = result.failed_step
    if failed_step is None and not tree.is_finite(staying):
        failed_step = result.num_steps - 1
    delta: StateLike = tree.subtract(tree.flat(tree.select(trained, start) if staying else trained), start)
    extra = result.sent_correction
    if federation.canaries is not None:
        delta, extra = federation.canaries.sent(client, delta, extra)
    if federation.privacy is not None:
        rng = plan.rng.child("client", client, "privacy")
        delta = federation.privacy.sent(delta, plan.view.privacy, rng)
    feedback = plan.view.clients.get(client, FRESH).feedback
    upload = federation.link.upload(delta, feedback, extra, client, plan.rng.child("client", client, "upload"))
    update = ClientUpdate(
        client=client,
        num_examples=len(task.examples),
        delta=tree.flat(upload.delta),
        num_bytes=upload.num_bytes,
        loss=result.loss,
        num_steps=result.num_steps,
        extra=extra,
        failed_step=failed_step,
        cluster=plan.clusters.get(client, 0),
    )
    return update, dataclasses.replace(result.state, own=staying, feedback=upload.feedback)


def personal_states(
    federation: Federation, plan: RoundPlan, results: Iterable[ClientResult]
) -> Iterator[tuple[int, tree.State]]:
    """The adapters that clients have trained for themselves, by id; one that diverged stays as it was."""
    if not plan.personal_tasks:
        return
    starts = {task.client: task.adapter for task in plan.personal_tasks}
    names = federation.roles.own(plan.view.adapter)
    for result in results:
        client = result.client
        if not result.is_finite:
            federation.engine.log(f"round {plan.round}: client {client}'s own adapter diverged, and stays as it was")
        after = {**starts[client], **(result.adapter if result.is_finite else {})}
        # Copies, so that no client keeps the memory of all that shared its steps, nor another's tensors.
        yield client, {name: after[name].clone() for name in names}
