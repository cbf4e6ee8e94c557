"""Discrete Gaussian noise that clients share under a secure sum."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LOCAL, adapt, assert_states_close, federation, rounds, train, variant
from scipy.stats import chisquare

from flora.clip.adapters.lora import Lora
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.registry import OptionError
from flora.core.states import ClientUpdate
from flora.federated.summing import sum_format, vector_of
from flora.privacy.accounting import Attendance
from flora.privacy.bounds import bounded
from flora.privacy.discrete import MOST_DEVIATION, _exp_minus, discrete_gaussian
from flora.privacy.distributed import LEAST_DEVIATION, DistributedDiscreteGaussian, noisy_format
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


def private(noise_multiplier: float = 1.0) -> PrivateRounds:
    mechanism = DistributedDiscreteGaussian(clip_norm=0.05, noise_multiplier=noise_multiplier)
    return PrivateRounds.of(mechanism, Attendance(), 3)


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
    fmt = sum_format(parts, options, 5)
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


def test_a_private_run_goes_on_exactly(raw_config: dict[str, Any]) -> None:
    raw = {
        **raw_config,
        "privacy": {"name": "distributed_discrete_gaussian", "clip_norm": 0.1, "noise_multiplier": 2.0},
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
