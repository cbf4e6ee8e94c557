"""Secure sums: fixed-point words, keys, masks, shares, and four phases in which clients may drop out."""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, ks_2samp, kstest

from flora.core.errors import UserError
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.privacy import parties, shamir
from flora.privacy.fixed_point import FixedPoint, Ring, Words
from flora.privacy.masks import Agreements, KeyPair, expand, field_elements, seal, unseal
from flora.privacy.parties import Party, Revealed, pair_mask, self_mask
from flora.privacy.phases import neighbours_of
from flora.privacy.secure_sums import PairwiseMasks
from flora.privacy.traffic import PHASES, Attendance, SumOutcome, Traffic

WIDE = 1e-4
"""Of ten thousand right programs one would fail: here the seeds are fixed, so that it is the same for ever."""


# --- Shamir's shares


def test_shares_over_a_small_field_by_hand() -> None:
    """3 + 5 x modulo 11 is 8, 2 and 7 at 1, 2 and 3."""
    values = shamir.shares(np.array([3]), np.array([[5]]), [1, 2, 3], prime=11)
    assert values.tolist() == [[8], [2], [7]]
    for chosen in itertools.combinations(range(3), 2):
        points = [place + 1 for place in chosen]
        assert shamir.reconstruct(values[list(chosen)], points, prime=11).tolist() == [3]


def test_fewer_shares_than_the_threshold_say_nothing() -> None:
    """Over a field of 7 with threshold 3: two shares fit every secret, by one polynomial each."""
    seen: dict[tuple[int, int], list[int]] = {}
    for secret, *coefficients in itertools.product(range(7), repeat=3):
        one, two = shamir.shares(np.array([secret]), np.array(coefficients)[:, None], [2, 5], prime=7)[:, 0].tolist()
        seen.setdefault((one, two), []).append(secret)
    assert len(seen) == 49 and all(sorted(secrets) == list(range(7)) for secrets in seen.values())


@given(
    secret=st.binary(min_size=32, max_size=32),
    threshold=st.integers(1, 40),
    more=st.integers(0, 20),
    seed=st.binary(min_size=32, max_size=32),
    order=st.randoms(),
)
@settings(max_examples=40, deadline=None)
def test_any_threshold_of_shares_give_the_secret(
    secret: bytes, threshold: int, more: int, seed: bytes, order: Any
) -> None:
    drawn = field_elements(seed, (threshold - 1) * shamir.NUM_LIMBS, shamir.PRIME)
    points = order.sample(range(1, 500), threshold + more)
    values = shamir.shares(shamir.limbs_of(secret), drawn.reshape(threshold - 1, shamir.NUM_LIMBS), points)
    assert values.min() >= 0 and values.max() < shamir.PRIME
    chosen = order.sample(range(len(points)), threshold)
    rebuilt = shamir.reconstruct(values[chosen], [points[place] for place in chosen])
    assert shamir.secret_of(rebuilt) == secret


def test_shares_that_do_not_belong_together_are_noticed() -> None:
    with pytest.raises(ValueError, match="don't belong together"):
        shamir.secret_of(np.full(shamir.NUM_LIMBS, shamir.PRIME - 1))


def test_products_of_the_field_are_exact() -> None:
    """The largest sum, of as many shares as there are points, stays below 2^53."""
    assert (shamir.PRIME - 1) ** 2 * shamir.MOST_SHARES < 2**53


# --- fixed point


def test_fixed_point_by_hand() -> None:
    """8 bits, four clients: 127 // 4 = 31 units each, so a unit is 1/16, and 0.3 is 4.8 of them."""
    codec = FixedPoint.for_sum(8, 1.0, 4)
    assert (codec.fraction_bits, codec.unit) == (4, 0.0625)
    words = codec.encode(np.array([0.3, -0.3, 1.0, -1.0, 5.0, -5.0, 0.09375]))
    assert words.tolist() == [5, 251, 16, 240, 16, 240, 2]
    assert words.dtype == np.uint16
    assert codec.decode(words).tolist() == [5 / 16, -5 / 16, 1, -1, 1, -1, 0.125]


@given(bits=st.integers(8, 64), limit=st.floats(1e-9, 1e9), count=st.integers(1, 127), fraction=st.floats(-1, 1))
@settings(deadline=None)
def test_no_sum_overflows_and_no_number_is_off_by_more_than_half_a_unit(
    bits: int, limit: float, count: int, fraction: float
) -> None:
    codec, ring = FixedPoint.for_sum(bits, limit, count), Ring(bits, 3)
    numbers = np.array([limit, -limit, fraction * limit])
    words = codec.encode(numbers)
    assert (np.abs(codec.decode(words) - numbers) <= codec.unit / 2).all()
    total = np.zeros(3, ring.dtype)
    for _ in range(count):
        total = ring.reduced(total + words)
    units = [round(math.ldexp(number, codec.fraction_bits)) * count for number in numbers.tolist()]
    half = 2 ** (bits - 1)
    assert all(-half < each < half for each in units)
    assert [int(word) for word in total] == [each % 2**bits for each in units]
    # Twice as fine, and the sum of the largest would not fit.
    assert math.ldexp(limit, codec.fraction_bits + 1) > (half - 1) // count


def test_a_ring_that_is_too_small_is_refused_in_one_line() -> None:
    assert FixedPoint.for_sum(8, 1.0, 127).fraction_bits == 0
    with pytest.raises(UserError) as caught:
        FixedPoint.for_sum(8, 1.0, 128)
    assert str(caught.value) == "server.secure_sum.bits: 8 bits can't hold the sum of 128 clients"


@given(bits=st.integers(8, 64), words=st.lists(st.integers(0, 2**64 - 1), max_size=20))
@settings(deadline=None)
def test_words_are_packed_to_the_bit(bits: int, words: list[int]) -> None:
    ring = Ring(bits, len(words))
    reduced = ring.reduced(np.array(words, dtype=np.uint64))
    assert reduced.tolist() == [word % 2**bits for word in words]
    packed = ring.pack(reduced)
    assert len(packed) == ring.payload_bytes == math.ceil(bits * len(words) / 8)
    assert int.from_bytes(packed, "little") == sum(word % 2**bits << bits * place for place, word in enumerate(words))
    assert (ring.unpack(packed) == reduced).all()


# --- keys and masks


def test_keys_are_those_of_rfc_7748() -> None:
    """Section 6.1."""
    alice, bob = (
        KeyPair(bytes.fromhex(private))
        for private in (
            "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
            "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
        )
    )
    assert alice.public.hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert bob.public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    raw = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    agreed = hashlib.sha256(b"flora agreement:" + raw).digest()
    assert alice.agreed(bob.public) == bob.agreed(alice.public) == agreed


def test_masks_are_chacha20() -> None:
    """RFC 7539, appendix A.1, test vector 1: a key and a nonce of zeros."""
    assert expand(bytes(32), 8, np.dtype("u1")).tobytes().hex() == "76b8e0ada0f13d90"
    assert expand(bytes(32), 2, np.dtype("<u4")).tolist() == [0xADE0B876, 0x903DF1A0]


def test_field_elements_are_uniform_below_the_prime() -> None:
    drawn = field_elements(bytes(31) + b"1", 200_000, shamir.PRIME)
    assert drawn.max() < shamir.PRIME and len(drawn) == 200_000
    assert kstest(drawn / shamir.PRIME, "uniform").pvalue > WIDE
    assert field_elements(bytes(32), 50, 11).max() < 11  # most words are left out
    assert (field_elements(bytes(32), 5, 11) == field_elements(bytes(32), 50, 11)[:5]).all()


def test_a_sealed_message_is_for_one_client_alone() -> None:
    sealed = seal(bytes(32), b"share", 1, 2)
    assert len(sealed) == 5 + 16 and b"share" not in sealed
    assert unseal(bytes(32), sealed, 1, 2) == b"share"
    for key, message, sender, receiver in (
        (b"1" * 32, sealed, 1, 2),
        (bytes(32), sealed[:-1] + b"?", 1, 2),
        (bytes(32), sealed, 2, 1),
        (bytes(32), sealed, 1, 3),
    ):
        with pytest.raises(InvalidTag):
            unseal(key, message, sender, receiver)


def test_what_two_clients_agree_on_is_computed_once_and_is_the_same() -> None:
    known, one, two = Agreements(), KeyPair(b"1" * 32), KeyPair(b"2" * 32)
    assert known.between(one, two.public) == known.between(two, one.public) == two.agreed(one.public)
    assert len(known) == 1


def three_parties(ring: Ring, words: list[Words], seed: int = 0) -> tuple[list[Party], list[Words]]:
    """Three clients after the third phase, with threshold 2, and what each has sent."""
    every = [Party(place, Rng(seed).child(place), Agreements()) for place in range(3)]
    keys = {place: party.advertise() for place, party in enumerate(every)}
    sealed = {
        place: party.share({other: keys[other] for other in keys if other != place}, 2)
        for place, party in enumerate(every)
    }
    masked = [
        party.masked(words[place], {other: sealed[other][place] for other in keys if other != place}, ring)
        for place, party in enumerate(every)
    ]
    return every, masked


def test_masks_cancel_in_the_sum_but_for_the_self_masks() -> None:
    ring = Ring(20, 7)
    words = [ring.reduced(np.arange(7) * 1000 + place) for place in range(3)]
    every, masked = three_parties(ring, words)
    assert all(len(set(each.tolist()) & set(own.tolist())) == 0 for each, own in zip(masked, words, strict=True))
    own = [self_mask(Rng(0).child(place).child("self_mask").key(), ring) for place in range(3)]
    assert (ring.reduced(sum(masked) - sum(own)) == ring.reduced(sum(words))).all()  # type: ignore[operator]
    agreed = b"a" * 32
    assert not ring.reduced(pair_mask(agreed, 0, 1, ring) + pair_mask(agreed, 1, 0, ring)).any()
    assert len(every) == 3


def test_a_party_never_reveals_both_secrets_of_a_client() -> None:
    ring = Ring(32, 1)
    every, _ = three_parties(ring, [np.zeros(1, np.uint32)] * 3)
    revealed = every[0].unmask({0, 1})
    assert {place: share.is_self_mask for place, share in revealed.items()} == {0: True, 1: True, 2: False}
    assert every[0].unmask({0, 1}).keys() == revealed.keys()  # the same question again gives nothing new
    for other in ({0, 2}, {0, 1, 2}):
        with pytest.raises(ValueError, match="the other secret of client"):
            every[0].unmask(other)


def test_a_party_refuses_a_sum_of_too_few() -> None:
    every, _ = three_parties(Ring(32, 1), [np.zeros(1, np.uint32)] * 3)
    with pytest.raises(ValueError, match="1 clients' input came, and 2 are needed"):
        every[0].unmask({0})
    with pytest.raises(ValueError, match="1 clients hold shares of which 2 are needed"):
        Party(0, Rng(0), Agreements()).share({}, 2)


# --- what a lone masked update looks like

LONG = Ring(32, 20_000)


def is_uniform(words: Words) -> float:
    """The smallest p-value of three tests of whether words are uniform in Z_{2^32}: bytes, size, neighbours."""
    raw = words.view(np.uint8).reshape(-1, 4)
    by_byte = [chisquare(np.bincount(raw[:, place], minlength=256)).pvalue for place in range(4)]
    pairs = np.bincount((raw[:-1, 0] >> 4).astype(int) * 16 + (raw[1:, 0] >> 4), minlength=256)
    return float(min(*by_byte, chisquare(pairs).pvalue, kstest(words / 2**32, "uniform").pvalue))


def inputs(seed: int, scale: float) -> list[Words]:
    codec = FixedPoint.for_sum(32, 1.0, 3)
    return [codec.encode(np.random.default_rng([seed, place]).normal(0, scale, LONG.num_words)) for place in range(3)]


def test_a_lone_masked_update_can_not_be_told_from_uniform_words() -> None:
    words = inputs(0, 0.1)
    every, masked = three_parties(LONG, words)
    for place in range(3):
        assert is_uniform(words[place]) < 1e-12  # the tests see something
        assert is_uniform(masked[place]) > WIDE
    # A client's input that comes late: the server may have its mask key, and its self mask still covers it.
    keys = [party.advertise() for party in every]
    late = masked[2]
    for other in (0, 1):
        agreed = KeyPair(Rng(0).child(2).child("mask").key()).agreed(keys[other].mask)
        late = LONG.reduced(late - pair_mask(agreed, 2, other, LONG))
    assert is_uniform(late) > WIDE and (late != words[2]).any()
    # What the server takes away of two clients' sum leaves nothing of either.
    assert is_uniform(LONG.reduced(masked[0] + masked[1])) > WIDE


def test_other_inputs_give_masked_words_of_the_same_distribution() -> None:
    _, one = three_parties(LONG, inputs(1, 0.3), seed=1)
    _, other = three_parties(LONG, [np.zeros(LONG.num_words, np.uint32)] * 3, seed=2)
    for place in range(3):
        assert ks_2samp(one[place], other[place]).pvalue > WIDE
    # Under the same masks they differ by the inputs, and under other masks they have nothing in common.
    _, again = three_parties(LONG, inputs(1, 0.3), seed=2)
    assert (LONG.reduced(again[0] - other[0]) == inputs(1, 0.3)[0]).all()
    assert (one[0] == again[0]).mean() < 1e-3


# --- four phases


def added(options: PairwiseMasks, ring: Ring, words: dict[int, Words], num_phases: dict[int, int]) -> SumOutcome:
    return options.add_up(
        {client: words[client] for client, number in num_phases.items() if number >= 3 and client in words},
        Attendance(num_phases),
        ring,
        Rng(5),
    )


@given(
    stays=st.lists(st.integers(0, 4) | st.just(4), min_size=2, max_size=7),
    bits=st.sampled_from([8, 16, 27, 32, 64]),
    neighbours=st.sampled_from([None, 2, 4]),
    threshold=st.sampled_from([0.51, 0.66, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_whoever_drops_out_where_the_sum_is_that_of_the_survivors_or_there_is_none(
    stays: list[int], bits: int, neighbours: int | None, threshold: float
) -> None:
    options, ring = PairwiseMasks(bits=bits, neighbours=neighbours, threshold=threshold), Ring(bits, 5)
    num_phases = {10 * place + 3: number for place, number in enumerate(stays)}
    drawn = np.random.default_rng(bits)
    words = {client: ring.reduced(drawn.integers(0, 2**63, 5, dtype=np.uint64)) for client in num_phases}
    found = added(options, ring, words, num_phases)
    needed = max(2, math.ceil(round(threshold * len(stays), 9)))
    left = [sum(number > phase for number in stays) for phase in range(4)]
    survivors = [client for client, number in num_phases.items() if number >= 3]
    if min(left) < needed:
        assert found.words is None and found.failure is not None and found.summed == ()
        short = next(phase for phase in range(4) if left[phase] < needed)
        assert found.num_phases <= short + 1
        if neighbours is None:
            name = ("keys", "shares", "masked input", "unmasking")[short]
            assert found.failure == f"{name}: {left[short]} of {len(stays)} clients left, {needed} needed"
    elif neighbours is None or found.words is not None:
        assert found.words is not None and found.failure is None and found.num_phases == 4
        assert found.summed == tuple(survivors)
        assert (found.words == ring.reduced(sum(words[client] for client in survivors))).all()  # type: ignore[arg-type]
    else:
        assert found.failure is not None and found.summed == () and min(stays) < 4


def test_of_no_client_both_secrets_are_revealed(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[int, set[bool]] = {}
    real = Party.unmask

    def noted(party: Party, survivors: Any) -> dict[int, Revealed]:
        revealed = real(party, survivors)
        for owner, share in revealed.items():
            kinds.setdefault(owner, set()).add(share.is_self_mask)
        return revealed

    monkeypatch.setattr(parties.Party, "unmask", noted)
    ring, num_phases = Ring(32, 4), {0: 4, 1: 2, 2: 4, 3: 3, 4: 4, 5: 4, 6: 0, 7: 1}
    words = {client: ring.reduced(np.full(4, client)) for client in num_phases}
    found = added(PairwiseMasks(threshold=0.51), ring, words, num_phases)
    assert found.words is None and "4 of 8 clients left, 5 needed" in str(found.failure)
    kinds.clear()
    found = added(PairwiseMasks(threshold=0.51), ring, words, {**num_phases, 7: 4})
    assert found.words is not None and found.words.tolist() == [0 + 2 + 3 + 4 + 5 + 7] * 4
    # Client 1 has shared its secrets and sent no input; the others' inputs came, 3's too, which is gone since.
    assert kinds == {0: {True}, 1: {False}, 2: {True}, 3: {True}, 4: {True}, 5: {True}, 7: {True}}


def test_the_same_seed_gives_the_same_messages_and_another_one_others() -> None:
    ring = Ring(32, 4)
    _, one = three_parties(ring, [np.zeros(4, np.uint32)] * 3)
    _, same = three_parties(ring, [np.zeros(4, np.uint32)] * 3)
    _, other = three_parties(ring, [np.zeros(4, np.uint32)] * 3, seed=1)
    assert all((a == b).all() and (a != c).any() for a, b, c in zip(one, same, other, strict=True))


def test_bytes_by_hand() -> None:
    """Three clients, ten words of 32 bits, all stay.

    Keys: 64 up; those of two others, 68 each with a name of 4, down. Shares: for each of two others 4 + 72 + 16, up and
    down. Input: 40 up, the names of two survivors down. Unmasking: for each of three clients 4 + 1 + 36 up.
    """
    ring = Ring(32, 10)
    words = {client: np.full(10, client, np.uint32) for client in range(3)}
    found = added(PairwiseMasks(), ring, words, dict.fromkeys(range(3), 4))
    up = {"keys": 3 * 64, "shares": 3 * 2 * 92, "input": 3 * 40, "unmasking": 3 * 3 * 41}
    down = {"keys": 3 * 2 * 68, "shares": 3 * 2 * 92, "input": 3 * 2 * 4, "unmasking": 0}
    assert found.traffic == Traffic(up, down, num_messages=3 * 7)
    assert found.num_agreements == 2 * 3  # of two kinds of keys, between three pairs
    each = PairwiseMasks().client_traffic(3, ring.payload_bytes)
    assert {phase: 3 * each.uplink_bytes[phase] for phase in PHASES} == up
    assert {phase: 3 * each.downlink_bytes[phase] for phase in PHASES} == down


def test_bytes_of_clients_that_drop_out_and_of_one_that_is_late() -> None:
    """Six clients: one never comes, one is gone before its shares, one before its input, one is too late with it."""
    ring, num_phases = Ring(16, 10), {0: 0, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 4, 8: 4}
    words = {client: np.full(10, 1, np.uint16) for client in num_phases}
    attendance = Attendance(num_phases, late=frozenset([3]))
    found = PairwiseMasks(threshold=0.51).add_up(
        {client: words[client] for client in range(4, 9)}, attendance, ring, Rng(0)
    )
    assert found.words is not None and found.words.tolist() == [5] * 10
    assert found.traffic.uplink_bytes == {
        "keys": 8 * 64,
        "shares": 7 * 7 * 92,  # for the seven others whose keys came
        "input": 6 * 20,
        "unmasking": 5 * 7 * 41,  # of the seven that have shared
    }
    assert found.traffic.downlink_bytes == {
        "keys": 8 * 7 * 68,
        "shares": 7 * 6 * 92,
        "input": 5 * 4 * 4,
        "unmasking": 0,
    }


# --- neighbours


@given(number=st.integers(3, 30), neighbours=st.sampled_from([2, 4, 6]), seed=st.integers(0, 5))
@settings(deadline=None)
def test_neighbours_are_a_circle(number: int, neighbours: int, seed: int) -> None:
    places = [3 * each for each in range(number)]
    graph = neighbours_of(places, neighbours, Rng(seed))
    assert sorted(graph) == places
    for place, others in graph.items():
        assert len(set(others)) == len(others) == min(neighbours, number - 1) and place not in others
        assert all(place in graph[other] for other in others)


def test_survivors_without_a_mask_in_common_have_no_sum() -> None:
    """Six clients in a circle of neighbours: when two opposite ones are gone, two pairs are left."""
    ring, options = Ring(32, 2), PairwiseMasks(neighbours=2, threshold=0.6)
    graph = neighbours_of(range(6), 2, Rng(5).child("graph"))
    circle, before = [0], -1
    while len(circle) < 6:
        here = circle[-1]
        circle.append(next(other for other in graph[here] if other != before and other not in circle))
        before = here
    words = {client: np.full(2, 2**client, np.uint32) for client in range(6)}
    stays = dict.fromkeys(range(6), 4)
    found = added(options, ring, words, {**stays, circle[0]: 2, circle[3]: 2})
    assert found.words is None
    assert found.failure == "masked input: the clients left fall into groups without a mask in common"
    found = added(options, ring, words, {**stays, circle[0]: 2})
    assert found.words is not None and found.words.tolist() == [63 - 2 ** circle[0]] * 2


def test_a_client_whose_neighbours_are_gone_has_no_secret_to_rebuild() -> None:
    ring, options = Ring(32, 2), PairwiseMasks(neighbours=2, threshold=0.7)
    words = {client: np.full(2, 1, np.uint32) for client in range(8)}
    graph = neighbours_of(range(8), 2, Rng(5).child("graph"))
    gone = dict.fromkeys(graph[0], 2)
    found = added(options, ring, words, {**dict.fromkeys(range(8), 4), **gone})
    assert found.failure == "masked input: 1 clients left that hold shares of one, 3 needed"
    gone = dict.fromkeys(graph[0], 3)  # after their input has come
    found = added(options, ring, words, {**dict.fromkeys(range(8), 4), **gone})
    assert found.failure == "unmasking: 1 shares of a client's secret came, 3 needed" and found.words is None


# --- options and attendance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": 3}, "neighbours: expected an even number, got 3"),
        ({"dropout": (0.1,)}, "dropout: expected 4 probabilities, one a phase, got 1"),
        ({"threshold": 0.5}, "threshold: expected a number above 0.5 and at most 1, got 0.5"),
        ({"bits": 65}, "bits: expected a number at least 8 and at most 64, got 65"),
        ({"range": 0.0}, "range: expected a number above 0, got 0.0"),
    ],
)
def test_options_that_can_not_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        PairwiseMasks(**options)
    assert str(caught.value) == message


def test_more_clients_than_the_field_has_points_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        added(PairwiseMasks(neighbours=2), Ring(32, 1), {}, dict.fromkeys(range(65_521), 4))
    assert str(caught.value) == "server.secure_sum: expected at most 65,520 clients in a round, got 65,521"


def test_thresholds_by_hand() -> None:
    assert [PairwiseMasks(threshold=0.66).smallest_sum(number) for number in (1, 2, 3, 5, 100)] == [2, 2, 2, 4, 66]
    few = PairwiseMasks(threshold=0.66, neighbours=10)
    assert [few.share_threshold(number) for number in (2, 5, 11, 1000)] == [2, 4, 8, 8]


def test_who_is_gone_before_which_phase() -> None:
    asked = list(range(2000))
    options = PairwiseMasks(dropout=(0.1, 0.0, 0.2, 0.5))
    found = options.attendance(asked, dropped=[], late=[], silent=[], rng=Rng(0))
    counts = np.bincount(list(found.num_phases.values()), minlength=5) / 2000
    assert counts.tolist() == pytest.approx([0.1, 0.0, 0.9 * 0.2, 0.9 * 0.8 * 0.5, 0.9 * 0.8 * 0.5], abs=0.04)
    assert not found.late
    plain = PairwiseMasks().attendance(
        asked, dropped=asked[:600], late=asked[600:700], silent=asked[700:800], rng=Rng(0)
    )
    numbers = np.array([plain.num_phases[client] for client in asked])
    assert np.bincount(numbers[:600], minlength=5).tolist() == pytest.approx([200, 200, 200, 0, 0], abs=60)
    assert set(numbers[600:800]) == {2} and set(numbers[800:]) == {4}
    assert plain.late == frozenset(range(600, 700))
