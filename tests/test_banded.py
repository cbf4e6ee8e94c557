"""Noise that rounds share by a banded matrix: against dense matrices, patterns one by one, and closed forms."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LOCAL, adapt, federation, rounds
from hypothesis import given, settings
from hypothesis import strategies as st

from flora.communication.sampling import InTurn
from flora.config.parse import parse_config
from flora.core import tree
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.federated.federation import Federation
from flora.privacy.accounting import Attendance, spent_epsilon, tree_sensitivity
from flora.privacy.banded import Banded, inverse, sensitivity, square_root
from flora.privacy.bounds import AdaptiveNorm
from flora.privacy.mechanisms import Central, Privacy, Tree
from flora.privacy.rounds import PrivateRounds

BANDS = [1, 2, 5, 12, 99]


def dense(column: np.ndarray) -> np.ndarray:
    """The lower triangular Toeplitz matrix of a first column `(n,)`, `(n, n)`."""
    number = len(column)
    return np.array(
        [[column[row - place] if row >= place else 0.0 for place in range(number)] for row in range(number)]
    )


def test_the_factor_is_a_square_root_of_the_sums_over_rounds() -> None:
    root = dense(square_root(99, 12))
    np.testing.assert_allclose(root @ root, np.tril(np.ones((12, 12))), rtol=0, atol=1e-12)
    assert square_root(99, 4).tolist() == [1.0, 0.5, 0.375, 0.3125]
    assert square_root(2, 4).tolist() == [1.0, 0.5, 0.0, 0.0]
    assert len(square_root(3, 0)) == len(inverse(square_root(3, 0))) == 0


@pytest.mark.parametrize("bands", BANDS)
def test_the_inverse_is_one(bands: int) -> None:
    column = square_root(bands, 12)
    np.testing.assert_allclose(dense(column) @ dense(inverse(column)), np.eye(12), rtol=0, atol=1e-12)


def stream(round: int) -> Rng:
    return Rng(7).child("round", round, "privacy")


def drawn(size: int, round: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64, generator=stream(round).torch())


@pytest.mark.parametrize("bands", BANDS)
def test_the_noise_is_that_of_the_dense_matrices_and_of_the_recursion(bands: int) -> None:
    like, number = {"a": torch.zeros(5), "b": torch.zeros(2, 2)}, 12
    mechanism = Banded(1.0, 1.0, bands=bands)
    noise = torch.stack([tree.flatten(mechanism.on_sum(like, 2.0, round + 1, stream)) for round in range(number)])
    independent = 2.0 * torch.stack([drawn(9, round + 1) for round in range(number)])
    column = square_root(bands, number)
    sums = np.tril(np.ones((number, number))) @ np.linalg.inv(dense(column)) @ independent.numpy()
    np.testing.assert_allclose(noise.cumsum(dim=0).numpy(), sums, rtol=0, atol=1e-9)
    kept: list[torch.Tensor] = []
    for round in range(number):
        before = zip(column[1:bands].tolist(), reversed(kept), strict=False)
        kept.append(independent[round] - sum(weight * vector for weight, vector in before))
    torch.testing.assert_close(noise, torch.stack(kept), rtol=0, atol=1e-9)


def patterns(number: int, most: int, separation: int) -> list[tuple[int, ...]]:
    """All sets of rounds in which a client may take part."""
    return [
        chosen
        for taken in range(1, most + 1)
        for chosen in itertools.combinations(range(number), taken)
        if all(later - earlier >= separation for earlier, later in itertools.pairwise(chosen))
    ]


@settings(deadline=None)
@given(
    number=st.integers(1, 8),
    bands=st.integers(1, 9),
    most=st.integers(1, 8),
    separation=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_no_pattern_of_participation_adds_more(number: int, bands: int, most: int, separation: int, seed: int) -> None:
    matrix = dense(square_root(bands, number))
    norms = [
        float(np.linalg.norm(matrix[:, list(rounds)].sum(axis=1))) for rounds in patterns(number, most, separation)
    ]
    largest = sensitivity(square_root(bands, number), most, separation)
    assert largest == pytest.approx(max(norms), abs=1e-9)  # attained by the same update in each round
    generator = np.random.default_rng(seed)
    for rounds_of_client in patterns(number, most, separation):
        updates = generator.normal(size=(len(rounds_of_client), 3))
        updates /= np.linalg.norm(updates, axis=1, keepdims=True)
        assert np.linalg.norm(matrix[:, list(rounds_of_client)] @ updates) <= largest + 1e-9


def test_bands_that_do_not_overlap_have_a_closed_form() -> None:
    column = square_root(4, 100)
    norm = math.sqrt(1 + 0.5**2 + 0.375**2 + 0.3125**2)
    assert sensitivity(column, 7, 10) == pytest.approx(math.sqrt(7) * norm)
    assert sensitivity(column, 1, 1) == pytest.approx(norm)
    assert sensitivity(square_root(1, 100), 7, 10) == pytest.approx(math.sqrt(7))
    assert sensitivity(column, 0, 1) == sensitivity(square_root(4, 0), 3, 1) == 0


def private(parts: Federation, mechanism: Privacy) -> Federation:
    return dataclasses.replace(parts, privacy=PrivateRounds.of(mechanism, Attendance(), 3))


def test_one_band_is_independent_noise(tiny_model: str) -> None:
    central, banded = (
        rounds(private(federation(adapt(tiny_model), LOCAL), mechanism), 3)
        for mechanism in (Central(0.02, 0.5), Banded(0.02, 0.5, bands=1))
    )
    for one, other in zip(central[0], banded[0], strict=True):
        assert all(torch.equal(tensor, other.adapter[name]) for name, tensor in one.adapter.items())
    assert [each.epsilon for each in central[1]] == pytest.approx([each.epsilon for each in banded[1]], rel=1e-9)
    in_turn = InTurn(number=10).attendance(100)
    assert Banded(1.0, 1.0, bands=1).epsilon(4.0, 25, in_turn) == pytest.approx(spent_epsilon(4.0, 3, None, 1e-5))


def gaussian_delta(epsilon: float, sensitivity: float, deviation: float) -> float:
    """The delta of a Gaussian at an epsilon (arXiv:1805.06530, theorem 8)."""

    def below(value: float) -> float:
        return math.erfc(-value / math.sqrt(2)) / 2

    half, ratio = sensitivity / (2 * deviation), epsilon * deviation / sensitivity
    return below(half - ratio) - math.exp(epsilon) * below(-half - ratio)


@pytest.mark.parametrize("num_rounds", [1, 5, 30])
def test_epsilon_is_that_of_one_gaussian(num_rounds: int) -> None:
    mechanism, in_turn = Banded(1.0, 1.0, bands=8, delta=1e-4), InTurn(number=10).attendance(100)
    epsilon = mechanism.epsilon(6.0, num_rounds, in_turn)
    squares = [c * c for c in (1.0, 0.5, 0.375, 0.3125, 0.2734375, 0.24609375, 0.2255859375, 0.20947265625)]
    norm = math.sqrt(math.ceil(num_rounds / 10) * sum(squares[:num_rounds]))
    assert gaussian_delta(epsilon, norm, 6.0) == pytest.approx(1e-4, rel=1e-6)
    assert mechanism.epsilon(6.0, num_rounds, Attendance()) >= epsilon
    assert mechanism.epsilon(6.0, num_rounds, Attendance(fraction=0.01)) >= epsilon  # nothing is gained by sampling
    assert mechanism.epsilon(6.0, 0, in_turn) == 0


def mean_square(prefix_variances: np.ndarray, largest: float) -> float:
    """The root of the mean square of the noise in the sums over rounds, in clip norms, with noise multiplier 1."""
    return largest * math.sqrt(prefix_variances.mean())


def noise_of_bands(bands: int, number: int, separation: int) -> float:
    """The same for noise of so many bands, where a client takes part every `separation` rounds."""
    column = square_root(bands, number)
    variances = (inverse(column).cumsum() ** 2).cumsum()
    return mean_square(variances, sensitivity(column, number // separation, separation))


@pytest.mark.parametrize(
    ("number", "separation", "published"),
    [
        (40, 10, (9.06, 10.1, 4.43)),
        (100, 10, (22.5, 22.2, 9.61)),
        (256, 16, (45.3, 47.4, 15.4)),
        (100, 100, (7.11, 4.73, 2.37)),
    ],
)
def test_its_sums_have_less_noise_than_a_trees_or_independent_noise(
    number: int, separation: int, published: tuple[float, float, float]
) -> None:
    """At the same epsilon, which is the same noise over sensitivity; the numbers are those of docs/privacy.md."""
    taken = number // separation
    nodes = np.array([float(len(Tree(1.0, 1.0).nodes(round + 1))) for round in range(number)])
    independent = mean_square(np.arange(1.0, number + 1), math.sqrt(taken))
    of_tree = mean_square(nodes, tree_sensitivity(number, None, taken, separation))
    banded = noise_of_bands(separation, number, separation)
    assert (independent, of_tree, banded) == pytest.approx(published, rel=5e-3)
    assert banded < 0.6 * min(of_tree, independent)
    assert noise_of_bands(1, number, separation) == pytest.approx(independent)


def test_as_many_bands_as_a_clients_rounds_are_apart_are_best() -> None:
    assert min([1, 4, 8, 16, 32, 64, 256], key=lambda bands: noise_of_bands(bands, 256, 16)) == 16
    # Of a client that takes part in every round, more than one band makes more noise: a rule refuses that.
    assert noise_of_bands(1, 40, 1) < noise_of_bands(2, 40, 1) < noise_of_bands(40, 40, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": 0}, "bands: expected a number at least 1, got 0"),
        ({"bands": 2, "clip_norm": AdaptiveNorm()}, "clip_norm: expected a number: banded has no noisy count"),
    ],
)
def test_options_that_can_not_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Banded(**{"clip_norm": 1.0, "noise_multiplier": 1.0, **options})


def test_bands_must_be_given(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "privacy": {"name": "banded", "clip_norm": 1.0, "noise_multiplier": 1.0}}
    with pytest.raises(OptionError, match=r"privacy.bands: missing: diagonals of the matrix"):
        parse_config(raw)
