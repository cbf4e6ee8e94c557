"""Secure sums in a round: clients' weighted deltas as words, their sum, and the mean that the server reads of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flora.core import tree
from flora.core.contracts import called
from flora.core.errors import UserError
from flora.core.states import ClientUpdate
from flora.core.tree import State, StateLike
from flora.federated.federation import Federation, RoundPlan
from flora.privacy.fixed_point import FixedPoint, Ring, Words
from flora.privacy.secure_sums import SecureSum
from flora.privacy.traffic import SumOutcome


@dataclass(frozen=True)
class SumFormat:
    """How a client's numbers are written: each of its delta, at most `range`, times its weight, and then the weight."""

    range: float
    numbers: FixedPoint
    weight: FixedPoint

    def encode(self, delta: StateLike, weight: float) -> Words:
        """Return the words `(P + 1,)` of a delta of P numbers."""
        within = vector_of(delta).clip(-self.range, self.range)
        return np.concatenate([self.numbers.encode(within * weight), self.weight.encode(np.array([weight]))])

    def decode(self, words: Words) -> tuple[np.ndarray, float]:
        """Return the sum `(P,)` of weighted deltas, and the sum of the weights."""
        return self.numbers.decode(words[:-1]), float(self.weight.decode(words[-1:])[0])


@dataclass(frozen=True, eq=False)
class Summed:
    """What came of a secure sum: the `updates` that are in it, and the `mean` of their deltas, empty if there is none.

    `num_lost` clients were gone before they had sent anything that counts, but not by the network's doing.
    """

    updates: tuple[ClientUpdate, ...]
    mean: State
    outcome: SumOutcome
    num_lost: int
    saturated_fraction: float

    def figures(self, num_dropped: int, broadcast_bytes: int) -> dict[str, Any]:
        """Return the round's metrics that a secure sum changes or has."""
        traffic = self.outcome.traffic
        up, down = traffic.uplink_bytes, traffic.downlink_bytes
        by_phase = {f"{phase} {way}": of[phase] for phase in up for way, of in (("up", up), ("down", down))}
        return {
            "uplink_bytes": sum(up.values()),
            "downlink_bytes": broadcast_bytes + sum(down.values()),
            "num_dropped": num_dropped + self.num_lost,
            "sum_phases": self.outcome.num_phases,
            "sum_messages": traffic.num_messages,
            "sum_bytes": by_phase,
            "num_failed_sums": int(self.outcome.words is None),
            "saturated_fraction": self.saturated_fraction,
        }


def sum_format(federation: Federation, secure_sum: SecureSum, num_asked: int) -> SumFormat:
    """Return how numbers are written so that no sum over the clients asked can overflow.

    Raises `UserError` if the ring is too small.
    """
    strategy, bits = federation.server.strategy, secure_sum.bits
    most = max(strategy.weight(size) for size in set(federation.participation.sizes.tolist()))
    if not 0 < most < math.inf:
        raise UserError(f"server.strategy: {called(strategy)} returned a weight of {most:g}")
    weight = FixedPoint.for_sum(bits, most, num_asked)
    if weight.fraction_bits < 0:
        raise UserError(
            f"server.secure_sum.bits: {bits} bits can't hold {num_asked:,} clients' weights of up to {most:g}: "
            "expected more bits, or weighting uniform"
        )
    return SumFormat(secure_sum.range, FixedPoint.for_sum(bits, secure_sum.range * most, num_asked), weight)


def check_sums(federation: Federation) -> None:
    """Raise `UserError` if a secure sum is asked for whose ring is too small for round 1."""
    if federation.server.secure_sum is not None and federation.num_rounds:
        sum_format(federation, federation.server.secure_sum, federation.participation.most_asked(1))


def vector_of(delta: StateLike) -> np.ndarray:
    """Return a delta's numbers in the order of its names, float64."""
    return tree.flatten({name: tensor.double() for name, tensor in delta.items()}).numpy()


def sum_securely(federation: Federation, plan: RoundPlan, accepted: Sequence[ClientUpdate]) -> Summed | None:
    """Add up the deltas of the updates that are fit to be averaged, each by its own client's part in the protocol.

    None where the server sums in the clear, and where nobody could be asked. A client whose update is not fit to be
    averaged knows that, and sends none.
    """
    secure_sum, outcome = federation.server.secure_sum, plan.outcome
    if secure_sum is None or not outcome.asked:
        return None
    fmt = sum_format(federation, secure_sum, len(outcome.asked))
    rng, weight = plan.rng.child("secure_sum"), federation.server.strategy.weight
    fit = {update.client: update for update in accepted}
    inputs = {client: fmt.encode(update.delta, weight(update.num_examples)) for client, update in fit.items()}
    attendance = secure_sum.attendance(
        outcome.asked,
        dropped=outcome.dropped.tolist(),
        late=outcome.late.tolist(),
        silent=[client for client in outcome.clients.tolist() if client not in fit],
        rng=rng,
    )
    like = tree.select(plan.view.adapter, federation.roles.sent(plan.view.adapter, plan.round))
    ring = Ring(secure_sum.bits, tree.count(like) + 1)
    added = secure_sum.add_up(inputs, attendance, ring, rng)
    mean: State = {}
    if added.words is None:
        federation.engine.log(f"round {plan.round}: no sum: {added.failure}: the adapter stays as it was")
    else:
        total, total_weight = fmt.decode(added.words)
        mean = tree.in_types_of(like, tree.unflatten(torch.from_numpy(total / total_weight), like))
    beyond = sum(int((np.abs(vector_of(update.delta)) > secure_sum.range).sum()) for update in accepted)
    return Summed(
        updates=tuple(fit[client] for client in added.summed),
        mean=mean,
        outcome=added,
        num_lost=sum(attendance.num_phases[client] < 3 for client in fit),
        saturated_fraction=beyond / max(len(accepted) * (ring.num_words - 1), 1),
    )
