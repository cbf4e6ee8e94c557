"""The server's side of a sum under pairwise masks: four phases of messages, and what is left when the masks are gone.

The simulator runs every client's part and the server's, with the keys, masks, shares and messages that there would be
over a network; the server's part uses nothing but what clients have sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flora.core.rng import Rng
from flora.privacy import shamir
from flora.privacy.fixed_point import Ring, Words
from flora.privacy.masks import TAG_BYTES, Agreements, KeyPair
from flora.privacy.parties import (
    ADVERTISED_BYTES,
    SHARE_BYTES,
    Advertised,
    Party,
    Revealed,
    pair_mask,
    self_mask,
)
from flora.privacy.traffic import PHASES, Attendance, SumOutcome, Traffic

# A client's place among those that were asked, and which of its secrets a share is of.
PLACE_BYTES, KIND_BYTES = 4, 1
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES


class TooFewError(Exception):
    """Fewer clients are left than the threshold: the round has no sum."""


class MaskedRound:
    """One sum. `thresholds` are how many clients must stay, and how many shares give a secret."""

    def __init__(
        self,
        attendance: Attendance,
        ring: Ring,
        neighbours: int | None,
        thresholds: tuple[int, int],
        rng: Rng,
    ) -> None:
        self._clients, self._attendance, self._ring = sorted(attendance.num_phases), attendance, ring
        self._neighbours, self._rng = neighbours, rng
        self._smallest_sum, self._share_threshold = thresholds
        self._agreements, self._traffic, self._num_phases = Agreements(), Traffic(), 0

    def run(self, inputs: Mapping[int, Words]) -> SumOutcome:
        """Return the sum of the clients' words; nothing but sizes and messages is known of it if too few stay."""
        places = range(len(self._clients))
        self._parties = {p: Party(p, self._rng.child("client", self._clients[p]), self._agreements) for p in places}
        words: Words | None = None
        survivors: list[int] = []
        failure: str | None = None
        try:
            keys = self._advertise_keys()
            sealed = self._share_keys(keys)
            total, survivors = self._collect_input(inputs, sealed)
            words = self._unmask(total, survivors, keys, list(sealed))
        except TooFewError as error:
            failure, survivors = str(error), []
        return SumOutcome(
            words,
            tuple(self._clients[place] for place in survivors),
            self._traffic,
            self._num_phases,
            len(self._agreements),
            failure,
        )

    def _advertise_keys(self) -> dict[int, Advertised]:
        """Phase 1: clients send two public keys, and get those of their neighbours."""
        keys = {p: self._parties[p].advertise() for p in self._present(range(len(self._clients)))}
        for _ in keys:
            self._traffic.up("keys", ADVERTISED_BYTES)
        self._require(len(keys))
        self._graph = neighbours_of(list(keys), self._neighbours, self._rng.child("graph"))
        for place in keys:
            self._traffic.down("keys", len(self._graph[place]) * (PLACE_BYTES + ADVERTISED_BYTES))
        return keys

    def _share_keys(self, keys: Mapping[int, Advertised]) -> dict[int, dict[int, bytes]]:
        """Phase 2: clients send shares of their secrets, sealed; each gets those that are for it, by their sender."""
        sent = {}
        for place in self._present(keys):
            near = {other: keys[other] for other in self._graph[place]}
            sent[place] = self._parties[place].share(near, self._share_threshold)
            self._traffic.up("shares", len(sent[place]) * PLACE_BYTES + sum(map(len, sent[place].values())))
        self._require(len(sent))
        received = {p: {other: sent[other][p] for other in self._graph[p] if other in sent} for p in sent}
        for theirs in received.values():
            self._traffic.down("shares", len(theirs) * PLACE_BYTES + sum(map(len, theirs.values())))
        return received

    def _collect_input(
        self, inputs: Mapping[int, Words], sealed: Mapping[int, Mapping[int, bytes]]
    ) -> tuple[Words, list[int]]:
        """Phase 3: clients send their words under masks; each survivor is told which neighbours are left."""
        survivors, total = self._present(sealed), np.zeros(self._ring.num_words, self._ring.dtype)
        for place in survivors:
            masked = self._parties[place].masked(inputs[self._clients[place]], sealed[place], self._ring)
            packed = self._ring.pack(masked)
            self._traffic.up("input", len(packed))
            total = total + self._ring.unpack(packed)
        for _ in self._attendance.late:
            self._traffic.up("input", self._ring.payload_bytes)
        self._require(len(survivors))
        self._require_links(survivors, list(sealed))
        for place in survivors:
            self._traffic.down("input", PLACE_BYTES * len(set(survivors).intersection(self._graph[place])))
        return total, survivors

    def _unmask(
        self, total: Words, survivors: Sequence[int], keys: Mapping[int, Advertised], sharing: Sequence[int]
    ) -> Words:
        """Phase 4: survivors send shares, and the server takes the masks away that have not cancelled."""
        alive = set(survivors)
        shares: dict[int, dict[int, Revealed]] = {place: {} for place in sharing}
        answering = self._present(survivors)
        for place in answering:
            revealed = self._parties[place].unmask(alive)
            self._traffic.up("unmasking", len(revealed) * (PLACE_BYTES + KIND_BYTES + SHARE_BYTES))
            for owner, share in revealed.items():
                shares[owner][place] = share
        self._require(len(answering))
        for place in sharing:
            if place in alive:
                total = total - self_mask(self._secret(shares[place]), self._ring)
            elif linked := alive.intersection(self._graph[place]):
                pair = KeyPair(self._secret(shares[place]))
                for other in linked:
                    total = total - pair_mask(pair.agreed(keys[other].mask), other, place, self._ring)
        return self._ring.reduced(total)

    def _secret(self, shares: Mapping[int, Revealed]) -> bytes:
        """Return the secret whose shares came, by who holds them."""
        chosen = sorted(shares)[: self._share_threshold]
        if len(chosen) < self._share_threshold:
            raise TooFewError(
                f"unmasking: {len(chosen)} shares of a client's secret came, {self._share_threshold} needed"
            )
        values = np.stack([shares[place].share for place in chosen])
        return shamir.secret_of(shamir.reconstruct(values, [place + 1 for place in chosen]))

    def _require_links(self, survivors: Sequence[int], sharing: Sequence[int]) -> None:
        """Raise `TooFewError` if too few neighbours of a client are left to unmask, or the masks link not all of them.

        Where survivors fall into groups that have no mask in common the server would learn each group's sum.
        """
        alive = set(survivors)
        for place in sharing:
            holders = alive.intersection([place, *self._graph[place]])
            if holders and len(holders) < self._share_threshold:
                raise TooFewError(
                    f"masked input: {len(holders)} clients left that hold shares of one, {self._share_threshold} needed"
                )
        if not _is_connected(survivors, self._graph):
            raise TooFewError("masked input: the clients left fall into groups without a mask in common")

    def _present(self, places: Sequence[int] | Mapping[int, object] | range) -> list[int]:
        """Begin the next phase, and return which of the clients in `places` are still there."""
        self._num_phases += 1
        num_phases = self._attendance.num_phases
        return [place for place in places if num_phases[self._clients[place]] >= self._num_phases]

    def _require(self, number: int) -> None:
        """Raise `TooFewError` if fewer clients are left than must stay."""
        if number < self._smallest_sum:
            phase = PHASES[self._num_phases - 1].replace("input", "masked input")
            raise TooFewError(f"{phase}: {number} of {len(self._clients)} clients left, {self._smallest_sum} needed")


def neighbours_of(places: Sequence[int], number: int | None, rng: Rng) -> dict[int, list[int]]:
    """Return each client's neighbours, sorted: all others, or `number` of them, half on each side of a random circle.

    That is a Harary graph with its nodes permuted (Bell et al., CCS 2020, section 3).
    """
    if number is None or number >= len(places) - 1:
        return {place: [other for other in places if other != place] for place in places}
    circle = np.array(places)[rng.numpy().permutation(len(places))]
    steps = [step for step in range(-number // 2, number // 2 + 1) if step]
    around = np.stack([np.roll(circle, -step) for step in steps], axis=1)
    return {place: sorted(others) for place, others in zip(circle.tolist(), around.tolist(), strict=True)}


def client_traffic(num_neighbours: int, payload_bytes: int) -> Traffic:
    """Return what one client sends and gets where all stay to the end."""
    traffic = Traffic()
    traffic.up("keys", ADVERTISED_BYTES)
    traffic.down("keys", num_neighbours * (PLACE_BYTES + ADVERTISED_BYTES))
    traffic.up("shares", num_neighbours * (PLACE_BYTES + SEALED_BYTES))
    traffic.down("shares", num_neighbours * (PLACE_BYTES + SEALED_BYTES))
    traffic.up("input", payload_bytes)
    traffic.down("input", num_neighbours * PLACE_BYTES)
    traffic.up("unmasking", (num_neighbours + 1) * (PLACE_BYTES + KIND_BYTES + SHARE_BYTES))
    return traffic


def _is_connected(places: Sequence[int], graph: Mapping[int, Sequence[int]]) -> bool:
    """Whether from each of the clients one gets to every other one by way of neighbours among them."""
    left, waiting = set(places[1:]), [places[0]]
    while waiting:
        near = left.intersection(graph[waiting.pop()])
        left -= near
        waiting.extend(near)
    return not left
