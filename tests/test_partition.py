"""Partitioners deal examples to clients: disjoint, complete where promised, repeatable, and never without end."""

from __future__ import annotations

import re
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import EXTREMES, LABELS, check_arrays, class_counts, label_arrays, same, sizes

from flora.core.errors import UserError
from flora.core.registry import OptionError, components
from flora.core.rng import Rng
from flora.data.few_shot import FewShot, FewShotChunks, FewShotOverlapping
from flora.data.partition import (
    Dirichlet,
    Iid,
    LongTailed,
    Natural,
    Partitioner,
    Pathological,
    Quantity,
    Shards,
    log_dirichlet,
)

COMPLETE = [Iid(), Dirichlet(), Dirichlet(cap=1.0), Pathological(), Shards(), Quantity(), LongTailed(order="own")]
DRAWING = [
    *COMPLETE,
    LongTailed(imbalance=4),
    FewShot(shots=3),
    FewShot(shots=3, mode="pathological", classes_per_client=2),
]


def test_registered_names() -> None:
    names = {"iid", "dirichlet", "pathological", "shards", "quantity", "natural"}
    few_shot = {"few_shot", "few_shot_overlapping", "few_shot_chunks"}
    assert names | few_shot <= set(components(Partitioner))


@pytest.mark.parametrize("partitioner", [*DRAWING, FewShotOverlapping(3), FewShotChunks(3)], ids=repr)
def test_the_seed_decides(partitioner: Partitioner) -> None:
    first = partitioner.split(LABELS, 9, Rng(7))
    check_arrays(first, 9, len(LABELS), disjoint=not isinstance(partitioner, FewShotOverlapping))
    assert same(first, partitioner.split(LABELS, 9, Rng(7)))
    assert not same(first, partitioner.split(LABELS, 9, Rng(8)))


@settings(max_examples=60, deadline=None)
@given(st.data(), label_arrays(), st.integers(0, 5))
def test_complete_disjoint_and_no_client_empty(data: st.DataObject, labels: np.ndarray, seed: int) -> None:
    num_clients = data.draw(st.integers(1, len(labels)))
    minimum = data.draw(st.integers(0, len(labels) // num_clients))
    partitioner = data.draw(
        st.one_of(
            st.just(Iid()),
            st.builds(Dirichlet, st.sampled_from(EXTREMES), st.just(minimum), st.sampled_from((None, 1.0, 1.5, 1e308))),
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


@pytest.mark.parametrize("cap", [1.0, 1.3])
@pytest.mark.parametrize("seed", range(5))
def test_a_full_client_gets_nothing_and_the_others_share_in_proportion(seed: int, cap: float) -> None:
    """The rule of `cap`, worked out again for one client and class at a time."""
    labels = np.random.default_rng(seed).permutation(np.repeat([7, 2, 9, 4, 5, 30], 60))
    partitioner = Dirichlet(0.1, minimum_examples=0, cap=cap)
    parts = partitioner.split(labels, 4, Rng(seed))
    check_arrays(parts, 4, len(labels))
    assert sizes(parts).sum() == len(labels)
    held, num_full = [0, 0, 0, 0], 0
    for label in (2, 4, 5, 7, 9, 30):
        log_weights = log_dirichlet(partitioner.concentration, 4, Rng(seed).child("draw", 0, "class", label))
        weights = [np.exp(log_weights[client]) if held[client] < cap * 360 / 4 else 0.0 for client in range(4)]
        for client in range(4):
            count = int((labels[parts[client]] == label).sum())
            assert abs(count - 60 * weights[client] / sum(weights)) < (1 if weights[client] else 1e-9)
            held[client] += count
        num_full += weights.count(0.0)
    assert num_full > 0 or cap > 1


def test_the_cap_by_hand() -> None:
    """Each class goes to one client: that is full with it, and four clients have one of four equal classes each."""
    labels = np.repeat(np.arange(4), 5)
    for seed in range(5):
        parts = Dirichlet(1e-6, minimum_examples=0, cap=1.0).split(labels, 4, Rng(seed))
        assert sorted(part.tolist() for part in parts) == [list(range(start, start + 5)) for start in (0, 5, 10, 15)]
        # With twice the mean, two classes fill a client.
        assert sizes(Dirichlet(1e-6, minimum_examples=0, cap=2.0).split(labels, 4, Rng(seed))).max() <= 10


def test_the_cap_bounds_the_largest_client() -> None:
    labels = np.repeat(np.arange(100), 100)
    free = sizes(Dirichlet(0.05).split(labels, 10, Rng(0)))
    capped = sizes(Dirichlet(0.05, cap=1.0).split(labels, 10, Rng(0)))
    assert capped.max() < 1000 + 100 < 0.8 * free.max()  # the mean and one class
    assert same(Dirichlet(0.05).split(labels, 10, Rng(0)), Dirichlet(0.05, cap=1e9).split(labels, 10, Rng(0)))


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


@pytest.mark.parametrize("shots", [1, 3, 59, 60])
def test_few_shot_overlapping_draws_for_each_client_alone(shots: int) -> None:
    partitioner = FewShotOverlapping(shots)
    parts = partitioner.split(LABELS, 700, Rng(0))  # more clients than examples
    check_arrays(parts, 700, len(LABELS), disjoint=False)
    assert np.all(class_counts(parts, LABELS) == shots)
    assert same(parts[:30], partitioner.split(LABELS, 30, Rng(0)))
    assert same(parts[:29], partitioner.split(LABELS, 29, Rng(0)))


def test_few_shot_overlapping_draws_every_set_equally_often() -> None:
    """Of one class of 5 examples, each of the 10 pairs; the number of clients that share a pair is binomial."""
    parts = FewShotOverlapping(2).split(np.zeros(5, np.int64), 20_000, Rng(0))
    pairs, counts = np.unique(np.stack(parts), axis=0, return_counts=True)
    assert pairs.tolist() == [[a, b] for a in range(5) for b in range(a + 1, 5)]
    assert np.all(np.abs(counts - 2000) < 4 * np.sqrt(20_000 * 0.1 * 0.9))


def test_few_shot_overlapping_clients_differ_and_share_examples() -> None:
    first, second = FewShotOverlapping(40).split(LABELS, 2, Rng(0))
    shared = class_counts([np.intersect1d(first, second)], LABELS)[0]
    assert shared.min() >= 20  # 2 * 40 - 60
    assert shared.max() < 40


@settings(max_examples=60, deadline=None)
@given(label_arrays(), st.integers(1, 20), st.integers(1, 8), st.integers(0, 5))
def test_few_shot_chunks_keeps_its_promises_or_says_what_is_possible(
    labels: np.ndarray, num_clients: int, shots: int, seed: int
) -> None:
    _, class_sizes = np.unique(labels, return_counts=True)
    most_shots, most_clients = int(class_sizes.min()), len(class_sizes)
    if num_clients > most_clients:
        with pytest.raises(UserError, match=rf"^clients\.number: expected 1 to {most_clients} \(the classes\)"):
            FewShotChunks(shots).split(labels, num_clients, Rng(seed))
        num_clients = most_clients
    if shots > most_shots:
        with pytest.raises(UserError, match=rf"^partition\.shots: .* at most {most_shots} shots$"):
            FewShotChunks(shots).split(labels, num_clients, Rng(seed))
        shots = most_shots
    parts = FewShotChunks(shots).split(labels, num_clients, Rng(seed))
    check_arrays(parts, num_clients, len(labels))
    counts = class_counts(parts, labels)
    assert set(np.unique(counts)) <= {0, shots}
    assert np.all((counts > 0).sum(axis=0) == 1)  # every class at exactly one client
    assert np.ptp((counts > 0).sum(axis=1)) <= 1


def test_few_shot_chunks_by_hand() -> None:
    """Five classes of two examples, all of them taken: two clients have two and three classes, whichever they are."""
    labels = np.array([0, 1, 2, 3, 4, 4, 3, 2, 1, 0])
    held = []
    for seed in range(40):
        parts = FewShotChunks(2).split(labels, 2, Rng(seed))
        classes = [sorted(set(labels[part].tolist())) for part in parts]
        assert sorted(map(len, classes)) == [2, 3]
        assert sorted(classes[0] + classes[1]) == [0, 1, 2, 3, 4]
        assert [part.tolist() for part in parts] == [sorted([*own, *(9 - label for label in own)]) for own in classes]
        held += classes
    assert len({tuple(own) for own in held if len(own) == 2}) == 10  # every pair of classes comes up


def test_few_shot_chunks_take_random_examples_of_a_class() -> None:
    labels = np.zeros(6, np.int64)
    taken = {tuple(FewShotChunks(2).split(labels, 1, Rng(seed))[0].tolist()) for seed in range(100)}
    assert len(taken) == 15


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
    (FewShotOverlapping(61), 6, "partition.shots: .* 61 shots of each class: expected at most 60 shots$"),
    (FewShotOverlapping(3), 0, "clients.number: expected at least 1, got 0"),
    (FewShotChunks(61), 6, "partition.shots: .* 61 shots of each class: expected at most 60 shots$"),
    (FewShotChunks(3), 11, r"clients.number: expected 1 to 10 \(the classes\), got 11"),
    (FewShotChunks(3), 0, r"clients.number: expected 1 to 10 \(the classes\), got 0"),
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
        (Dirichlet, {"cap": 0.9}, "cap"),
        (Pathological, {"classes_per_client": 0}, "classes_per_client"),
        (Shards, {"shards_per_client": 0}, "shards_per_client"),
        (FewShot, {"mode": "other"}, "mode"),
        (FewShot, {"mode": "iid", "classes_per_client": 2}, "classes_per_client"),
        (FewShot, {"mode": "pathological"}, "classes_per_client"),
        (FewShotOverlapping, {"shots": 0}, "shots"),
        (FewShotChunks, {"shots": 0}, "shots"),
        (Quantity, {"sigma": -1.0}, "sigma"),
    ],
)
def test_options_are_checked(build: type[Partitioner], options: dict[str, Any], name: str) -> None:
    with pytest.raises(OptionError) as caught:
        build(**options)
    assert caught.value.option == name


@pytest.mark.parametrize(
    "partitioner",
    [
        *(Iid(), Dirichlet(0.1), Dirichlet(0.1, cap=1.0), Pathological(2), Shards(2), Quantity(2.0)),
        *(FewShot(1, "pathological", 2), FewShotOverlapping(16)),
    ],
    ids=repr,
)
def test_a_hundred_thousand_clients_take_seconds(partitioner: Partitioner) -> None:
    labels = np.arange(200_000) % 10
    start = time.perf_counter()
    parts = partitioner.split(labels, 100_000, Rng(0))
    assert time.perf_counter() - start < 20  # a few seconds, with room for a busy machine
    assert len(parts) == 100_000 and sizes(parts).min() >= 1


def test_a_shared_long_tail_has_its_ratio_and_is_dealt_evenly() -> None:
    parts = LongTailed(imbalance=10).split(LABELS, 4, Rng(0))
    counts = class_counts(parts, LABELS)
    of_all = np.sort(counts.sum(axis=0))[::-1]
    assert of_all.tolist() == [round(60 * 10 ** (-place / 9)) for place in range(10)]
    assert np.ptp(counts, axis=0).max() <= 1


def test_without_imbalance_a_long_tail_has_every_example() -> None:
    parts = LongTailed(imbalance=1).split(LABELS, 3, Rng(0))
    assert sizes(parts).sum() == len(LABELS)


def test_a_long_tail_fits_into_classes_of_different_sizes() -> None:
    """The profile is as high as the class with the least room allows."""
    labels = np.repeat([0, 1, 2], [100, 60, 5])
    parts = LongTailed(imbalance=4).split(labels, 2, Rng(3))
    counts = class_counts(parts, labels).sum(axis=0)
    order = np.argsort(-counts, kind="stable")
    assert (counts <= [100, 60, 5]).all()
    assert counts[order[0]] / counts[order[-1]] == pytest.approx(4, rel=0.3)


def test_own_long_tails_differ_between_clients() -> None:
    parts = LongTailed(imbalance=100, order="own").split(LABELS, 5, Rng(0))
    assert sizes(parts).sum() == len(LABELS)
    counts = class_counts(parts, LABELS)
    assert len(set(counts.argmax(axis=1).tolist())) > 1
    assert (counts.max(axis=1) > 3 * np.median(counts, axis=1)).all()
