"""Accounting: epsilon against closed forms, published values, and what must be true of it."""

from __future__ import annotations

import importlib.util
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from flora.core.errors import UserError
from flora.privacy.accounting import smallest_multiplier, spent_epsilon, tree_sensitivity


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("multiplier", "rounds"), [(1.0, 1), (0.7, 2), (5.0, 100), (0.2, 3)])
def test_without_sampling_it_is_the_analytic_gaussian(accountant: str, multiplier: float, rounds: int) -> None:
    # arXiv:1805.06530, theorem 8, with sensitivity 1 and the standard deviation of all rounds together.
    delta, sigma = 1e-5, multiplier / math.sqrt(rounds)
    epsilon = spent_epsilon(multiplier, rounds, None, delta, accountant)
    exact = norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * norm.cdf(-0.5 / sigma - epsilon * sigma)
    if accountant == "pld":
        assert exact == pytest.approx(delta, rel=1e-6)
    else:
        assert 0 < exact < delta  # a bound that is not tight


@pytest.mark.parametrize(
    ("multiplier", "rounds", "fraction", "delta", "accountant", "published"),
    [
        # TensorFlow Privacy, privacy/analysis/compute_dp_sgd_privacy_test.py, test_compute_dp_sgd_privacy ...
        (1.3, 15 * 400, 150 / 60000, 1e-5, "rdp", 0.7242234026109595),
        (1.0, 30 * 1000, 100 / 100000, 1e-7, "rdp", 1.4154988495444842),
        # ... and test_compute_dp_sgd_example_privacy, for 1.2 epochs.
        (0.7, 2, None, 1e-5, "rdp", 10.8602036),
        (0.7, 2, None, 1e-5, "pld", 10.1224946),
        (0.7, 120, 0.01, 1e-5, "rdp", 3.2392676),
        (0.7, 120, 0.01, 1e-5, "pld", 2.4612381),
    ],
)
def test_published_values(
    multiplier: float, rounds: int, fraction: float | None, delta: float, accountant: str, published: float
) -> None:
    relative = 1e-4 if fraction is not None and accountant == "pld" else 1e-6
    assert spent_epsilon(multiplier, rounds, fraction, delta, accountant) == pytest.approx(published, rel=relative)


@pytest.mark.parametrize(
    ("multiplier", "epochs", "published"),
    [(1.3, 15, 1.18), (1.1, 60, 3.01), (0.7, 45, 7.10)],  # Opacus, examples/mnist_README.md: sampling rate 0.004
)
def test_what_older_conversions_published_bounds_ours(multiplier: float, epochs: int, published: float) -> None:
    # Its numbers are of the conversion rdp - log(delta) / (alpha - 1), which newer ones tighten by a tenth or two.
    ours = spent_epsilon(multiplier, epochs * 240, 0.004, 1e-5, "rdp")
    assert 0.75 * published < ours < published


def test_fewer_rounds_smaller_fractions_and_more_noise_spend_less() -> None:
    epsilon = spent_epsilon(1.0, 20, 0.1, 1e-5)
    assert 0 < spent_epsilon(1.0, 10, 0.1, 1e-5) < epsilon
    assert 0 < spent_epsilon(1.0, 20, 0.05, 1e-5) < epsilon
    assert 0 < spent_epsilon(1.5, 20, 0.1, 1e-5) < epsilon
    assert 0 < spent_epsilon(1.0, 20, 0.1, 1e-4) < epsilon < spent_epsilon(1.0, 20, None, 1e-5)
    assert spent_epsilon(1.0, 20, 1.0, 1e-5) == spent_epsilon(1.0, 20, None, 1e-5)


def test_no_round_spends_nothing_and_no_noise_everything() -> None:
    assert spent_epsilon(1.0, 0, 0.1, 1e-5) == 0
    assert spent_epsilon(0.0, 1, 0.1, 1e-5) == math.inf


@settings(max_examples=12, deadline=None, derandomize=True)
@given(multiplier=st.floats(0.4, 8), rounds=st.integers(1, 300), fraction=st.one_of(st.none(), st.floats(0.002, 0.5)))
def test_renyi_never_spends_less_than_the_loss_distribution(
    multiplier: float, rounds: int, fraction: float | None
) -> None:
    exact, renyi = (spent_epsilon(multiplier, rounds, fraction, 1e-5, each) for each in ("pld", "rdp"))
    assert renyi >= exact * (1 - 1e-3)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("target", "fraction"), [(0.5, 0.1), (8.0, 0.1), (2.0, None), (300.0, None)])
def test_the_multiplier_for_a_target_is_the_smallest_that_does(
    accountant: str, target: float, fraction: float | None
) -> None:
    found = smallest_multiplier(lambda multiplier: spent_epsilon(multiplier, 20, fraction, 1e-5, accountant), target)
    assert spent_epsilon(found, 20, fraction, 1e-5, accountant) <= target
    assert spent_epsilon(found / 1.0011, 20, fraction, 1e-5, accountant) > target


def test_a_target_out_of_reach_is_one_line() -> None:
    with pytest.raises(UserError, match="privacy: no noise multiplier below 1,000,000 gives epsilon 0"):
        smallest_multiplier(lambda multiplier: spent_epsilon(multiplier, 20, None, 1e-300, "rdp"), 0.0)


def nodes_squared(rounds: int, restart: int, taken: list[int]) -> int:
    """The squared norm over all complete nodes of what a client adds that takes part in the rounds `taken`."""
    total, size = 0, 1
    while size <= restart:
        for tree in range(0, rounds, restart):
            leaves = min(restart, rounds - tree)
            for start in range(tree, tree + leaves - size + 1, size):
                total += sum(start <= round < start + size for round in taken) ** 2
        size *= 2
    return total


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), rounds=st.integers(1, 24), separation=st.integers(1, 6))
def test_no_client_adds_more_to_a_tree_than_its_sensitivity(data: st.DataObject, rounds: int, separation: int) -> None:
    restart = data.draw(st.integers(1, rounds))
    taken: list[int] = []
    for round in range(rounds):
        if (not taken or round - taken[-1] >= separation) and data.draw(st.booleans()):
            taken.append(round)
    bound = tree_sensitivity(rounds, restart, len(taken), separation) ** 2
    assert nodes_squared(rounds, restart, taken) <= bound + 1e-9


def test_the_sensitivity_of_a_tree_is_reached() -> None:
    assert tree_sensitivity(8, None, 1, 1) ** 2 == pytest.approx(4)  # a leaf, and its three ancestors
    assert tree_sensitivity(8, None, 8, 1) ** 2 == pytest.approx(nodes_squared(8, 8, list(range(8))))
    assert tree_sensitivity(16, 4, 4, 4) ** 2 == pytest.approx(nodes_squared(16, 4, [0, 4, 8, 12]))
    assert tree_sensitivity(0, None, 1, 1) == 0


def test_a_tree_spends_no_more_than_was_published() -> None:
    # dp-accounting, rdp_privacy_accountant_test.py, test_compute_eps_tree: StackOverflow of arXiv:2103.00039.
    for multiplier, published in ((1.13, 19.74), (8.83, 2.04)):
        reached = spent_epsilon(multiplier / tree_sensitivity(1600, None, 1, 1), 1, None, 1e-6, "rdp")
        assert 0.7 * published < reached < published


def test_a_missing_library_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"dp-accounting is not installed; pip install 'flora-clip\[privacy\]'"):
        spent_epsilon(1.25, 7, None, 1e-5)
