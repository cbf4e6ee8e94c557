"""One round: sample a cohort, train each client's adapter on its data, average, step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from flora.client.corrections import Cohort
from flora.client.personalization import OWN
from flora.client.training import CORRECTION
from flora.core import tree
from flora.core.contracts import called, checked_state, checked_tensor, checked_weights
from flora.core.errors import DivergedError
from flora.core.low_rank import aggregation_error, layers, rank_padded, with_any_residual
from flora.core.records import ClientUpdate, Rejection, ServerState
from flora.core.rng import Rng
from flora.core.tree import State, StateLike
from flora.federated.buffered import deliver_buffered
from flora.federated.federation import CLOCK, Federation
from flora.federated.synchronous import Delivery, deliver
from flora.server.screening import refusal, screen


@dataclass(frozen=True)
class RoundResult:
    """What a round did, apart from the new state. `cohort` are the ids of the clients whose updates came."""

    num_clients: int
    num_steps: int
    num_examples: int
    train_loss: float | None
    aggregation_error: float | None
    learning_rate: float
    uplink_bytes: int
    downlink_bytes: int
    train_seconds: float
    rejections: tuple[Rejection, ...]
    simulated_seconds: float | None
    num_dropped: int
    num_late: int
    mean_staleness: float | None
    cohort: tuple[int, ...] = ()


def run_round(federation: Federation, state: ServerState) -> tuple[ServerState, RoundResult]:
    """The round after `state`. Nothing but `state` and the federation's seed decides what comes out.

    Updates that are not fit to be averaged are left out; without any fit one, adapter and strategy stay as they are,
    but for the network's clock. Raises `UserError` for the first of them where `screening` says so.
    """
    started = time.perf_counter()
    round = state.round + 1
    rng = federation.rng.child("round", round)
    collect = deliver_buffered if federation.strategy.buffer_size else deliver
    found = collect(federation, state, rng)
    kept, trip = found.kept, found.trip
    updates = [federation.hooks.update(round, update) for update in found.updates]
    accepted, rejections = screen(updates, federation.sent(state.adapter, round), federation.screening)
    learning_rate = federation.learning_rate(round)
    if rejections and federation.screening.policy == "abort":
        raise refusal(round, rejections[0], learning_rate)
    for rejection in rejections:
        federation.log(f"round {round}: client {rejection.client} is left out: {rejection.reason}")
        kept.pop(rejection.client, None)
        if rejection.client in found.before:
            kept[rejection.client] = found.before[rejection.client]
    num_steps = sum(update.num_steps for update in updates)
    for client, own, own_steps in _train_own(federation, found, round, rng.child("personal")):
        kept[client] = {**kept.get(client, {}), **own}
        num_steps += own_steps
    adapter, strategy, error = state.adapter, state.strategy, None
    if not updates:
        federation.log(
            f"round {round}: nobody delivered ({len(trip.asked)} asked, {len(trip.dropped)} dropped out, "
            f"{len(trip.late)} too late): the adapter stays as it was"
        )
    if accepted:
        adapter, strategy, error = _next(federation, state, accepted, found.begin)
    if federation.strategy.restarts and accepted:
        adapter = {**adapter, **federation.model.adapter.initial_state(rng.child("adapter"))}
    if trip.seconds is not None:
        strategy = {**strategy, CLOCK: strategy[CLOCK] + trip.seconds}
    weights = np.array([update.num_examples for update in accepted])
    losses = np.array([update.loss for update in accepted])
    return ServerState(round, adapter, strategy, kept), RoundResult(
        num_clients=len(updates),
        num_steps=num_steps,
        num_examples=sum(update.num_examples for update in updates),
        train_loss=float((losses * weights).sum() / weights.sum()) if accepted else None,
        aggregation_error=error,
        learning_rate=learning_rate,
        uplink_bytes=found.uplink_bytes,
        downlink_bytes=found.downlink_bytes,
        train_seconds=time.perf_counter() - started,
        rejections=tuple(rejections),
        simulated_seconds=trip.seconds,
        num_dropped=len(trip.dropped),
        num_late=len(trip.late),
        mean_staleness=sum(found.staleness) / len(found.staleness) if found.staleness else None,
        cohort=tuple(update.client for update in updates),
    )


def _train_own(federation: Federation, found: Delivery, round: int, rng: Rng) -> Iterator[tuple[int, State, int]]:
    """What clients keep of adapters that they train for themselves, drawn to what they began with, and their steps.

    One that diverges stays as it was.
    """
    local = federation.personal.in_round(federation.local)
    if local is None:
        return
    begin, there = found.begin, found.there
    names = federation.own_names(there.adapter)
    own = {client: federation.own_adapter(there, client) for client in begin}
    cohort = np.array(list(begin))
    for block, result in federation.train(cohort, own, {}, round=round, rng=rng, anchors=begin, local=local):
        for place, client in enumerate(block.clients):
            ended = {name: tensor[place] for name, tensor in result.adapters.items()}
            if result.failed_steps[place] >= 0 or not tree.is_finite(ended):
                federation.log(f"round {round}: client {client}'s own adapter diverged, and stays as it was")
                ended = {}
            after = {**own[client], **ended}
            # Copies, so that no client keeps its whole block in memory, nor another's tensors.
            yield client, tree.add_prefix(OWN, {name: after[name].clone() for name in names}), block.num_steps[place]


def _next(
    federation: Federation, state: ServerState, updates: Sequence[ClientUpdate], begin: Mapping[int, State]
) -> tuple[State, State, float | None]:
    """The next adapter and strategy state, and what averaging got wrong, from updates that may be averaged.

    Raises `UserError` naming the component that returns what it must not, `DivergedError` for what is not finite.
    """
    strategy, aggregator, round = federation.strategy, federation.aggregator, state.round + 1
    weights = checked_weights("server.strategy", strategy, strategy.weights(updates), len(updates))
    shared, ends = _in_server_terms(federation, state.adapter, updates, begin)
    deltas = [update.delta for update in updates]
    if federation.ranks is not None:
        deltas = [{name: end[name] - shared[name] for name in updates[0].delta} for end in ends]
    delta = checked_state("server.aggregator", aggregator, aggregator.combine(deltas, weights), deltas[0])
    _require_finite(delta, f"round {round}: what server.aggregator {called(aggregator)} made of finite updates")
    delta, memory = _corrected(federation, delta, state.strategy, updates, weights)
    adapter, memory = _stepped(federation, state, delta, memory)
    settled = strategy.finalize(adapter, ends, weights)
    adapter = checked_state("server.strategy", strategy, settled, with_any_residual(state.adapter))
    _require_finite(adapter, f"round {round}: what server.strategy {called(strategy)} made of a finite adapter")
    if strategy.has_personal:  # no product is the server's alone
        return adapter, memory, None
    averaged = adapter
    if not strategy.replaces_mean and layers(adapter):
        mean = tree.weighted_mean(deltas, weights)
        averaged = {**shared, **tree.add({name: shared[name] for name in mean}, mean)}
    return adapter, memory, aggregation_error(ends, weights, averaged, state.adapter)


def _corrected(
    federation: Federation, delta: State, memory: State, updates: Sequence[ClientUpdate], weights: Sequence[float]
) -> tuple[State, State]:
    """What the correction makes of the combined delta, and of what the server remembers."""
    before, correction = tree.strip_prefix(CORRECTION, memory), federation.local.correction
    if not before:
        return delta, memory
    cohort = Cohort(
        moved=[tree.flatten(update.delta) for update in updates],
        sent=[update.extra for update in updates],
        weights=weights,
        total_weight=sum(map(federation.strategy.weight, federation.sizes.tolist())),
    )
    flat = tree.flatten(delta)
    vector, after = correction.at_server(flat, before, cohort)
    vector = checked_tensor("local.correction", correction, vector, flat.shape)
    after = checked_state("local.correction", correction, after, before)
    _require_finite({"": vector, **after}, f"what local.correction {called(correction)} made of a finite mean")
    return tree.unflatten(vector, delta), {**memory, **tree.add_prefix(CORRECTION, after)}


def _stepped(federation: Federation, state: ServerState, delta: State, memory: State) -> tuple[State, State]:
    """The adapter and the server's memory after a step along `delta`."""
    optimizer = federation.server_optimizer
    adapter, after = optimizer.step(state.adapter, delta, memory)
    adapter = checked_state("server.optimizer", optimizer, adapter, state.adapter)
    after = checked_state("server.optimizer", optimizer, after, memory)
    made_by = f"the step of server.optimizer {called(optimizer)} at learning rate {optimizer.learning_rate:g}"
    _require_finite(adapter, f"round {state.round + 1}: {made_by}", "; lower server.optimizer.learning_rate")
    return adapter, after


def _require_finite(state: State, made_by: str, advice: str = "") -> None:
    """Raise `DivergedError` if a number is not finite: no client's fault, since what they send is screened."""
    if not tree.is_finite(state):
        raise DivergedError(f"{made_by} is not finite{advice}")


def _in_server_terms(
    federation: Federation, adapter: State, updates: Sequence[ClientUpdate], begin: Mapping[int, State]
) -> tuple[StateLike, list[StateLike]]:
    """What of the server's adapter the cohort can have, and the adapters that clients ended with.

    A client of a lower rank has zeros where it has no ranks. What is beyond the ranks of the whole cohort stays as it
    is: where A and B were both zero, nothing would ever change again.
    """
    if federation.ranks is None:
        return adapter, [_End(adapter, update.delta) for update in updates]
    shared = rank_padded(adapter, int(federation.ranks[[update.client for update in updates]].max()))
    return shared, [_End(begin[update.client], update.delta) for update in updates]


class _End(Mapping[str, Tensor]):
    """The adapter that a client ended with. Its tensors are made when they are read: mostly nobody does."""

    def __init__(self, begin: StateLike, delta: StateLike) -> None:
        self._begin, self._delta = begin, delta

    def __getitem__(self, name: str) -> Tensor:
        return self._begin[name] + self._delta[name] if name in self._delta else self._begin[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._begin)

    def __len__(self) -> int:
        return len(self._begin)
