"""The server's next adapter with differential privacy: a noisy sum over the expected cohort in place of the mean."""

from __future__ import annotations

from collections.abc import Sequence

from flora.core import tree
from flora.core.contracts import checked_state
from flora.core.low_rank import aggregation_error, layers, with_any_residual
from flora.core.rng import Rng
from flora.core.states import ClientUpdate, ServerState
from flora.federated.aggregation import Step, in_server_terms, moved_by, require_finite, stepped
from flora.federated.federation import Federation
from flora.federated.summing import Summed
from flora.privacy.rounds import PrivateRounds


def private_step(
    federation: Federation, state: ServerState, updates: Sequence[ClientUpdate], summed: Summed | None = None
) -> Step:
    """Step from `state` along what a mechanism releases of the updates, of which there may be none.

    Bound, sum, noise, divide by the expected cohort; every client counts the same. With a secure sum, `summed`, clients
    have bounded their updates, and the server adds noise to the sum. Raises as `aggregation.step`.
    """
    private, round, strategy = federation.privacy, state.round + 1, federation.server.strategy
    assert private is not None
    sent = tree.select(state.adapter, federation.roles.sent(state.adapter, round))
    expected = federation.participation.expected_size(round)

    def streams(number: int) -> Rng:
        return federation.rng.child("round", number, "privacy")

    if summed is None:
        deltas = [update.delta for update in updates]
        release = private.release(deltas, sent, state.privacy, round, streams, expected)
    else:
        release = private.release_sum(summed.total, len(updates), state.privacy, round, streams)
    delta = tree.in_types_of(sent, tree.scale(release.total, 1 / expected))
    require_finite(delta, f"round {round}: the noisy sum of finite updates")
    adapter, optimizer = stepped(federation, state, delta)
    adapter = checked_state(
        "server.strategy", strategy, strategy.finalize(adapter, [], []), with_any_residual(state.adapter)
    )
    figures = {
        "epsilon": private.epsilon(round),
        "sum_epsilon": _sum_epsilon(private, release.state),
        "clip_norm": release.clip_norm,
        "clipped_fraction": release.clipped_fraction,
    }
    error = None if summed is not None else _averaging_error(federation, state, updates)
    return Step(adapter, optimizer, state.correction, error, release.state, figures)


def _sum_epsilon(private: PrivateRounds, state: tree.StateLike) -> float | None:
    """The epsilon of sums alone, where clients noise their updates."""
    if not private.mechanism.noises_at_clients:
        return None
    return private.mechanism.sum_epsilon(private.noise_multiplier, float(state["precision"]))


def _averaging_error(federation: Federation, state: ServerState, updates: Sequence[ClientUpdate]) -> float | None:
    """The aggregation error of averaging A and B of the updates as they came, before bound and noise."""
    if not updates or federation.server.strategy.has_personal or not layers(state.adapter):
        return None
    _, ends = in_server_terms(federation, state.adapter, updates, {})
    weights = [1.0] * len(updates)
    averaged = moved_by(state.adapter, tree.weighted_mean([update.delta for update in updates], weights))
    return aggregation_error(ends, weights, averaged, state.adapter, federation.engine.processes)
