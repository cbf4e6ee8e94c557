"""Partitioners deal examples to clients: disjoint, complete where promised, repeatable, and never without end."""

from __future__ import annotations

import re
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora.data.partition import (
    Dirichlet,
    FewShot,
    Iid,
    Natural,
    Partitioner,
    Pathological,
    Quantity,
    Shards,
)
from flora.errors import UserError
from flora.registry import OptionError, components
from flora.rng import Rng

# Ten classes of 60 examples, with gaps in the labels and in no order.
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10) * 3, 60))
EXTREMES = (1e-320, 1e-6, 1e-3, 0.1, 1.0, 100.0, 1e6, 1e308)
COMPLETE = [Iid(), Dirichlet(), Pathological(), Shards(), Quantity()]
DRAWING = [*COMPLETE, FewShot(shots=3), FewShot(shots=3, mode="pathological", classes_per_client=2)]


def label_arrays(max_classes: int = 8) -> st.SearchStrategy[np.ndarray]:
    """Up to 80 labels, of classes that may be missing or rare."""
    return st.lists(st.integers(0, max_classes - 1), min_size=1, max_size=80).map(np.array)


def check_arrays(parts: list[np.ndarray], num_clients: int, num_examples: int) -> None:
    """What every partitioner promises: sorted int64 indices, no example at two clients."""
    assert len(parts) == num_clients
    for part in parts:
        assert part.dtype == np.int64 and part.ndim == 1
        assert np.all(np.diff(part) > 0)
    dealt = np.concatenate(parts)
    assert len(np.unique(dealt)) == len(dealt)
    assert np.all((dealt >= 0) & (dealt < num_examples))


def class_counts(parts: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """How many examples of each class each client has, `(clients, classes)`."""
    _, index = np.unique(labels, return_inverse=True)
    return np.array([np.bincount(index[part], minlength=index.max() + 1) for part in parts])


def sizes(parts: list[np.ndarray]) -> np.ndarray:
    return np.array([len(part) for part in parts])


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def test_registered_names() -> None:
    names = {"iid", "dirichlet", "pathological", "shards", "few_shot", "quantity", "natural"}
    assert names <= set(components(Partitioner))


@pytest.mark.parametrize("partitioner", DRAWING, ids=repr)
def test_the_seed_decides(partitioner: Partitioner) -> None:
    first = partitioner.split(LABELS, 12, Rng(7))
    check_arrays(first, 12, len(LABELS))
    assert same(first, partitioner.split(LABELS, 12, Rng(7)))
    assert not same(first, partitioner.split(LABELS, 12, Rng(8)))


@settings(max_examples=60, deadline=None)
@given(st.data(), label_arrays(), st.integers(0, 5))
def test_complete_disjoint_and_no_client_empty(data: st.DataObject, labels: np.ndarray, seed: int) -> None:
    num_clients = data.draw(st.integers(1, len(labels)))
    minimum = data.draw(st.integers(0, len(labels) // num_clients))
    partitioner = data.draw(
        st.one_of(
            st.just(Iid()),
            st.builds(Dirichlet, st.sampled_from(EXTREMES), st.just(minimum)),
            st.builds(Quantity, st.sampled_from((0.0, 1.0, 10.0, 1e308)), st.just(minimum)),
            st.builds(Shards, st.integers(1, len(labels) // num_clients)),
        )
    )
    parts = partitioner.split(labels, num_clients, Rng(seed))
    check_arrays(parts, num_clients, len(labels))
    assert sizes(parts).sum() == len(labels)
    assert sizes(parts).min() >= getattr(partitioner, "minimum_examples", 1)


@settings(max_examples=80, deadline=None)
@given(label_arrays(), st.integers(1, 30), st.integers(1, 8), st.integers(0, 5))
def test_pathological_keeps_its_promises_or_says_what_is_possible(
    labels: np.ndarray, num_clients: int, classes_per_client: int, seed: int
) -> None:
    partitioner = Pathological(classes_per_client)
    try:
        parts = partitioner.split(labels, num_clients, Rng(seed))
    except UserError as error:
        match = re.search(r"(\d+) clients are possible", str(error))
        if match is None:
            assert re.match(r"(partition.classes_per_client|clients.number): .*expected ", str(error))
            return
        num_clients = int(match[1])
        parts = partitioner.split(labels, num_clients, Rng(seed))
    check_arrays(parts, num_clients, len(labels))
    held = (class_counts(parts, labels) > 0).sum(axis=1)
    assert sizes(parts).sum() == len(labels)
    assert held.min() >= 1 and held.max() <= classes_per_client


@settings(max_examples=80, deadline=None)
@given(label_arrays(4), st.integers(1, 8), st.integers(1, 12), st.sampled_from((None, 1, 2, 3)), st.integers(0, 5))
def test_few_shot_gives_the_shots_or_says_what_is_possible(
    labels: np.ndarray, num_clients: int, shots: int, classes_per_client: int | None, seed: int
) -> None:
    def split(num_clients: int, shots: int) -> np.ndarray:
        mode = "iid" if classes_per_client is None else "pathological"
        parts = FewShot(shots, mode, classes_per_client).split(labels, num_clients, Rng(seed))
        check_arrays(parts, num_clients, len(labels))
        return class_counts(parts, labels)

    try:
        counts = split(num_clients, shots)
    except UserError as error:
        if not str(error).startswith("partition.shots: "):
            assert re.match(r"(partition.classes_per_client|clients.number): expected ", str(error))
            return
        possible = str(error).partition("expected at most ")[2]
        if match := re.search(r"(\d+) shots", possible):
            split(num_clients, int(match[1]))
            with pytest.raises(UserError, match="shots"):
                split(num_clients, int(match[1]) + 1)
        if match := re.search(r"(\d+) clients", possible):
            split(int(match[1]), 1 if possible.endswith("with 1 shot") else shots)
        return
    assert set(np.unique(counts)) <= {0, shots}
    assert np.all((counts > 0).sum(axis=1) == (classes_per_client or counts.shape[1]))


@pytest.mark.parametrize("num_clients", [1, 7, 13, 600])
def test_iid_sizes_differ_by_at_most_one(num_clients: int) -> None:
    assert np.ptp(sizes(Iid().split(LABELS, num_clients, Rng(0)))) <= 1


def test_dirichlet_proportions() -> None:
    """Over many clients a share has the Dirichlet's mean 1/K and variance (1/K)(1 - 1/K) / (K c + 1)."""
    labels = np.repeat(np.arange(200), 1000)
    shares = class_counts(Dirichlet(0.5).split(labels, 10, Rng(0)), labels) / 1000
    np.testing.assert_allclose(shares.mean(axis=1), 0.1, atol=0.03)
    np.testing.assert_allclose(shares.var(), 0.1 * 0.9 / 6, rtol=0.1)


@pytest.mark.parametrize("concentration", [1e-320, 1e-6, 1e-3])
def test_a_tiny_concentration_gives_each_class_to_one_client(concentration: float) -> None:
    counts = class_counts(Dirichlet(concentration, minimum_examples=0).split(LABELS, 5, Rng(0)), LABELS)
    assert np.all((counts > 0).sum(axis=0) == 1)


@pytest.mark.parametrize("concentration", [1e6, 1e308])
def test_a_huge_concentration_makes_clients_alike(concentration: float) -> None:
    counts = class_counts(Dirichlet(concentration).split(LABELS, 7, Rng(0)), LABELS)
    assert counts.min() >= 8 and counts.max() <= 9


def test_the_minimum_is_taken_from_the_largest_clients_only() -> None:
    labels = np.zeros(100, np.int64)
    free = sizes(Dirichlet(0.01, minimum_examples=0).split(labels, 5, Rng(0)))
    assert sorted(free) == [0, 0, 0, 0, 100]
    assert sorted(sizes(Dirichlet(0.01, minimum_examples=7).split(labels, 5, Rng(0)))) == [7, 7, 7, 7, 72]


@pytest.mark.parametrize("classes_per_client", [1, 2, 3, 7, 10])
def test_pathological_shares_classes_evenly(classes_per_client: int) -> None:
    held = class_counts(Pathological(classes_per_client).split(LABELS, 23, Rng(0)), LABELS) > 0
    assert np.all(held.sum(axis=1) == classes_per_client)
    assert np.ptp(held.sum(axis=0)) <= 1


def test_one_more_client_changes_nobody_elses_classes() -> None:
    for partitioner in (Pathological(3), FewShot(2, "pathological", 3)):
        fewer = class_counts(partitioner.split(LABELS, 20, Rng(0)), LABELS) > 0
        more = class_counts(partitioner.split(LABELS, 21, Rng(0)), LABELS) > 0
        np.testing.assert_array_equal(fewer, more[:20])


def test_one_more_client_changes_nobody_elses_few_shots() -> None:
    fewer = FewShot(shots=2).split(LABELS, 20, Rng(0))
    assert same(fewer, FewShot(shots=2).split(LABELS, 21, Rng(0))[:20])


def test_one_more_class_leaves_the_others_alone() -> None:
    more_labels = np.concatenate([LABELS, np.full(60, 99)])
    few = Dirichlet(1.0, minimum_examples=0).split(LABELS, 5, Rng(0))
    more = Dirichlet(1.0, minimum_examples=0).split(more_labels, 5, Rng(0))
    assert same(few, [part[part < len(LABELS)] for part in more])


def test_a_rare_class_goes_to_holders_that_have_nothing() -> None:
    labels = np.repeat(np.arange(10), 20)
    counts = class_counts(Pathological(3).split(labels, 100, Rng(0)), labels)
    assert counts.sum(axis=1).min() >= 1 and counts.sum() == 200


def test_a_client_with_rare_classes_only_is_refused() -> None:
    labels = np.array([0] * 10 + [1])
    with pytest.raises(UserError, match=r"^clients\.number: 1 of 4 clients would get no example: 2 clients are"):
        Pathological(1).split(labels, 4, Rng(0))


def test_shards_hold_at_most_two_classes_each() -> None:
    counts = class_counts(Shards(2).split(LABELS, 9, Rng(0)), LABELS)
    assert (counts > 0).sum(axis=1).max() <= 4
    aligned = class_counts(Shards(2).split(LABELS, 10, Rng(0)), LABELS)
    assert set(np.unique(aligned)) <= {0, 30, 60} and np.all(aligned.sum(axis=1) == 60)


def test_quantity_skews_sizes_and_keeps_labels_mixed() -> None:
    labels = np.arange(100_000) % 10
    parts = Quantity(1.0).split(labels, 100, Rng(0))
    assert np.log(sizes(parts)).std() == pytest.approx(1.0, rel=0.2)
    np.testing.assert_allclose(class_counts(parts, labels)[sizes(parts).argmax()] / sizes(parts).max(), 0.1, atol=0.02)
    assert np.ptp(sizes(Quantity(0.0).split(labels, 7, Rng(0)))) <= 1


def test_natural_follows_the_sorted_groups() -> None:
    groups = np.array(["b", "a", "c", "a", "b"])
    parts = Natural().split(np.zeros(5, np.int64), 3, Rng(0), groups=groups)
    check_arrays(parts, 3, 5)
    assert [part.tolist() for part in parts] == [[1, 3], [0, 4], [2]]


IMPOSSIBLE = [
    *((partitioner, 601, "clients.number: expected 1 to 600 ") for partitioner in DRAWING),
    *((partitioner, 0, "clients.number: expected 1 to 600 ") for partitioner in DRAWING),
    (Dirichlet(1e-6, 7), 100, "partition.minimum_examples: .* at most 6, got 7"),
    (Dirichlet(1e6, 7), 100, "partition.minimum_examples: .* at most 6, got 7"),
    (Quantity(1.0, 601), 1, "partition.minimum_examples: .* at most 600, got 601"),
    (Pathological(2), 4, "partition.classes_per_client: .* at least 3 classes, or 5 clients"),
    (Pathological(11), 4, "partition.classes_per_client: expected at most 10 .*, got 11"),
    (Shards(7), 100, "partition.shards_per_client: .* at most 6, got 7"),
    (FewShot(16), 6, "partition.shots: .* at most 10 shots or 3 clients"),
    (FewShot(61), 6, "partition.shots: .* at most 10 shots$"),
    (FewShot(61), 61, "partition.shots: .* at most 60 clients with 1 shot"),
    (FewShot(16, "pathological", 2), 20, "partition.shots: .* at most 15 shots or 15 clients"),
    (FewShot(1, "pathological", 11), 2, "partition.classes_per_client: expected at most 10 .*, got 11"),
    (Natural(), 3, "partition: the data name no clients"),
]


@pytest.mark.parametrize(("partitioner", "num_clients", "message"), IMPOSSIBLE, ids=repr)
def test_impossible_requests_name_the_setting(partitioner: Partitioner, num_clients: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        partitioner.split(LABELS, num_clients, Rng(0))
    assert "\n" not in str(caught.value)


def test_natural_says_how_many_clients_the_data_name() -> None:
    with pytest.raises(UserError, match=r"^clients\.number: the data name 2 clients, got 3"):
        Natural().split(np.zeros(3, np.int64), 3, Rng(0), groups=np.array(["a", "b", "a"]))


@pytest.mark.parametrize(
    ("build", "options", "name"),
    [
        (Dirichlet, {"concentration": 0.0}, "concentration"),
        (Dirichlet, {"minimum_examples": -1}, "minimum_examples"),
        (Pathological, {"classes_per_client": 0}, "classes_per_client"),
        (Shards, {"shards_per_client": 0}, "shards_per_client"),
        (FewShot, {"mode": "other"}, "mode"),
        (FewShot, {"mode": "iid", "classes_per_client": 2}, "classes_per_client"),
        (FewShot, {"mode": "pathological"}, "classes_per_client"),
        (Quantity, {"sigma": -1.0}, "sigma"),
    ],
)
def test_options_are_checked(build: type[Partitioner], options: dict[str, Any], name: str) -> None:
    with pytest.raises(OptionError) as caught:
        build(**options)
    assert caught.value.option == name


@pytest.mark.parametrize(
    "partitioner",
    [Iid(), Dirichlet(0.1), Pathological(2), Shards(2), FewShot(1, "pathological", 2), Quantity(2.0)],
    ids=repr,
)
def test_a_hundred_thousand_clients_take_seconds(partitioner: Partitioner) -> None:
    labels = np.arange(200_000) % 10
    start = time.perf_counter()
    parts = partitioner.split(labels, 100_000, Rng(0))
    assert time.perf_counter() - start < 20  # a few seconds, with room for a busy machine
    assert len(parts) == 100_000 and sizes(parts).min() >= 1
