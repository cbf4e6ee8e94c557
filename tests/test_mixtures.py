"""Partitioners with given sizes, mixtures of each client's own, and groups that are dealt out by themselves."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import EXTREMES, LABELS, check_arrays, class_counts, label_arrays, same, sizes

from flora.core.errors import UserError
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.data.mixtures import ExtendedDirichlet, GivenSizes, InnerDirichlet, WithinGroups
from flora.data.partition import Dirichlet, Iid, Natural


@settings(max_examples=60, deadline=None)
@given(st.data(), label_arrays(), st.integers(0, 5))
def test_given_sizes_are_met_and_others_left_out(data: st.DataObject, labels: np.ndarray, seed: int) -> None:
    num_clients = data.draw(st.integers(1, len(labels)))
    given_sizes = data.draw(st.lists(st.integers(1, 80), min_size=num_clients, max_size=num_clients).map(tuple))
    for partitioner in (GivenSizes(given_sizes), InnerDirichlet(data.draw(st.sampled_from(EXTREMES)), given_sizes)):
        try:
            parts = partitioner.split(labels, num_clients, Rng(seed))
        except UserError as error:
            assert sum(given_sizes) > len(labels)
            assert re.match(rf"partition.sizes: expected at most {len(labels)} together", str(error))
        else:
            check_arrays(parts, num_clients, len(labels))
            assert sizes(parts).tolist() == list(given_sizes)


def test_sizes_are_one_for_each_client() -> None:
    for partitioner in (GivenSizes((3, 4)), InnerDirichlet(sizes=(3, 4))):
        with pytest.raises(UserError, match=r"partition\.sizes: expected 3 numbers, one for each client, got 2"):
            partitioner.split(LABELS, 3, Rng(0))


@settings(max_examples=60, deadline=None)
@given(st.data(), label_arrays(), st.integers(0, 5))
def test_inner_dirichlet_deals_all_in_equal_sizes(data: st.DataObject, labels: np.ndarray, seed: int) -> None:
    num_clients = data.draw(st.integers(1, len(labels)))
    parts = InnerDirichlet(data.draw(st.sampled_from(EXTREMES))).split(labels, num_clients, Rng(seed))
    check_arrays(parts, num_clients, len(labels))
    assert sizes(parts).sum() == len(labels)
    assert np.ptp(sizes(parts)) <= 1


def test_inner_dirichlet_goes_from_one_class_to_all_alike() -> None:
    """With a tiny concentration a client wants one class; with a huge one its places are a fair sample."""
    skewed = class_counts(InnerDirichlet(1e-6).split(LABELS, 5, Rng(0)), LABELS)
    assert ((skewed > 0).sum(axis=1) <= 5).all()  # 120 places, and 60 examples of a class, for which others compete
    even = class_counts(InnerDirichlet(1e6, sizes=(100,) * 5).split(LABELS, 5, Rng(0)), LABELS)
    assert np.abs(even - 10).max() <= 12  # binomial, standard deviation 3
    first, again, other = (InnerDirichlet().split(LABELS, 7, Rng(seed)) for seed in (1, 1, 2))
    assert same(first, again) and not same(first, other)


@settings(max_examples=80, deadline=None)
@given(label_arrays(), st.integers(1, 20), st.integers(1, 8), st.sampled_from(EXTREMES), st.integers(0, 5))
def test_extended_dirichlet_stays_within_the_classes_of_a_client(
    labels: np.ndarray, num_clients: int, classes_per_client: int, concentration: float, seed: int
) -> None:
    try:
        parts = ExtendedDirichlet(classes_per_client, concentration).split(labels, num_clients, Rng(seed))
    except UserError as error:
        assert re.match(r"(partition.classes_per_client|clients.number): .*expected ", str(error))
        return
    check_arrays(parts, num_clients, len(labels))
    assert sizes(parts).sum() == len(labels) and sizes(parts).min() >= 1
    assert (class_counts(parts, labels) > 0).sum(axis=1).max() <= classes_per_client


def test_extended_dirichlet_with_a_large_concentration_shares_alike() -> None:
    counts = class_counts(ExtendedDirichlet(5, 1e9).split(LABELS, 4, Rng(3)), LABELS)
    assert ((counts == 0) | (counts == 30)).all()  # 20 cards for 10 classes: two clients each, half of 60


def test_within_groups_deals_each_domain_to_clients_of_its_own() -> None:
    groups = np.where(np.arange(len(LABELS)) % 3 == 0, "sketch", "photo")
    partitioner = WithinGroups(of=Dirichlet(0.5), clients_per_group=3)
    names = partitioner.client_names(groups, None)
    assert names == ("photo 1", "photo 2", "photo 3", "sketch 1", "sketch 2", "sketch 3")
    parts = partitioner.split(LABELS, 6, Rng(0), groups=groups)
    check_arrays(parts, 6, len(LABELS))
    assert sizes(parts).sum() == len(LABELS)
    for name, part in zip(names, parts, strict=True):
        assert set(groups[part].tolist()) == {name.split()[0]}
    photos = np.flatnonzero(groups == "photo")
    alone = Dirichlet(0.5).split(LABELS[photos], 3, Rng(0).child("group", "photo"))
    assert same(parts[:3], [photos[part] for part in alone])


def test_within_groups_says_what_is_wrong() -> None:
    with pytest.raises(OptionError, match=r"of: expected a partitioner that takes no clients from the data"):
        WithinGroups(of=Natural())
    with pytest.raises(UserError, match="the data name no clients, which within_groups needs"):
        WithinGroups(of=Iid()).split(LABELS, 4, Rng(0))
    groups = np.array(["a", "b"])[np.arange(len(LABELS)) % 2]
    with pytest.raises(UserError, match=r"clients\.number: the data name 4 clients, got 5"):
        WithinGroups(of=Iid()).split(LABELS, 5, Rng(0), groups=groups)
    with pytest.raises(UserError, match=r"partition\.of: group 'a': clients\.number: expected 1 to 300"):
        WithinGroups(of=Iid(), clients_per_group=301).split(LABELS, 602, Rng(0), groups=groups)
