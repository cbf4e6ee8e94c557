"""Shares of counts are exact, wherever a count is made of a share."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flora.communication.compressors import TopK
from flora.communication.sampling import Uniform
from flora.core.counts import counted, part_of
from flora.core.rng import Rng
from flora.data.datasets.base import stratified_split
from flora.experiment.clients import hold_out
from flora.server.aggregators import MultiKrum, TrimmedMean


@given(percent=st.integers(0, 100), number=st.integers(0, 10**9))
def test_a_percentage_of_a_count_is_exact(percent: int, number: int) -> None:
    assert part_of(percent / 100, number) == Fraction(percent * number, 100)


def test_what_a_product_of_floating_point_numbers_misses() -> None:
    assert math.floor(0.29 * 100) == 28 and math.floor(part_of(0.29, 100)) == 29
    assert math.ceil(50 * 1.1) == 56 and math.ceil(part_of(1.1, 50)) == 55
    assert round(0.7 * 45) == 31 and round(part_of(0.7, 45)) == 32  # 31.5, to the even number
    assert part_of(1e-7, 10**7) == 1 and part_of(np.float64(0.2), 5) == 1


def test_aggregators_leave_out_what_the_fraction_says() -> None:
    """29 of 100 at either end, or 29 that may be bad."""
    numbers = [*range(-1029, -1000), *range(29, 71), *range(1071, 1100)]
    deltas = [{"a": torch.tensor([float(number)])} for number in numbers]
    assert TrimmedMean(fraction=0.29).combine(deltas, [1.0] * 100)["a"].item() == 49.5
    bad = [{"a": torch.tensor([1e6 * 2**place])} for place in range(29)]
    near = [{"a": torch.tensor([float(place)])} for place in range(71)]
    assert MultiKrum(fraction=0.29).combine([*near, *bad], [1.0] * 100)["a"].item() == 35.0


@pytest.mark.parametrize("number", [45, 85, 165, 325])
def test_splits_cohorts_and_masks_round_exact_shares(number: int) -> None:
    share, expected = 0.7, round(Fraction(7 * number, 10))
    assert expected != round(share * number)
    assert len(hold_out(np.arange(number), share, Rng(0)).held_out) == expected
    assert len(stratified_split(np.zeros(number, int), share, Rng(0))[1]) == expected
    assert Uniform(fraction=share).cohort_size(number) == expected
    state = {"a": torch.arange(1.0, number + 1)}
    sent = TopK(fraction=share)
    assert int((sent.decode(sent.encode(state, Rng(0)), state)["a"] != 0).sum()) == expected


def test_a_noun_has_an_s_but_where_there_is_one() -> None:
    assert [counted(number, "client") for number in (0, 1, 2, 2000)] == [
        "0 clients", "1 client", "2 clients", "2,000 clients",
    ]  # fmt: skip
