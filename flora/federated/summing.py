"""Secure sums in a round: clients' weighted deltas as words, their sum, and the mean that the server reads of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flora.core import tree
from flora.core.contracts import called
from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.core.states import ClientUpdate
from flora.core.tree import State, StateLike
from flora.federated.federation import Federation, RoundPlan
from flora.privacy.discrete import discrete_gaussian
from flora.privacy.fixed_point import FixedPoint, Ring, Terms, Words
from flora.privacy.rotation import Rotation, rounded_at_random
from flora.privacy.secure_sums import SecureSum
from flora.privacy.traffic import SumOutcome


@dataclass(frozen=True)
class SumFormat:
    """How a client's numbers are written: each of its delta, at most `range`, times its weight, and then the weight.

    `noise_variance` is that of the discrete Gaussian noise that a client adds to each number, in squared units. With a
    `rotation` numbers are rotated first, and rounded at random to a norm of at most `largest` units.
    """

    range: float
    numbers: FixedPoint
    weight: FixedPoint
    noise_variance: int = 0
    largest: float | None = None
    rotation: Rotation | None = None

    def encode(self, delta: StateLike, weight: float, rng: Rng) -> Words:
        """Return the words `(P + 1,)` of a delta of P numbers, with noise where clients add some."""
        ring, vector = Ring(self.numbers.bits, 0), vector_of(delta).clip(-self.range, self.range)
        if self.rotation is None or self.largest is None:
            words = self.numbers.encode(vector * weight)
        else:
            rotated = np.ldexp(self.rotation.apply(vector * weight), self.numbers.fraction_bits)
            words = ring.reduced(rounded_at_random(rotated, self.largest, rng.child("rounding").numpy()))
        if self.noise_variance:
            words = ring.reduced(words + ring.reduced(discrete_gaussian(self.noise_variance, len(words), rng.numpy())))
        return np.concatenate([words, self.weight.encode(np.array([weight]))])

    def decode(self, words: Words, number: int) -> tuple[np.ndarray, float]:
        """Return the sum `(P,)` of weighted deltas of P = `number` numbers, and the sum of the weights."""
        numbers, weight = self.numbers.decode(words[:-1]), float(self.weight.decode(words[-1:])[0])
        return (numbers if self.rotation is None else self.rotation.undo(numbers, number)), weight


@dataclass(frozen=True, eq=False)
class Summed:
    """What came of a secure sum: the `updates` that are in it, the sum of their weighted deltas, and of the weights.

    `total` is in double precision, all zeros if there is no sum. `num_lost` clients were gone before they had sent
    anything that counts, but not by the network's doing.
    """

    updates: tuple[ClientUpdate, ...]
    total: State
    weight: float
    outcome: SumOutcome
    num_lost: int
    saturated_fraction: float

    def mean(self, like: StateLike) -> State:
        """Return the weighted mean of the deltas, in the types of `like`."""
        return tree.in_types_of(like, {name: tensor / self.weight for name, tensor in self.total.items()})

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


def sum_format(federation: Federation, secure_sum: SecureSum, num_asked: int, num_numbers: int) -> SumFormat:
    """Return how a delta's `num_numbers` are written so that no sum over the clients asked can overflow.

    With differential privacy all clients count alike, and numbers are rounded toward zero, which makes no update's norm
    larger than its bound. Raises `UserError` if the ring is too small.
    """
    strategy, bits, private = federation.server.strategy, secure_sum.bits, federation.privacy
    most, limit = 1.0, secure_sum.range
    rounding: np.ufunc = np.rint
    if private is None:
        most = max(strategy.weight(size) for size in set(federation.participation.sizes.tolist()))
    elif not private.mechanism.noises_at_clients:
        limit, rounding = min(limit, private.fixed_norm), np.trunc
    if not 0 < most < math.inf:
        raise UserError(f"server.strategy: {called(strategy)} returned a weight of {most:g}")
    weight = FixedPoint.for_sum(bits, most, num_asked)
    if weight.fraction_bits < 0:
        raise UserError(
            f"server.secure_sum.bits: {bits} bits can't hold {num_asked:,} clients' weights of up to {most:g}: "
            "expected more bits, or weighting uniform"
        )
    if private is not None and private.mechanism.noises_in_sum:
        terms = Terms(num_asked, secure_sum.smallest_sum(num_asked), num_numbers)
        noisy = private.mechanism.format_of(bits, limit, private.noise_multiplier, terms)
        return SumFormat(limit, noisy.numbers, weight, noisy.variance, noisy.largest)
    numbers = replace(FixedPoint.for_sum(bits, limit * most, num_asked), rounding=rounding)
    return SumFormat(limit, numbers, weight)


def check_sums(federation: Federation, adapter: StateLike) -> None:
    """Raise `UserError` if the ring of a secure sum is too small for round 1 from the adapter of the server."""
    if federation.server.secure_sum is not None and federation.num_rounds:
        number = tree.count(tree.select(adapter, federation.roles.sent(adapter, 1)))
        sum_format(federation, federation.server.secure_sum, federation.participation.most_asked(1), number)


def vector_of(delta: StateLike) -> np.ndarray:
    """Return a delta's numbers `(P,)` in the order of its names, float64."""
    return tree.flatten({name: tensor.double() for name, tensor in delta.items()}).numpy()


def sum_securely(federation: Federation, plan: RoundPlan, accepted: Sequence[ClientUpdate]) -> Summed | None:
    """Add up the deltas of the updates that are fit to be averaged, each by its own client's part in the protocol.

    None where the server sums in the clear, and where nobody could be asked. A client whose update is not fit to be
    averaged knows that, and sends none. With differential privacy clients bound what they send by themselves.
    """
    secure_sum, outcome, private = federation.server.secure_sum, plan.outcome, federation.privacy
    if secure_sum is None or not outcome.asked:
        return None
    like = tree.select(plan.view.adapter, federation.roles.sent(plan.view.adapter, plan.round))
    rng, number = plan.rng.child("secure_sum"), tree.count(like)
    fmt, num_sent = sum_format(federation, secure_sum, len(outcome.asked), number), federation.num_sent(number)
    if fmt.largest is not None:
        fmt = replace(fmt, rotation=Rotation.drawn(num_sent, rng.child("rotation")))
    fit = {update.client: update for update in accepted}
    deltas = {client: update.delta for client, update in fit.items()}
    weights = {client: federation.server.strategy.weight(update.num_examples) for client, update in fit.items()}
    silent = [client for client in outcome.clients.tolist() if client not in fit]
    if private is not None:
        deltas = {client: private.within(delta) for client, delta in deltas.items()}
        if (
            private.mechanism.noises_in_sum
        ):  # that a client has nothing to send is not to be seen, nor to cost its noise
            deltas, silent = deltas | {client: tree.scale(like, 0.0) for client in silent}, []
        weights = dict.fromkeys(deltas, 1.0)
    attendance = secure_sum.attendance(
        outcome.asked, dropped=outcome.dropped.tolist(), late=outcome.late.tolist(), silent=silent, rng=rng
    )
    ring = Ring(secure_sum.bits, num_sent + 1)
    inputs = {
        client: fmt.encode(delta, weights[client], rng.child("noise", client)) for client, delta in deltas.items()
    }
    added = secure_sum.add_up(inputs, attendance, ring, rng)
    words = np.zeros(ring.num_words, ring.dtype) if added.words is None else added.words
    total, weight = fmt.decode(words, number)
    beyond = sum(int((np.abs(vector_of(delta)) > fmt.range).sum()) for delta in deltas.values())
    return Summed(
        updates=tuple(fit[client] for client in added.summed if client in fit),
        total=tree.unflatten(torch.from_numpy(total), like),
        weight=weight,
        outcome=added,
        num_lost=sum(attendance.num_phases[client] < 3 for client in fit),
        saturated_fraction=beyond / max(len(fit) * number, 1),
    )
