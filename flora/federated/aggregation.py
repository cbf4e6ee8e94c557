"""The server's next adapter, from updates that may be averaged: aggregator, correction, server optimizer, strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flora.client.corrections import Cohort
from flora.core import tree
from flora.core.clusters import in_cluster
from flora.core.contracts import called, checked_state, checked_tensor, checked_weights
from flora.core.errors import DivergedError
from flora.core.low_rank import aggregation_error, layers, rank_padded, with_any_residual
from flora.core.states import ClientUpdate, ServerState
from flora.core.tree import Moved, State, StateLike
from flora.federated.federation import Federation
from flora.federated.summing import Summed
from flora.server.aggregators import Aggregator


@dataclass(frozen=True, eq=False)
class Step:
    """The server's adapter, its optimizer's state and a correction's memory after a step along the cohort's deltas.

    `aggregation_error` is what averaging got wrong of the mean product B A; None where there is none to compare with.
    `privacy` is what a mechanism of differential privacy carries on, `figures` are its metrics of the round.
    """

    adapter: State
    optimizer: State
    correction: State
    aggregation_error: float | None
    privacy: State = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)


def step(
    federation: Federation,
    state: ServerState,
    updates: Sequence[ClientUpdate],
    starts: Mapping[int, StateLike],
    summed: Summed | None = None,
) -> Step:
    """Step from `state` along the updates' deltas; `starts` are the adapters that their clients trained from, by id.

    With a secure sum, `summed`, the server has nothing but that of the deltas. Raises `UserError` naming the
    component that returns what it must not, `DivergedError` for what is not finite.
    """
    strategy, aggregator, round = federation.server.strategy, federation.server.aggregator, state.round + 1
    weights = checked_weights("server.strategy", strategy, strategy.weights(updates), len(updates))
    shared, ends = in_server_terms(federation, state.adapter, updates, starts)
    deltas: list[StateLike] = [update.delta for update in updates]
    if federation.ranks is not None:
        deltas = [{name: end[name] - shared[name] for name in updates[0].delta} for end in ends]
    if summed is None:
        combined = _combined(aggregator, [update.cluster for update in updates], deltas, weights)
    else:
        combined = summed.mean(deltas[0])
    require_finite(combined, f"round {round}: what server.aggregator {called(aggregator)} made of finite updates")
    delta, correction = _corrected(federation, combined, state.correction, updates, weights)
    adapter, optimizer = stepped(federation, state, delta)
    finalized = strategy.finalize(adapter, ends, weights)
    adapter = checked_state("server.strategy", strategy, finalized, with_any_residual(state.adapter))
    require_finite(adapter, f"round {round}: what server.strategy {called(strategy)} made of a finite adapter")
    error = None
    if not strategy.has_personal and strategy.num_clusters == 1 and summed is None:  # else no product is the server's
        averaged: StateLike = adapter
        if not strategy.replaces_mean and layers(adapter):
            averaged = moved_by(shared, combined if aggregator.is_mean else tree.weighted_mean(deltas, weights))
        error = aggregation_error(ends, weights, averaged, state.adapter, federation.engine.processes)
    return Step(adapter, optimizer, correction, error)


def _combined(
    aggregator: Aggregator, clusters: Sequence[int], deltas: Sequence[StateLike], weights: Sequence[float]
) -> State:
    """What the aggregator makes of the deltas of each cluster; `clusters` says which one each delta is of."""
    combined: State = {}
    for cluster in sorted(set(clusters)):
        rows = [row for row, each in enumerate(clusters) if each == cluster]
        made = aggregator.combine([deltas[row] for row in rows], [weights[row] for row in rows])
        combined |= in_cluster(checked_state("server.aggregator", aggregator, made, deltas[0]), cluster)
    return combined


def _corrected(
    federation: Federation, delta: State, memory: State, updates: Sequence[ClientUpdate], weights: Sequence[float]
) -> tuple[State, State]:
    """Return what the correction makes of the combined delta, and of what the server remembers."""
    correction = federation.local.correction
    if not memory:
        return delta, memory
    cohort = Cohort(
        moved=[tree.flatten(update.delta) for update in updates],
        sent=[update.extra for update in updates],
        weights=weights,
        total_weight=sum(map(federation.server.strategy.weight, federation.participation.sizes.tolist())),
    )
    flat = tree.flatten(delta)
    vector, after = correction.at_server(flat, memory, cohort)
    vector = checked_tensor("local.correction", correction, vector, flat.shape)
    after = checked_state("local.correction", correction, after, memory)
    require_finite({"": vector, **after}, f"what local.correction {called(correction)} made of a finite mean")
    return tree.unflatten(vector, delta), after


def stepped(federation: Federation, state: ServerState, delta: State) -> tuple[State, State]:
    """The adapter and the server optimizer's state after a step along `delta`."""
    optimizer = federation.server.optimizer
    adapter, after = optimizer.step(state.adapter, delta, state.optimizer)
    adapter = checked_state("server.optimizer", optimizer, adapter, state.adapter)
    after = checked_state("server.optimizer", optimizer, after, state.optimizer)
    made_by = f"the step of server.optimizer {called(optimizer)} at learning rate {optimizer.learning_rate:g}"
    require_finite(adapter, f"round {state.round + 1}: {made_by}", "; lower server.optimizer.learning_rate")
    return adapter, after


def released(federation: Federation, before: State, adapter: State, state: State, round: int) -> tuple[State, State]:
    """Return the adapter that the server releases after a round, and its optimizer's state.

    `adapter` is what the round has come to, `before` what was released after the one before.
    """
    optimizer = federation.server.optimizer
    result, after = optimizer.released(before, adapter, state, round)
    result = checked_state("server.optimizer", optimizer, result, with_any_residual(adapter))
    return result, checked_state("server.optimizer", optimizer, after, state)


def moved_by(adapter: StateLike, delta: StateLike) -> State:
    """The adapter after a step of 1 along a delta, which may lack some of its tensors."""
    return {**adapter, **tree.add(tree.select(adapter, delta), delta)}


def require_finite(state: State, made_by: str, advice: str = "") -> None:
    """Raise `DivergedError` if a number is not finite: no client's fault, since what they send is screened."""
    if not tree.is_finite(state):
        raise DivergedError(f"{made_by} is not finite{advice}")


def in_server_terms(
    federation: Federation, adapter: State, updates: Sequence[ClientUpdate], starts: Mapping[int, StateLike]
) -> tuple[StateLike, list[StateLike]]:
    """Return what of the server's adapter the cohort can have, and the adapters that clients ended with.

    A client of a lower rank has zeros where it has no ranks. What is beyond the ranks of the whole cohort stays as it
    is: where A and B were both zero, nothing would ever change again.
    """
    if federation.ranks is None:
        return adapter, [Moved(adapter, update.delta) for update in updates]
    shared = rank_padded(adapter, int(federation.ranks[[update.client for update in updates]].max()))
    return shared, [Moved(starts[update.client], update.delta) for update in updates]
