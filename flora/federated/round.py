"""One round: plan it, have the engine train, and finish: screen the updates, average them, step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flora.core import tree
from flora.core.records import Rejection
from flora.core.states import FRESH, ClientState, ClientUpdate, ServerState
from flora.core.tree import State
from flora.engine.tasks import ClientResult
from flora.federated.aggregation import Step, in_server_terms, released, step
from flora.federated.exposure import count_releases, example_epsilon
from flora.federated.federation import Federation, Received, RoundPlan
from flora.federated.movement import movement_of
from flora.federated.phases import train_clients
from flora.federated.private import private_step
from flora.federated.receiving import personal_states, send_updates
from flora.federated.summing import Summed, sum_securely
from flora.server.screening import refusal, screen


@dataclass(frozen=True)
class RoundResult:
    """What a round did, apart from the new state.

    `cohort` are the ids of the clients whose updates came, None if that is not said.
    """

    num_clients: int
    num_steps: int
    num_examples: int
    train_loss: float | None
    aggregation_error: float | None
    delta_norm: float | None
    client_drift: float | None
    learning_rate: float
    uplink_bytes: int
    downlink_bytes: int
    train_seconds: float
    rejected_clients: tuple[Rejection, ...]
    simulated_seconds: float | None
    num_dropped: int
    num_late: int
    mean_staleness: float | None
    pseudo_label_coverage: float | None = None
    pseudo_label_precision: float | None = None
    client_pseudo_labels: dict[str, list[int]] | None = None
    distillation_loss: float | None = None
    text_loss: float | None = None
    example_epsilon: float | None = None
    sum_phases: int | None = None
    sum_messages: int = 0
    sum_bytes: dict[str, int] | None = None
    num_failed_sums: int = 0
    saturated_fraction: float | None = None
    epsilon: float | None = None
    sum_epsilon: float | None = None
    clip_norm: float | None = None
    clipped_fraction: float | None = None
    cluster_sizes: dict[str, int] | None = None
    cohort: tuple[int, ...] | None = ()

    def metrics(self) -> dict[str, Any]:
        """The result's metrics by name: all of it but the ids of clients."""
        names = (field.name for field in dataclasses.fields(self) if field.name not in ("rejected_clients", "cohort"))
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ServerLosses:
    """The mean losses of what the server trained by itself in a round, None where it did not."""

    distillation: float | None = None
    texts: float | None = None


def run_round(federation: Federation, state: ServerState) -> tuple[ServerState, RoundResult]:
    """Run the round after `state`; nothing but `state` and the federation's seed decides what comes out.

    Updates that are not fit to be averaged are left out; without any fit one, adapter and strategy stay as they are,
    but for the network's clock; with differential privacy the server steps along the noise all the same. Raises
    `UserError` for the first of them where `screening` says so.
    """
    started = federation.engine.seconds()
    before, state = state.adapter, federation.continued(state)
    plan = federation.schedule.plan(federation, state)
    reports: dict[int, Mapping[str, int]] = {}
    results = _noted(train_clients(federation.engine, plan), reports)
    received = federation.schedule.receive(plan, send_updates(federation, plan, results))
    received, accepted, rejections = _screened(federation, plan, received)
    summed = sum_securely(federation, plan, accepted)
    if summed is not None:
        received, accepted = _without_lost(federation, plan, received, accepted, summed), list(summed.updates)
    clients = _client_states(federation, plan, received)
    after = _step_along(federation, state, plan, accepted, summed)
    adapter, server_losses = after.adapter, ServerLosses()
    if accepted or federation.privacy is not None:
        adapter, server_losses = _trained_by_server(federation, plan, state.adapter, accepted, adapter)
    if federation.server.strategy.restarts and accepted:
        adapter = {**adapter, **federation.engine.model.adapter.initial_state(plan.rng.child("adapter"))}
    adapter, optimizer = released(federation, before, adapter, after.optimizer, plan.round)
    clock = state.clock + (plan.outcome.seconds or 0.0)
    result = _result(federation, plan, received, accepted, rejections)
    result = dataclasses.replace(
        result,
        **({} if summed is None else summed.figures(result.num_dropped, result.downlink_bytes)),
        **_pseudo_label_figures(reports),
        distillation_loss=server_losses.distillation,
        text_loss=server_losses.texts,
        example_epsilon=example_epsilon(federation, clients),
        aggregation_error=after.aggregation_error,
        **after.figures,
        train_seconds=federation.engine.seconds() - started,
    )
    if federation.privacy is not None and not federation.privacy.mechanism.publish:
        result = dataclasses.replace(result, cohort=None, rejected_clients=())
    return ServerState(plan.round, adapter, optimizer, after.correction, clock, clients, after.privacy), result


def _client_states(federation: Federation, plan: RoundPlan, received: Received) -> Mapping[int, ClientState]:
    """Let clients train for themselves, and return what each carries to the next round, its releases counted."""
    clients = dict(received.clients)
    for client, own in personal_states(federation, plan, federation.engine.train(plan.personal_tasks)):
        clients[client] = dataclasses.replace(clients.get(client, FRESH), own=own)
    return count_releases(federation, plan, clients)


def _step_along(
    federation: Federation, state: ServerState, plan: RoundPlan, accepted: Sequence[ClientUpdate], summed: Summed | None
) -> Step:
    """Step from `state` along the accepted updates, with differential privacy along their noisy sum; else stay."""
    if federation.privacy is not None:
        return private_step(federation, state, accepted, summed)
    if accepted:
        return step(federation, state, accepted, {task.client: task.adapter for task in plan.tasks}, summed)
    return Step(state.adapter, state.optimizer, state.correction, None, state.privacy)


def _noted(results: Iterable[ClientResult], reports: dict[int, Mapping[str, int]]) -> Iterator[ClientResult]:
    """Hand results on, and note what each client reports."""
    for result in results:
        if result.report:
            reports[result.client] = result.report
        yield result


def _pseudo_label_figures(reports: Mapping[int, Mapping[str, int]]) -> dict[str, Any]:
    """The metrics of pseudo-labels from clients' `reports`, by client id; none where nobody has reported."""
    if not reports:
        return {}
    names = ("num_unlabelled", "num_sure", "num_right")
    by_client = {str(client): [reports[client][name] for name in names] for client in sorted(reports)}
    number, sure, right = (sum(counts) for counts in zip(*by_client.values(), strict=True))
    return {
        "pseudo_label_coverage": sure / number if number else None,
        "pseudo_label_precision": right / sure if sure else None,
        "client_pseudo_labels": by_client,
    }


def _trained_by_server(
    federation: Federation, plan: RoundPlan, before: State, accepted: Sequence[ClientUpdate], adapter: State
) -> tuple[State, ServerLosses]:
    """The adapter after what the server trains by itself behind a round's mean, and the losses of that.

    `before` is what the round's clients got, `adapter` what was made of the updates that were accepted.
    """
    training, distillation, texts = federation.server_training, None, None
    if training.public is None and training.texts is None:
        return adapter, ServerLosses()
    trained = federation.roles.trained(adapter, plan.round)
    if training.public is not None:
        _, ends = in_server_terms(federation, before, accepted, {task.client: task.adapter for task in plan.tasks})
        after = training.public.with_teacher(ends).train(adapter, trained, plan.rng.child("distillation"))
        adapter, distillation = after.adapter, after.loss
    if training.texts is not None and plan.round % training.texts.every == 0:
        after = training.texts.train(adapter, trained, plan.rng.child("texts"))
        adapter, texts = after.adapter, after.loss
    return adapter, ServerLosses(distillation, texts)


def _screened(
    federation: Federation, plan: RoundPlan, received: Received
) -> tuple[Received, list[ClientUpdate], list[Rejection]]:
    """Return what was received, the updates of it that may be averaged, and what was found wrong with the others.

    A client whose update is left out carries on what it had before.
    """
    round, adapter = plan.round, plan.view.adapter
    updates = [federation.engine.hooks.update(round, update) for update in received.updates]
    sent = tree.select(adapter, federation.roles.sent(adapter, round))
    accepted, rejections = screen(updates, sent, federation.server.screening)
    if rejections and federation.server.screening.policy == "abort":
        raise refusal(round, rejections[0], _learning_rate(federation, round))
    clients: dict[int, ClientState] = dict(received.clients)
    for rejection in rejections:
        _say(federation, f"round {round}: client {rejection.client} is left out: {rejection.reason}")
        clients.pop(rejection.client, None)
        if rejection.client in received.before:
            clients[rejection.client] = received.before[rejection.client]
    return dataclasses.replace(received, updates=updates, clients=clients), accepted, rejections


def _without_lost(
    federation: Federation, plan: RoundPlan, received: Received, accepted: Sequence[ClientUpdate], summed: Summed
) -> Received:
    """Return what was received without the updates that are in no sum; their clients carry on what they had before."""
    if summed.outcome.failure is not None:
        _say(federation, f"round {plan.round}: no sum: {summed.outcome.failure}: {_instead(federation)}")
    lost = {update.client for update in accepted} - {update.client for update in summed.updates}
    clients = {client: each for client, each in received.clients.items() if client not in lost}
    clients |= {client: received.before[client] for client in lost & received.before.keys()}
    updates = [update for update in received.updates if update.client not in lost]
    return dataclasses.replace(received, updates=updates, clients=clients)


def _say(federation: Federation, line: str) -> None:
    """Log what tells of single clients, unless that is not to be known."""
    if federation.privacy is None or federation.privacy.mechanism.publish:
        federation.engine.log(line)


def _instead(federation: Federation) -> str:
    """Return a sentence that says what the server does where no update came."""
    if federation.privacy is None:
        return "the adapter stays as it was"
    return f"the server steps along {'zeros' if federation.privacy.mechanism.noises_in_sum else 'noise alone'}"


def _learning_rate(federation: Federation, round: int) -> float:
    return federation.local.rate(round, federation.num_rounds)


def _result(
    federation: Federation,
    plan: RoundPlan,
    received: Received,
    accepted: Sequence[ClientUpdate],
    rejections: Sequence[Rejection],
) -> RoundResult:
    """Return what the round did, but for its `aggregation_error` and its `train_seconds`."""
    outcome, updates, staleness = plan.outcome, received.updates, received.staleness
    if not updates and (federation.server.secure_sum is None or not outcome.asked):
        _say(
            federation,
            f"round {plan.round}: nobody delivered ({len(outcome.asked)} asked, {len(outcome.dropped)} dropped out, "
            f"{len(outcome.late)} too late): {_instead(federation)}",
        )
    weights = np.array([update.num_examples for update in accepted])
    losses = np.array([update.loss for update in accepted])
    read = accepted if federation.server.secure_sum is None else ()  # of a secure sum nobody reads a single one
    personal_steps = sum(task.num_steps for task in plan.personal_tasks)
    return RoundResult(
        num_clients=len(updates),
        num_steps=sum(update.num_steps for update in updates) + personal_steps,
        num_examples=sum(update.num_examples for update in updates),
        train_loss=float((losses * weights).sum() / weights.sum()) if accepted else None,
        aggregation_error=None,
        **dataclasses.asdict(movement_of([update.delta for update in read])),
        learning_rate=_learning_rate(federation, plan.round),
        uplink_bytes=sum(update.num_bytes for update in updates) + plan.late_uplink_bytes,
        downlink_bytes=plan.downlink_bytes,
        train_seconds=0.0,
        rejected_clients=tuple(rejections),
        simulated_seconds=outcome.seconds,
        num_dropped=len(outcome.dropped),
        num_late=len(outcome.late),
        mean_staleness=sum(staleness) / len(staleness) if staleness else None,
        cluster_sizes=_cluster_sizes(federation, accepted),
        cohort=tuple(update.client for update in updates),
    )


def _cluster_sizes(federation: Federation, accepted: Sequence[ClientUpdate]) -> dict[str, int] | None:
    """How many updates were averaged in each cluster; None where there is but one."""
    number = federation.server.strategy.num_clusters
    if number == 1:
        return None
    counts = np.bincount([update.cluster for update in accepted], minlength=number)
    return {str(cluster): count for cluster, count in enumerate(counts.tolist())}
