"""Who takes part in a round: who can be asked, who is chosen, and what becomes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from flora.communication.network import (
    ClientLoad,
    CohortOutcome,
    Network,
    Profiles,
    StragglerPolicy,
    cohort_outcome,
    durations,
)
from flora.communication.sampling import Sampler
from flora.core.contracts import checked_ids, refuse
from flora.core.counts import part_of
from flora.core.rng import Rng


@dataclass(frozen=True, eq=False)
class Participation:
    """Draws cohorts of clients of these `sizes` `(num_clients,)`, their numbers of training examples.

    With a `network` the clients have `profiles`, and `stragglers` says for whom the server waits.
    """

    sampler: Sampler
    sizes: np.ndarray
    network: Network | None = None
    profiles: Profiles | None = None
    stragglers: StragglerPolicy = field(default_factory=StragglerPolicy)

    def cohort_size(self, round: int) -> int:
        """Return how many clients take part in a round, counted from 1."""
        size, most = self.sampler.size_in(round, len(self.sizes)), len(self.sizes)
        if not 1 <= size <= most:
            refuse("clients.cohort", self.sampler, f"a cohort of {size} in round {round}, expected 1 to {most}")
        return size

    def most_asked(self, round: int) -> int:
        """Return how many clients are asked in a round, counted from 1, if enough of them can be."""
        size = self.cohort_size(round)
        return min(math.ceil(part_of(self.stragglers.over_selection, size)), len(self.sizes))

    def expected_size(self, round: int) -> float:
        """Return how many clients take part in a round, counted from 1, in the mean."""
        return self.sampler.expected_size(round, len(self.sizes))

    def cohort(self, round: int, present: np.ndarray, number: int, rng: Rng) -> np.ndarray:
        """A cohort of `number` of the clients `present` `(N,)`, sorted; of any number where the sampler draws that."""
        chosen = self.sampler.sample_in(round, self.sizes[present], number, rng)
        size = None if self.sampler.varies else number
        return present[checked_ids("clients.cohort", self.sampler, chosen, len(present), number=size)]

    def available(self, clock: float, rng: Rng) -> np.ndarray:
        """The sorted ids `(N,)` of the clients that can be asked at a time of the network's clock, in seconds."""
        assert self.network is not None and self.profiles is not None
        clients = self.network.available(self.profiles, clock, rng)
        return checked_ids("network", self.network, clients, len(self.sizes), what="clients that can be asked")

    def durations(self, clients: np.ndarray, load: ClientLoad) -> np.ndarray:
        """Return how many seconds each of `clients` `(N,)` takes from being asked to having delivered, `(N,)`."""
        assert self.network is not None and self.profiles is not None
        return durations(self.network, self.profiles, clients, load)

    def outcome(self, round: int, clock: float, load: ClientLoad, rng: Rng) -> CohortOutcome:
        """Draw who is asked in a round that begins at a time of the clock, and decide what becomes of them."""
        if self.network is None or self.profiles is None:
            everybody = np.arange(len(self.sizes))
            return CohortOutcome(self.cohort(round, everybody, self.cohort_size(round), rng.child("cohort")))
        stream = rng.child("network")
        present = self.available(clock, stream.child("available"))
        if not len(present):
            return CohortOutcome(present, seconds=self.network.wait_seconds)
        needed = min(self.cohort_size(round), len(present))
        number = min(math.ceil(part_of(self.stragglers.over_selection, needed)), len(present))
        asked = self.cohort(round, present, number, rng.child("cohort"))
        if not len(asked):
            return CohortOutcome(asked, seconds=self.network.wait_seconds)
        return cohort_outcome(
            self.stragglers,
            asked,
            takes=self.durations(asked, load),
            dropout=self.profiles.dropout[asked],
            num_needed=len(asked) if self.sampler.varies else needed,
            rng=stream.child("dropout"),
        )
