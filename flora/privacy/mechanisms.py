"""Client-level differential privacy: where noise is added, how much of it, and what that guarantees.

Neighbours are federations of which one has one client more, or one whose updates are zero (add or remove a client). An
update counts as a whole: all its tensors together have one bound. The expected number of a round's clients divides the
noisy sum, whoever comes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from flora.core import tree
from flora.core.registry import Component, OptionError, name_of, option, register
from flora.core.rng import Rng
from flora.core.tree import State, StateLike
from flora.privacy.accounting import ACCOUNTANTS, Attendance, spent_epsilon, tree_sensitivity
from flora.privacy.bounds import ClipNorm, bounded, gaussian
from flora.privacy.fixed_point import NoisyFormat, Terms

Streams = Callable[[int], Rng]
"""The random numbers of a round's noise, by the round's number."""


@dataclass(frozen=True)
class Privacy(Component):
    """Client-level differential privacy: updates are bounded, and noise is added to their sum."""

    noises_at_clients: ClassVar[bool] = False
    """Whether clients bound and noise their updates before they send them."""
    noises_in_sum: ClassVar[bool] = False
    """Whether clients add their shares of the noise to the words of a secure sum."""
    same_tensors: ClassVar[bool] = False
    """Whether the same tensors must be sent in each round."""
    counts_sampling: ClassVar[bool] = False
    """Whether its epsilon is smaller where cohorts are Poisson samples."""

    clip_norm: float | ClipNorm = option("largest norm of an update over all its tensors; or how it adapts", above=0)
    noise_multiplier: float | None = option(
        "standard deviation of the noise, in clip norms; none: as `target_epsilon` needs it", None, above=0
    )
    delta: float = option("the probability that the guarantee leaves out", 1e-5, above=0, below=1)
    accountant: str = option("how epsilon is computed: nearly exact, or as a looser bound", "pld", choices=ACCOUNTANTS)
    target_epsilon: float | None = option(
        "epsilon after all rounds, for which the smallest noise multiplier is searched", None, above=0
    )
    budget_epsilon: float | None = option("the run ends before the round that would spend more", None, above=0)
    publish: bool = option("whether records have figures that the guarantee doesn't cover", True)

    def check(self) -> None:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise OptionError("noise_multiplier", "expected either this or `target_epsilon`")
        if None not in (self.budget_epsilon, self.target_epsilon) and self.budget_epsilon < self.target_epsilon:  # type: ignore[operator]
            raise OptionError("budget_epsilon", f"expected at least target_epsilon, {self.target_epsilon:g}")

    @abstractmethod
    def epsilon(self, noise_multiplier: float, num_rounds: int, attendance: Attendance) -> float:
        """Return the epsilon at `delta` that the first rounds spend together."""

    def at_client(self, delta: StateLike, noise_multiplier: float, rng: Rng) -> State:
        """Return what a client sends of its delta."""
        return dict(delta)

    def sum_epsilon(self, noise_multiplier: float, precision: float) -> float | None:
        """Return the epsilon of sums alone where `noises_at_clients`; None if that is not known.

        `precision` is the sum over rounds of 1 / the number of clients that came.
        """
        return None

    def num_sent(self, num_numbers: int) -> int:
        """Return how many numbers go into a secure sum for an update of `num_numbers`."""
        return num_numbers

    def format_of(self, bits: int, limit: float, noise_multiplier: float, terms: Terms) -> NoisyFormat:
        """Return how numbers of at most `limit` and a client's share of the noise are written where `noises_in_sum`.

        Raises `UserError` if the ring is too small.
        """
        raise NotImplementedError

    def on_sum(self, like: StateLike, deviation: float, round: int, streams: Streams) -> State:
        """Return the noise on a round's sum, with the names and shapes of `like`, in double precision."""
        return gaussian(like, deviation, streams(round))


@register("central")
@dataclass(frozen=True)
class Central(Privacy):
    """The server bounds each update and adds Gaussian noise to a round's sum (DP-FedAvg, arXiv:1710.06963).

    Against whoever sees the server's adapters, all of them; the server itself is trusted. With cohorts by `poisson`
    epsilon is that of sampled sums; with others each client counts for all rounds that it may take part in.
    """

    counts_sampling: ClassVar[bool] = True

    def epsilon(self, noise_multiplier: float, num_rounds: int, attendance: Attendance) -> float:
        counted = attendance.most(num_rounds)
        return spent_epsilon(noise_multiplier, counted, attendance.fraction, self.delta, self.accountant)


@dataclass(frozen=True)
class FixedNorm(Privacy):
    """A mechanism whose bound is the same in each round."""

    def check(self) -> None:
        super().check()
        if not isinstance(self.clip_norm, float | int):
            raise OptionError("clip_norm", f"expected a number: {name_of(self)} has no noisy count to adapt it by")


@register("local")
@dataclass(frozen=True)
class Local(FixedNorm):
    """Each client bounds its update and adds Gaussian noise to it before it sends it (NbAFL, arXiv:1911.00222).

    Against the server, too: `epsilon` is that of all that a client sends. Who sees nothing but sums has their noise
    added up to be protected by: `sum_epsilon`. Differs from the paper: there parameters are noised, not updates, and
    the server adds noise of its own before it broadcasts; epsilon is not the paper's but that of Gaussian mechanisms.
    """

    noises_at_clients: ClassVar[bool] = True

    def epsilon(self, noise_multiplier: float, num_rounds: int, attendance: Attendance) -> float:
        return spent_epsilon(noise_multiplier, attendance.most(num_rounds), None, self.delta, self.accountant)

    def at_client(self, delta: StateLike, noise_multiplier: float, rng: Rng) -> State:
        assert isinstance(self.clip_norm, float | int)
        within, _ = bounded(delta, self.clip_norm)
        noise = gaussian(delta, noise_multiplier * self.clip_norm, rng)
        return tree.in_types_of(delta, tree.add(within, noise))

    def sum_epsilon(self, noise_multiplier: float, precision: float) -> float:
        """Return the epsilon of sums alone: see `Privacy.sum_epsilon`.

        A sum over n clients has the noise of n; Gaussian sums of different noise compose by adding precisions up.
        """
        if not precision:
            return 0.0
        return spent_epsilon(noise_multiplier / math.sqrt(precision), 1, None, self.delta, self.accountant)


@register("tree")
@dataclass(frozen=True)
class Tree(FixedNorm):
    """The sums of all rounds so far get the noise of a binary tree's nodes (DP-FTRL, arXiv:2103.00039).

    For cohorts that are not sampled. A round's noise is what its sum of all rounds has more than the one before, so
    that over T rounds about log2(T) nodes' noise is left instead of T rounds' (with server optimizer sgd). Epsilon
    counts the rounds in which a client can take part, and their distance, which `in_turn` bounds. Noise is not made
    smaller from the other nodes (Honaker).
    """

    same_tensors: ClassVar[bool] = True

    restart_every: int | None = option("rounds after which a new tree begins; none: one tree for all", None, at_least=1)

    def epsilon(self, noise_multiplier: float, num_rounds: int, attendance: Attendance) -> float:
        taken = attendance.most(num_rounds)
        sensitivity = tree_sensitivity(num_rounds, self.restart_every, taken, attendance.separation)
        if not sensitivity:
            return 0.0
        return spent_epsilon(noise_multiplier / sensitivity, 1, None, self.delta, self.accountant)

    def on_sum(self, like: StateLike, deviation: float, round: int, streams: Streams) -> State:
        now, before = set(self.nodes(round)), set(self.nodes(round - 1))
        if self.restart_every is not None and (round - 1) % self.restart_every == 0:
            before = set()  # what the tree before came to stays in the adapter
        noise = tree.scale(gaussian(like, 0.0, streams(round)), 0.0)
        for sign, nodes in ((1.0, now - before), (-1.0, before - now)):
            for last, size in sorted(nodes):
                noise = tree.add(noise, gaussian(like, deviation, streams(last).child("node", size)), sign)
        return noise

    def nodes(self, round: int) -> list[tuple[int, int]]:
        """Return the nodes that cover a tree's rounds up to this one: the last round and the size of each."""
        leaves = round if self.restart_every is None else (round - 1) % self.restart_every + 1
        last, nodes = round - leaves, []
        for level in reversed(range(leaves.bit_length())):
            if leaves >> level & 1:
                last += 1 << level
                nodes.append((last, 1 << level))
        return nodes
