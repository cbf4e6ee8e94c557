"""Train a round's clients: all of their tensors at once, or what stays with them before what they send."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from flora.engine.engine import Engine
from flora.engine.tasks import ClientResult
from flora.federated.federation import RoundPlan


def train_clients(engine: Engine, plan: RoundPlan) -> Iterator[ClientResult]:
    """Train every client of a round that sends an update, and hand on its result, in no particular order.

    Where clients have two phases, a result has the tensors and the steps of both, and its loss is the mean over these.
    """
    if not plan.first_tasks:
        yield from engine.train(plan.tasks)
        return
    # Copies, so that no client keeps the memory of all that shared its steps.
    first = {
        result.client: dataclasses.replace(
            result, adapter={name: tensor.clone() for name, tensor in result.adapter.items()}
        )
        for result in engine.train(plan.first_tasks)
    }
    tasks = [dataclasses.replace(task, adapter={**task.adapter, **first[task.client].adapter}) for task in plan.tasks]
    for result in engine.train(tasks):
        yield _of_both(first[result.client], result)


def _of_both(first: ClientResult, last: ClientResult) -> ClientResult:
    """Join the results of a client's two phases; a step that failed is counted from the start of the first one."""
    num_steps = first.num_steps + last.num_steps
    failed_step = first.failed_step
    if failed_step is None and last.failed_step is not None:
        failed_step = first.num_steps + last.failed_step
    return dataclasses.replace(
        last,
        adapter={**first.adapter, **last.adapter},
        loss=(first.loss * first.num_steps + last.loss * last.num_steps) / num_steps,
        num_steps=num_steps,
        failed_step=failed_step,
    )
