"""A mechanism at work in a run: its noise multiplier, what it releases in a round, and how many rounds it may run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flora.core import tree
from flora.core.errors import UserError
from flora.core.registry import name_of
from flora.core.rng import Rng
from flora.core.tree import State, StateLike
from flora.privacy.accounting import Attendance, smallest_multiplier
from flora.privacy.bounds import ClipNorm, bounded, summed
from flora.privacy.mechanisms import Privacy, Streams


@dataclass(frozen=True, eq=False)
class Release:
    """What a round releases: the noisy sum in double precision, and what the mechanism carries on.

    `clip_norm` was the round's bound; `clipped_fraction` of the updates lay beyond it, None where the server doesn't
    know.
    """

    total: State
    state: State
    clip_norm: float
    clipped_fraction: float | None


@dataclass(frozen=True, eq=False)
class PrivateRounds:
    """A mechanism with the noise multiplier that it was given or that was searched for `num_rounds` rounds."""

    mechanism: Privacy
    attendance: Attendance
    num_rounds: int
    noise_multiplier: float

    @classmethod
    def of(cls, mechanism: Privacy, attendance: Attendance, num_rounds: int) -> PrivateRounds:
        """Search the noise multiplier that the mechanism's target needs, where it has one. Raises `UserError`."""
        multiplier, target = mechanism.noise_multiplier, mechanism.target_epsilon
        if multiplier is None:
            assert target is not None
            multiplier = smallest_multiplier(
                lambda candidate: mechanism.epsilon(candidate, max(num_rounds, 1), attendance), target
            )
        if isinstance(mechanism.clip_norm, ClipNorm):
            mechanism.clip_norm.multiplier_of_sum(multiplier, 1.0)  # raises where the count would spend it all
        made = cls(mechanism, attendance, num_rounds, multiplier)
        if num_rounds and not made.last_round:
            raise UserError(
                f"privacy.budget_epsilon: expected at least {made.epsilon(1):.4g}, which round 1 spends, got "
                f"{mechanism.budget_epsilon:g}"
            )
        return made

    def epsilon(self, round: int) -> float:
        """Return the epsilon that the rounds up to this one have spent."""
        return self.mechanism.epsilon(self.noise_multiplier, round, self.attendance)

    @property
    def last_round(self) -> int:
        """The last round that the budget allows, at most `num_rounds`."""
        budget, low, high = self.mechanism.budget_epsilon, 0, self.num_rounds
        if budget is None:
            return high
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.epsilon(middle) <= budget else (low, middle - 1)
        return low

    def lines(self) -> list[str]:
        """Lines that say what the mechanism promises, for the log before the first round."""
        mechanism, rounds = self.mechanism, self.last_round
        lines = [
            f"privacy: {name_of(mechanism)}, noise multiplier {self.noise_multiplier:.4g}: epsilon "
            f"{self.epsilon(rounds):.4g} at delta {mechanism.delta:g} after {rounds} rounds; all clients count alike"
        ]
        if mechanism.counts_sampling and self.attendance.fraction is None:
            lines.append(
                "privacy: cohorts are not Poisson samples, so the accountant uses no amplification by sampling"
            )
        if mechanism.publish:
            lines.append("privacy: records have figures that it doesn't cover (privacy.publish: false leaves them out)")
        lines.append("privacy: the noise is seeded, for research: a deployment needs a cryptographic generator")
        return lines

    def initial_state(self) -> State:
        """The state before the first round: the noise multiplier, the bound where it adapts, what sums spend."""
        state = {"noise_multiplier": _number(self.noise_multiplier)}
        if isinstance(self.mechanism.clip_norm, ClipNorm):
            state["clip_norm"] = _number(self.mechanism.clip_norm.first)
        if self.mechanism.noises_at_clients:
            state["precision"] = _number(0.0)
        return state

    def sent(self, delta: StateLike, state: StateLike, rng: Rng) -> StateLike:
        """Return what a client sends of its delta."""
        if not self.mechanism.noises_at_clients or not tree.is_finite(delta):
            return delta
        return self.mechanism.at_client(delta, float(state["noise_multiplier"]), rng)

    @property
    def fixed_norm(self) -> float:
        """The bound of updates, where it is the same in each round."""
        assert isinstance(self.mechanism.clip_norm, float | int)  # as the rules see to with a secure sum
        return float(self.mechanism.clip_norm)

    def within(self, delta: StateLike) -> StateLike:
        """Return what a client puts into a secure sum: its delta within the bound, or as it has noised it."""
        return delta if self.mechanism.noises_at_clients else bounded(delta, self.fixed_norm)[0]

    def release_sum(self, total: State, number: int, state: State, round: int, streams: Streams) -> Release:
        """Add noise to a secure sum of `number` deltas, which clients have bounded by themselves; see `release`."""
        if self.mechanism.noises_at_clients:
            after = {**state, "precision": state["precision"] + (1 / number if number else 0.0)}
            return Release(total, after, self.fixed_norm, None)
        deviation = float(state["noise_multiplier"]) * self.fixed_norm
        total = tree.add(total, self.mechanism.on_sum(total, deviation, round, streams))
        return Release(total, state, self.fixed_norm, None)

    def release(
        self, deltas: Sequence[StateLike], like: StateLike, state: State, round: int, streams: Streams, expected: float
    ) -> Release:
        """Bound a round's deltas, which have the names and shapes of `like`, add them up, and add noise to the sum.

        `state` is what was carried here; `expected` is the expected number of deltas. There may be none.
        """
        if self.mechanism.noises_at_clients:
            after = {**state, "precision": state["precision"] + (1 / len(deltas) if deltas else 0.0)}
            return Release(summed(deltas, like), after, float(self.mechanism.clip_norm), None)  # type: ignore[arg-type]
        adaptive, multiplier = self.mechanism.clip_norm, float(state["noise_multiplier"])
        if not isinstance(adaptive, ClipNorm):
            clip_norm = float(adaptive)
        else:
            clip_norm, multiplier = float(state["clip_norm"]), adaptive.multiplier_of_sum(multiplier, expected)
        within = [bounded(delta, clip_norm) for delta in deltas]
        total = summed((delta for delta, _ in within), like)
        total = tree.add(total, self.mechanism.on_sum(like, multiplier * clip_norm, round, streams))
        num_within = sum(is_within for _, is_within in within)
        after = state
        if isinstance(adaptive, ClipNorm):
            deviation = adaptive.deviation(float(state["noise_multiplier"]), expected)
            noise = deviation * float(streams(round).child("count").numpy().standard_normal())
            following = adaptive.after(clip_norm, num_within, len(deltas), expected, noise)
            after = {**state, "clip_norm": _number(following)}
        return Release(total, after, clip_norm, 1 - num_within / len(deltas) if deltas else None)


def _number(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)
