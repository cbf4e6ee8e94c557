"""How far apart classes are: hand-worked cases, and what does not change them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora.evaluation.accuracy import balanced_accuracy, worst_class_accuracy
from flora.evaluation.collapse import effective_rank, mean_cosine


def test_classes_that_mean_the_same_have_rank_0_and_cosine_1() -> None:
    same = np.tile([[0.6, 0.8, 0.0]], (4, 1))
    assert effective_rank(same) == 0.0
    assert mean_cosine(same) == pytest.approx(1.0)


def test_two_classes_differ_along_one_direction() -> None:
    two = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert effective_rank(two) == pytest.approx(1.0)
    assert mean_cosine(two) == pytest.approx(0.0, abs=1e-12)


def test_orthogonal_classes_differ_along_all_directions_but_one() -> None:
    """About their mean C orthogonal unit vectors have C - 1 equal singular values."""
    assert effective_rank(np.eye(5)) == pytest.approx(4.0)


def test_a_rank_by_hand() -> None:
    """Four points on a rectangle: singular values 2 a and 2 b, here 1.6 and 1.2, before which all have length 1."""
    corners = np.array([[x, y] for x in (0.8, -0.8) for y in (0.6, -0.6)])
    p = 1.6 / 2.8
    expected = np.exp(-p * np.log(p) - (1 - p) * np.log(1 - p))
    assert effective_rank(corners) == pytest.approx(expected)
    assert mean_cosine(corners) == pytest.approx((2 * 0.28 + 2 * -0.28 + 2 * -1) / 6)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), number=st.integers(2, 6), width=st.integers(1, 6))
def test_lengths_order_and_turning_change_nothing(seed: int, number: int, width: int) -> None:
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(number, width))
    turn, _ = np.linalg.qr(generator.normal(size=(width, width)))
    other = (features * generator.uniform(0.5, 2, (number, 1)))[generator.permutation(number)] @ turn
    rank, cosine = effective_rank(features), mean_cosine(features)
    assert rank is not None and cosine is not None
    assert effective_rank(other) == pytest.approx(rank, abs=1e-6)
    assert mean_cosine(other) == pytest.approx(cosine, abs=1e-9)
    assert rank <= min(number - 1, width) + 1e-9
    assert -1 / (number - 1) - 1e-9 <= cosine <= 1 + 1e-9


def test_numbers_that_are_not_finite_have_no_rank() -> None:
    assert effective_rank(np.array([[1.0, np.nan], [0.0, 1.0]])) is None
    assert mean_cosine(np.array([[1.0, np.inf], [0.0, 1.0]])) is None


def test_balanced_accuracy_is_a_mean_over_the_classes_that_have_examples() -> None:
    by_class = {"cat": 1.0, "dog": 0.5, "eel": None}
    assert balanced_accuracy(by_class) == 0.75 and worst_class_accuracy(by_class) == 0.5
