"""A client of a secure sum: what it sends in each of the four phases, and what it refuses to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flora.core.rng import Rng
from flora.privacy import shamir
from flora.privacy.fixed_point import Ring, Words
from flora.privacy.masks import KEY_BYTES, Agreements, KeyPair, derived, expand, field_elements, seal, unseal

SHARE_BYTES = 2 * shamir.NUM_LIMBS
ADVERTISED_BYTES = 2 * KEY_BYTES
_WORDS = np.dtype("<u2")


class Advertised(NamedTuple):
    """A client's public keys: one for messages to it, one for masks."""

    seal: bytes
    mask: bytes


class Revealed(NamedTuple):
    """A share `(18,)` of one of a client's two secrets: of its self mask's seed, or else of its private mask key."""

    is_self_mask: bool
    share: np.ndarray


@dataclass(frozen=True)
class _Holding:
    """The shares of a client's secrets that another one holds."""

    mask_key: np.ndarray
    self_seed: np.ndarray


class Party:
    """One client, called by its `place` among those that were asked; its secrets come from `rng`.

    What it computes of others is from what it is sent. `agreements` only spares the simulator to compute twice what two
    clients agree on.
    """

    def __init__(self, place: int, rng: Rng, agreements: Agreements) -> None:
        self._place, self._agreements = place, agreements
        self._seal_keys, self._mask_keys = KeyPair(rng.child("seal").key()), KeyPair(rng.child("mask").key())
        self._self_seed, self._polynomials = rng.child("self_mask").key(), rng.child("polynomials").key()
        self._keys: Mapping[int, Advertised] = {}
        self._threshold = 0
        self._own: _Holding | None = None
        self._sealed: Mapping[int, bytes] = {}
        self._revealed: dict[int, bool] = {}

    def advertise(self) -> Advertised:
        """Phase 1: send the public keys."""
        return Advertised(self._seal_keys.public, self._mask_keys.public)

    def share(self, keys: Mapping[int, Advertised], threshold: int) -> dict[int, bytes]:
        """Phase 2: share both secrets among the neighbours whose `keys` came, and itself; return sealed messages.

        Raises ValueError if there are fewer than `threshold` of them: then the sum is not for this client.
        """
        self._keys, self._threshold = keys, threshold
        holders = sorted({*keys, self._place})
        if len(holders) < threshold:
            raise ValueError(f"{len(holders)} clients hold shares of which {threshold} are needed")
        secrets = np.concatenate([shamir.limbs_of(self._mask_keys.private), shamir.limbs_of(self._self_seed)])
        drawn = field_elements(self._polynomials, (threshold - 1) * len(secrets), shamir.PRIME)
        values = shamir.shares(secrets, drawn.reshape(-1, len(secrets)), [place + 1 for place in holders])
        rows = dict(zip(holders, values, strict=True))
        self._own = _holding(rows.pop(self._place))
        return {
            place: seal(self._seal_key(place), row.astype(_WORDS).tobytes(), self._place, place)
            for place, row in rows.items()
        }

    def masked(self, words: Words, sealed: Mapping[int, bytes], ring: Ring) -> Words:
        """Phase 3: return the words under the self mask and a mask for each neighbour that has `sealed` shares."""
        self._sealed = sealed
        total = words + self_mask(self._self_seed, ring)
        for place in sealed:
            agreed = self._agreements.between(self._mask_keys, self._keys[place].mask)
            total += pair_mask(agreed, self._place, place, ring)
        return ring.reduced(total)

    def unmask(self, survivors: Collection[int]) -> dict[int, Revealed]:
        """Phase 4: return a share of each survivor's self mask, and of the private mask key of each who is not one.

        `survivors` are the neighbours, and itself, whose masked input came. Raises ValueError if they are fewer than
        the threshold, and if a share of a client's other secret has been revealed already: with both, its input could
        be read.
        """
        assert self._own is not None
        held = [self._place, *self._sealed]
        alive = [place for place in held if place in survivors]
        if len(alive) < self._threshold:
            raise ValueError(f"{len(alive)} clients' input came, and {self._threshold} are needed")
        for place in held:
            if self._revealed.setdefault(place, place in survivors) != (place in survivors):
                raise ValueError(f"the other secret of client {place} has been asked for already")
        return {place: self._reveal(place, place in survivors) for place in held}

    def _reveal(self, place: int, is_self_mask: bool) -> Revealed:
        held = self._own
        if place != self._place:
            message = unseal(self._seal_key(place), self._sealed[place], place, self._place)
            held = _holding(np.frombuffer(message, dtype=_WORDS).astype(np.int64))
        assert held is not None
        return Revealed(is_self_mask, held.self_seed if is_self_mask else held.mask_key)

    def _seal_key(self, place: int) -> bytes:
        return derived("sealed shares", self._agreements.between(self._seal_keys, self._keys[place].seal))


def pair_mask(agreed: bytes, place: int, other: int, ring: Ring) -> Words:
    """Return the mask that the client in `place` adds for the `other` one: the other one's, negated in the ring."""
    mask = expand(derived("pair mask", agreed), ring.num_words, ring.dtype)
    return mask if place < other else np.negative(mask)


def self_mask(seed: bytes, ring: Ring) -> Words:
    """Return a client's self mask."""
    return expand(derived("self mask", seed), ring.num_words, ring.dtype)


def _holding(row: np.ndarray) -> _Holding:
    return _Holding(row[: shamir.NUM_LIMBS], row[shamir.NUM_LIMBS :])
