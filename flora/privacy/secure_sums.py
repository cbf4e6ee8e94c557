"""Secure sums: the server learns the sum of what clients send, and nothing else of any of them."""

from __future__ import annotations

import importlib.util
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flora.core.counts import part_of
from flora.core.errors import UserError
from flora.core.registry import Component, OptionError, name_of, option, register
from flora.core.rng import Rng
from flora.privacy.fixed_point import Ring, Words
from flora.privacy.phases import MaskedRound, client_traffic
from flora.privacy.shamir import MOST_SHARES
from flora.privacy.traffic import PHASES, Attendance, SumOutcome, Traffic


@dataclass(frozen=True)
class SecureSum(Component):
    """How clients' numbers are added up without showing any client's to the server.

    Numbers are in fixed point: a client's delta times its weight, each number of the delta at most `range`, and the
    weight itself, so that the server learns the sum of both.
    """

    bits: int = option("bits of a word of the ring that the sums are in", 32, at_least=8, at_most=64)
    range: float = option(
        "largest number of a client's delta, below zero or above; the client sets those beyond it to it", 1.0, above=0
    )
    dropout: tuple[float, ...] = option(
        "probabilities that a client that was still there is gone before each phase: keys, shares, masked input, "
        "unmasking; a simulated network's dropouts come on top",
        (0.0, 0.0, 0.0, 0.0),
        at_least=0,
        at_most=1,
    )

    def check(self) -> None:
        if len(self.dropout) != len(PHASES):
            raise OptionError("dropout", f"expected {len(PHASES)} probabilities, one a phase, got {len(self.dropout)}")

    def require(self) -> None:
        """Raise `UserError` naming the extra if a library is missing."""

    def attendance(
        self, asked: Sequence[int], *, dropped: Sequence[int], late: Sequence[int], silent: Sequence[int], rng: Rng
    ) -> Attendance:
        """Draw through how many phases each client goes that was `asked`.

        The network's `dropped` ones are gone before one of the first three phases; the masked input of `late` ones
        comes when nobody waits for it; `silent` ones send none, because their update is not fit to be added.
        """
        clients = sorted(asked)
        is_gone = rng.child("dropout").numpy().random((len(clients), len(PHASES))) < np.array(self.dropout)
        before = np.where(is_gone.any(axis=1), is_gone.argmax(axis=1), len(PHASES))
        on_the_way = rng.child("network").numpy().integers(0, 3, len(clients))
        before = np.where(np.isin(clients, list(dropped)), np.minimum(before, on_the_way), before)
        too_late = np.isin(clients, list(late)) & (before >= 3)
        before = np.where(np.isin(clients, [*late, *silent]), np.minimum(before, 2), before)
        return Attendance(
            dict(zip(clients, before.tolist(), strict=True)), frozenset(np.array(clients)[too_late].tolist())
        )

    @abstractmethod
    def smallest_sum(self, num_asked: int) -> int:
        """Return of how many of the clients asked the input must come, for there to be a sum."""

    @abstractmethod
    def add_up(self, inputs: Mapping[int, Words], attendance: Attendance, ring: Ring, rng: Rng) -> SumOutcome:
        """Return the sum of the words `(P,)` of the clients whose input comes, or why there is none."""

    @abstractmethod
    def client_traffic(self, num_clients: int, payload_bytes: int) -> Traffic:
        """Return what one of so many clients sends and gets where all stay; its words take `payload_bytes`."""


@register("pairwise_masks")
@dataclass(frozen=True)
class PairwiseMasks(SecureSum):
    """Masks that cancel in the sum, from keys that pairs of clients agree on (Bonawitz et al., arXiv:1611.04482).

    Four phases: keys, shares of each client's two secrets, masked input, unmasking. Clients may be gone before any of
    them: as long as the threshold is left the sum of those whose input came is exact. Against a server that is honest
    but curious: keys are not signed, and nobody checks that all were told of the same survivors. With `neighbours` each
    client has masks and shares with so many others alone (Bell et al., CCS 2020).
    """

    threshold: float = option(
        "share of the clients asked (with `neighbours`: also of each client and its neighbours) that must stay to the "
        "end; with fewer the round has no sum",
        0.66,
        above=0.5,
        at_most=1,
    )
    neighbours: int | None = option(
        "clients that each one agrees on masks with, an even number, on a random circle; none: all others",
        None,
        at_least=2,
    )

    def check(self) -> None:
        super().check()
        if self.neighbours is not None and self.neighbours % 2:
            raise OptionError("neighbours", f"expected an even number, got {self.neighbours}")

    def require(self) -> None:
        if importlib.util.find_spec("cryptography") is None:
            raise UserError(
                f"server.secure_sum: {name_of(self)}: cryptography is not installed; pip install 'flora-clip[privacy]'"
            )

    def smallest_sum(self, num_asked: int) -> int:
        # Two at least, since a sum of one is no secret.
        return max(2, math.ceil(part_of(self.threshold, num_asked)))

    def share_threshold(self, num_asked: int) -> int:
        """Return how many shares give a client's secret."""
        return self.smallest_sum(num_asked if self.neighbours is None else min(num_asked, self.neighbours + 1))

    def add_up(self, inputs: Mapping[int, Words], attendance: Attendance, ring: Ring, rng: Rng) -> SumOutcome:
        asked = len(attendance.num_phases)
        if asked > MOST_SHARES:
            raise UserError(f"server.secure_sum: expected at most {MOST_SHARES:,} clients in a round, got {asked:,}")
        thresholds = self.smallest_sum(asked), self.share_threshold(asked)
        return MaskedRound(attendance, ring, self.neighbours, thresholds, rng).run(inputs)

    def client_traffic(self, num_clients: int, payload_bytes: int) -> Traffic:
        others = num_clients - 1 if self.neighbours is None else min(self.neighbours, num_clients - 1)
        return client_traffic(others, payload_bytes)
