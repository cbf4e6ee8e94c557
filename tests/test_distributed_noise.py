"""Discrete Gaussian noise that clients share under a secure sum."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LOCAL, adapt, assert_states_close, federation, rounds, train, variant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from flora.clip.adapters.lora import Lora
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.states import ClientUpdate
from flora.federated.summing import sum_format, vector_of
from flora.privacy.accounting import Attendance
from flora.privacy.bounds import bounded
from flora.privacy.discrete import MOST_DEVIATION, _exp_minus, discrete_gaussian
from flora.privacy.distributed import (
    ENCODINGS,
    LEAST_DEVIATION,
    DistributedDiscreteGaussian,
    noisy_format,
    rotated_format,
)
from flora.privacy.fixed_point import Terms
from flora.privacy.rotation import Rotation, rotated_size, rounded_at_random, rounded_norm
from flora.privacy.rounds import PrivateRounds
from flora.privacy.secure_sums import PairwiseMasks
from flora.simulate import resume, simulate

WIDE = 1e-4
"""Of ten thousand right programs one would fail: here the seeds are fixed, so that it is the same for ever."""


@pytest.mark.parametrize("variance", [1, 3, 16, 300])
def test_noise_has_the_probabilities_of_a_discrete_gaussian(variance: int) -> None:
    number = 100_000
    drawn = discrete_gaussian(variance, number, np.random.default_rng(variance))
    most = math.ceil(4 * math.sqrt(variance))
    places = np.arange(-40 * most, 40 * most + 1)
    chances = np.exp(-(places**2) / (2 * variance))
    chances /= chances.sum()
    inside = np.abs(places) <= most
    expected = np.append(chances[inside], chances[~inside].sum()) * number
    counts = np.array([(drawn == place).sum() for place in places[inside]] + [(np.abs(drawn) > most).sum()])
    assert chisquare(counts, expected).pvalue > WIDE
    # What the test would say of a variance a tenth larger.
    other = np.exp(-(places**2) / (2.2 * variance))
    other /= other.sum()
    wrong = np.append(other[inside], other[~inside].sum()) * number
    assert chisquare(counts, wrong).pvalue < 1e-12


@pytest.mark.parametrize(("numerator", "denominator"), [(0, 7), (1, 3), (7, 7), (5, 2), (9, 1)])
def test_events_of_a_probability_with_an_exponential(numerator: int, denominator: int) -> None:
    number = 100_000
    happened = _exp_minus(np.full(number, numerator), denominator, np.random.default_rng(numerator)).sum()
    chance = math.exp(-numerator / denominator)
    assert abs(happened - number * chance) <= 5 * math.sqrt(number * chance * (1 - chance)) + 1e-9


def test_no_whole_number_overflows_at_the_largest_deviation() -> None:
    variance = MOST_DEVIATION**2
    scale = math.isqrt(variance) + 1
    assert 2**60 < 2**63 and 2 * variance * scale**2 * 1000 < 2**63
    drawn = discrete_gaussian(variance, 20_000, np.random.default_rng(0)).astype(float)
    assert drawn.std() == pytest.approx(MOST_DEVIATION, rel=0.03) and abs(drawn.mean()) < 5 * MOST_DEVIATION / 141


def test_the_units_of_a_share_by_hand() -> None:
    """Ten clients within 1, noise of 1/2: 127 * 2^24 // 10 units each for 1 + 5, but the noise is below 4096 units."""
    made = noisy_format(32, 1.0, 10, 0.5)
    assert made.numbers.fraction_bits == 12 and made.variance == 2048**2
    # 16 bits: 32767 // 10 = 3276 units for 6, so 2^9 in one, and the noise is 256 of them.
    made = noisy_format(16, 1.0, 10, 0.5)
    assert made.numbers.fraction_bits == 9 and made.variance == 256**2
    with pytest.raises(UserError) as caught:
        noisy_format(11, 1.0, 10, 0.5)
    message = "server.secure_sum.bits: in 11 bits a client's noise is 8 units, expected at least 16"
    assert str(caught.value) == f"{message}: more bits are needed, or more noise"


def test_what_theorem_1_adds_for_sums_is_nothing_with_sixteen_units() -> None:
    """tau = 10 sum over k < n of exp(-2 pi^2 sigma^2 k / (k + 1)), each term at most that of k = 1; its logarithm."""
    most = math.log10(10 * 65_520) - math.pi**2 * LEAST_DEVIATION**2 / math.log(10)
    assert most < -1000


def private(noise_multiplier: float = 1.0, encoding: str = "truncated") -> PrivateRounds:
    mechanism = DistributedDiscreteGaussian(clip_norm=0.05, noise_multiplier=noise_multiplier, encoding=encoding)
    return PrivateRounds.of(mechanism, Attendance(), 3)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_a_rotation_is_a_product_with_signs_and_a_hadamard_matrix(size: int) -> None:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    rotation, vector = Rotation.drawn(size, Rng(1)), np.random.default_rng(size).normal(size=max(size - 3, 1))
    filled = np.append(vector, np.zeros(size - len(vector)))
    rotated = rotation.apply(vector)
    np.testing.assert_allclose(rotated, matrix @ (rotation.signs * filled) / math.sqrt(size), rtol=0, atol=1e-12)
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(vector), rel=1e-12)
    np.testing.assert_allclose(rotation.undo(rotated, len(vector)), vector, rtol=0, atol=1e-12)
    assert set(rotation.signs.tolist()) <= {1.0, -1.0} and rotated_size(len(vector)) <= size


def test_a_rotation_spreads_an_update_over_all_numbers() -> None:
    vector = np.zeros(1024)
    vector[3] = 1.0
    np.testing.assert_allclose(np.abs(Rotation.drawn(1024, Rng(0)).apply(vector)), 1 / 32, rtol=1e-12)
    assert [rotated_size(number) for number in (1, 2, 3, 1280, 16384)] == [1, 2, 4, 2048, 16384]


@given(norm=st.floats(0, 1e4), number=st.integers(1, 300), seed=st.integers(0, 1000), flat=st.booleans())
@settings(max_examples=50, deadline=None)
def test_rounding_at_random_never_passes_the_norm_of_equation_2(
    norm: float, number: int, seed: int, flat: bool
) -> None:
    generator = np.random.default_rng(seed)
    vector = np.ones(number) if flat else generator.normal(size=number)
    vector *= norm / np.linalg.norm(vector)
    largest = rounded_norm(norm, number)
    # min{c + sqrt(d), sqrt(c^2 + d / 4 + sqrt(2 log(1 / beta)) (c + sqrt(d) / 2))}, beta = exp(-1 / 2)
    by_hand = min(norm + number**0.5, (norm**2 + number / 4 + norm + number**0.5 / 2) ** 0.5)
    assert largest == pytest.approx(by_hand, rel=1e-12)
    units = rounded_at_random(vector, largest, generator)
    assert np.linalg.norm(units) <= largest and np.abs(units - vector).max() < 1


def test_rounding_at_random_changes_nothing_in_the_mean_and_draws_again_what_is_too_long() -> None:
    generator, number = np.random.default_rng(0), 4000
    vector = np.array([0.1, -0.3, 2.5, -1.75, 0.0])
    drawn = np.stack([rounded_at_random(vector, math.inf, generator) for _ in range(number)])
    deviation = np.sqrt((vector - np.floor(vector)) * (1 - (vector - np.floor(vector))) / number)
    assert (np.abs(drawn.mean(axis=0) - vector) <= 5 * deviation).all()
    assert any(np.linalg.norm(each) > 3.3 for each in drawn)
    assert all(np.linalg.norm(rounded_at_random(vector, 3.3, generator)) <= 3.3 for _ in range(100))


def test_the_units_of_rotated_numbers_by_hand() -> None:
    """Sixteen bits, ten clients of whom eight stay, 1,024 numbers of norm 1 in all, a noise multiplier of 4."""
    terms = Terms(num_asked=10, num_least=8, num_numbers=1000)
    made = rotated_format(16, 1.0, 4.0, terms)
    units = 2.0**made.numbers.fraction_bits
    assert made.largest == rounded_norm(units, 1024) and made.numbers.bits == 16
    assert math.sqrt(made.variance * 8) >= 4.0 * made.largest > math.sqrt((made.variance - 1) * 8)

    def deviation(units: float) -> float:
        share = 4.0 * rounded_norm(units, 1024) / math.sqrt(8)
        return math.sqrt((10 * units) ** 2 / 1024 + 10 * (0.25 + share**2))

    assert 6 * deviation(units) < 2**15 <= 6 * deviation(2 * units)  # as fine as can be
    with pytest.raises(UserError, match=r"in 9 bits rounding makes updates 2\.\d+ times as long, expected at most 2"):
        rotated_format(9, 1.0, 4.0, terms)
    with pytest.raises(UserError, match=r"bits: in 16 bits a client's noise is .* units, expected at least 16"):
        rotated_format(16, 1.0, 0.001, terms)


@pytest.mark.parametrize("bits", [20, 40])
def test_a_rotated_round_is_algorithm_1_of_the_paper(tiny_model: str, bits: int) -> None:
    """Clip, rotate, scale, round at random under the condition, add noise, sum modulo 2^bits; and back again."""
    options = PairwiseMasks(bits=bits)
    parts = variant(
        federation(adapt(tiny_model, Lora(rank=3)), LOCAL), secure_sum=options, privacy=private(encoding="rotated")
    )
    (start, found), (result,) = rounds(parts, 1)
    number = tree.count(start.adapter)
    fmt = sum_format(parts, options, 5, number)
    size, unit, rng = rotated_size(number), fmt.numbers.unit, parts.rng.child("round", 1)
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= math.sqrt(size)
    signs = 1.0 - 2.0 * rng.child("secure_sum", "rotation").numpy().integers(0, 2, size)
    ends = train(parts, dict.fromkeys(range(5), start.adapter), round=1, rng=rng)
    total = np.zeros(size, dtype=object)
    for client in range(5):
        within, _ = bounded(tree.subtract(ends[client].adapter, start.adapter), 0.05)
        scaled = matrix @ (signs * np.append(vector_of(within), np.zeros(size - number))) / unit
        stream, noise = (rng.child("secure_sum", "noise", client, *more).numpy() for more in (("rounding",), ()))
        while True:
            units = np.floor(scaled) + (stream.random(size) < scaled - np.floor(scaled))
            if np.linalg.norm(units) <= rounded_norm(0.05 / unit, size):
                break
        total += units.astype(int) + discrete_gaussian(fmt.noise_variance, size, noise)
    wrapped = np.array([(int(each) + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) for each in total], dtype=float)
    mean = tree.unflatten(torch.from_numpy((signs * (matrix @ wrapped))[:number] * unit / 5), start.adapter)
    assert_states_close(tree.subtract(found.adapter, start.adapter), mean)
    assert result.epsilon == private().epsilon(1) and result.saturated_fraction == 0
    # A client sends a word for each number of the power of two, and its weight.
    assert result.sum_bytes["input up"] >= 5 * (size + 1) * bits // 8 > 5 * (number + 1) * bits // 8


def test_in_few_bits_truncated_numbers_are_refused_and_rotated_ones_are_not(tiny_model: str) -> None:
    parts = federation(adapt(tiny_model, Lora(rank=2)), LOCAL)
    options, number = PairwiseMasks(bits=16), 16_384
    truncated = variant(parts, secure_sum=options, privacy=private(4.0))
    with pytest.raises(UserError, match=r"in 16 bits the numbers of an update are 0\.\d+ units in the mean") as caught:
        sum_format(truncated, options, 100, number)
    assert str(caught.value).endswith("more bits are needed, or privacy.encoding=rotated")
    rotated = variant(parts, secure_sum=options, privacy=private(4.0, "rotated"))
    made = sum_format(rotated, options, 100, number)
    assert made.largest is not None and made.largest * made.numbers.unit < 0.05 * 1.05  # at most 5 % more noise


def test_epsilon_is_that_of_concentrated_differential_privacy() -> None:
    """rho = T / (2 z^2), of which epsilon is at most rho + 2 sqrt(rho log(1 / delta)) (arXiv:1605.02065)."""
    for noise_multiplier, number in ((1.0, 1), (4.0, 10), (10.0, 200)):
        rho = number / (2 * noise_multiplier**2)
        bound = rho + 2 * math.sqrt(rho * math.log(1e5))
        found = private(noise_multiplier).epsilon(number)
        assert 0.6 * bound < found <= bound
    sampled = PrivateRounds.of(private().mechanism, Attendance(fraction=0.01), 3)
    assert sampled.epsilon(3) == private().epsilon(3)  # nothing is gained by sampling


def test_a_round_is_the_sum_of_what_clients_bound_round_and_noise(tiny_model: str) -> None:
    options = PairwiseMasks(bits=40)
    parts = variant(
        federation(adapt(tiny_model, Lora(rank=2)), LOCAL), secure_sum=options, privacy=private(noise_multiplier=1.0)
    )
    (start, found), (result,) = rounds(parts, 1)
    fmt = sum_format(parts, options, 5, tree.count(start.adapter))
    # Of five at least four must stay, whose shares come to 0.05.
    assert math.sqrt(fmt.noise_variance * 4) * fmt.numbers.unit == pytest.approx(0.05, rel=1e-3)
    assert fmt.noise_variance * 4 * fmt.numbers.unit**2 >= 0.05**2
    rng = parts.rng.child("round", 1)
    ends = train(parts, dict.fromkeys(range(5), start.adapter), round=1, rng=rng)
    total = np.zeros(tree.count(start.adapter))
    for client in range(5):
        within, _ = bounded(tree.subtract(ends[client].adapter, start.adapter), 0.05)
        units = np.trunc(vector_of(within) / fmt.numbers.unit)
        assert np.linalg.norm(units) * fmt.numbers.unit <= 0.05
        noise = discrete_gaussian(fmt.noise_variance, len(units), rng.child("secure_sum", "noise", client).numpy())
        total += (units + noise) * fmt.numbers.unit
    mean = tree.unflatten(torch.from_numpy(total / 5), start.adapter)
    assert_states_close(tree.subtract(found.adapter, start.adapter), mean, atol=2 * fmt.numbers.unit)
    assert fmt.numbers.unit < 1e-5 and result.epsilon == private().epsilon(1)


def test_a_client_whose_update_is_of_no_use_sends_noise_alone(tiny_model: str) -> None:
    """Else the server would see that, and the sum would have less noise."""

    def broken(round: int, update: ClientUpdate) -> ClientUpdate:
        lost = dataclasses.replace(update, delta=tree.scale(update.delta, float("nan")))
        return lost if update.client == 2 else update

    parts = variant(federation(adapt(tiny_model, Lora(rank=2)), LOCAL), secure_sum=PairwiseMasks(), privacy=private())
    _, (whole,) = rounds(parts, 1)
    _, (result,) = rounds(variant(parts, hooks=Hooks(update=broken)), 1)
    assert [each.client for each in result.rejected_clients] == [2]
    assert result.sum_bytes == whole.sum_bytes and result.num_dropped == 0


def test_a_failed_sum_releases_nothing(tiny_model: str) -> None:
    options = PairwiseMasks(dropout=(0, 0, 0, 1))
    parts = variant(federation(adapt(tiny_model, Lora(rank=2)), LOCAL), secure_sum=options, privacy=private())
    (start, found), (result,) = rounds(parts, 1)
    assert result.num_failed_sums == 1 and result.epsilon == private().epsilon(1)
    assert all(torch.equal(start.adapter[name], found.adapter[name]) for name in start.adapter)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_private_run_goes_on_exactly(raw_config: dict[str, Any], encoding: str) -> None:
    raw = {
        **raw_config,
        "privacy": {
            "name": "distributed_discrete_gaussian",
            "clip_norm": 0.1,
            "noise_multiplier": 2.0,
            "encoding": encoding,
        },
        "server": {"secure_sum": {"name": "pairwise_masks", "dropout": [0, 0.05, 0.1, 0.05]}},
    }
    whole = simulate(parse_config({**raw, "name": "whole", "rounds": 3}))
    first = simulate(parse_config({**raw, "name": "parts", "rounds": 1}))
    rest = resume(first.directory, ["rounds=3"])
    assert all(torch.equal(whole.adapter[name], rest.adapter[name]) for name in whole.adapter)
    assert [record.epsilon for record in whole.records] == [record.epsilon for record in rest.records]
    assert whole.summary.epsilon > 0


def test_without_a_secure_sum_it_is_refused(raw_config: dict[str, Any]) -> None:
    privacy = {"name": "distributed_discrete_gaussian", "clip_norm": 0.1, "noise_multiplier": 1.0}
    with pytest.raises(OptionError) as caught:
        check_experiment(parse_config({**raw_config, "privacy": privacy}))
    assert str(caught.value).startswith("privacy: expected server.secure_sum with distributed_discrete_gaussian")
    with pytest.raises(UserError, match="accountant"):
        parse_config({**raw_config, "privacy": {**privacy, "accountant": "pld"}})
