"""Which images are trained on and which are the common test set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.data.datasets.base import ImageArrays, ImageData, ImageFiles, Split
from flora.data.splits import LeaveDomainOut, Merged, Official, Sample, Validation


def arrays(size: int, start: int, groups: bool = False) -> Split:
    """Images whose every pixel is their number, which is their label modulo 4."""
    numbers = np.arange(start, start + size)
    pixels = np.broadcast_to(numbers[:, None, None], (size, 2, 2)).astype(np.uint8)
    names = numbers.astype(str) if groups else None
    return Split(ImageArrays(pixels, f"from {start}"), np.arange(size), numbers % 4, names)


def numbers(split: Split) -> list[int]:
    """The images' numbers, read from the images themselves."""
    return [int(np.asarray(split.open(index))[0, 0]) for index in range(len(split))]


@pytest.fixture
def data() -> ImageData:
    return ImageData(arrays(40, 0), arrays(20, 40), ("a", "b", "c", "d"))


def test_official_leaves_all_as_it_is(data: ImageData) -> None:
    assert Official().split(data, Rng(0)) is data


def test_merged_deals_all_images_anew(data: ImageData) -> None:
    merged = Merged(test_fraction=0.25).split(data, Rng(0))
    train, test = numbers(merged.train), numbers(merged.test)
    assert (len(train), len(test)) == (45, 15)
    assert sorted(train + test) == list(range(60))
    assert set(test) & set(range(40)) and set(test) & set(range(40, 60))
    for split, found in ((merged.train, train), (merged.test, test)):
        assert split.labels.tolist() == [number % 4 for number in found]
    assert merged.train.source is merged.test.source  # so that features are computed, and kept, once for all seeds
    assert merged.train.name(len(train) - 1).startswith("from 40[")
    assert numbers(Merged(test_fraction=0.25).split(data, Rng(0)).test) == test
    assert numbers(Merged(test_fraction=0.25).split(data, Rng(1)).test) != test


def test_merged_where_the_splits_share_their_images() -> None:
    whole = arrays(30, 0)
    data = ImageData(whole.subset(np.arange(0, 30, 2)), whole.subset(np.arange(1, 30, 2)), ("a", "b", "c", "d"))
    merged = Merged().split(data, Rng(0))
    assert sorted(numbers(merged.train) + numbers(merged.test)) == list(range(30))
    assert merged.train.source is whole.source


def test_merged_keeps_the_names_of_clients() -> None:
    data = ImageData(arrays(8, 0, groups=True), arrays(8, 8, groups=True), ("a", "b", "c", "d"))
    merged = Merged().split(data, Rng(0))
    assert merged.train.groups is not None
    assert merged.train.groups.tolist() == [str(number) for number in numbers(merged.train)]
    assert Merged().split(ImageData(data.train, arrays(8, 8), data.class_names), Rng(0)).train.groups is None


def test_digests_of_merged_images_notice_a_change(data: ImageData, tmp_path: Path) -> None:
    def source(split: ImageData) -> tuple[str, str]:
        every = np.arange(60)
        return split.train.source.fingerprint(every), split.train.source.contents(every)

    other = ImageData(data.train, arrays(20, 41), data.class_names)
    before, same, after = (source(Merged().split(each, Rng(0))) for each in (data, data, other))
    assert before == same
    assert before[0] != after[0] and before[1] != after[1]
    some = Merged().split(data, Rng(0)).train.source
    assert some.contents(np.array([0, 40])) != some.contents(np.array([40, 0]))
    assert len(some) == 60
    path = tmp_path / "x.png"
    Image.new("L", (2, 2)).save(path)
    mixed = Merged().split(
        ImageData(data.train, Split(ImageFiles([path]), np.arange(1), np.zeros(1, np.int64)), data.class_names), Rng(0)
    )
    assert mixed.train.source.name(40) == str(path)


def test_validation_leaves_the_test_images_alone(data: ImageData) -> None:
    split = Validation(fraction=0.2).split(data, Rng(0))
    assert sorted(numbers(split.train) + numbers(split.test)) == list(range(40))
    assert np.bincount(split.test.labels).tolist() == [2, 2, 2, 2]


def test_sample_takes_what_it_is_told_to(data: ImageData) -> None:
    split = Sample(num_train=7, num_test=50).split(data, Rng(0))
    train = numbers(split.train)
    assert (len(set(train)), len(split.test)) == (7, 20)
    assert sorted(np.bincount(split.train.labels, minlength=4).tolist()) == [1, 2, 2, 2]
    assert set(train) < set(range(40))
    assert train == sorted(train)
    split = Sample(num_train=7, num_test=5, of=Validation(fraction=0.5)).split(data, Rng(0))
    assert (len(split.train), len(split.test)) == (7, 5)
    assert set(numbers(split.test)) < set(range(40)) - set(numbers(split.train))


@given(sizes=st.lists(st.integers(1, 60), min_size=2, max_size=8), number=st.integers(1, 200), seed=st.integers(0, 99))
def test_a_sample_holds_each_class_in_proportion(sizes: list[int], number: int, seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    whole = Split(ImageArrays(np.zeros((len(labels), 1, 1), np.uint8), "x"), np.arange(len(labels)), labels)
    sample = Sample(num_train=number).split(ImageData(whole, whole, ()), Rng(seed)).train
    assert len(sample) == min(number, len(labels)) == len(set(sample.source_indices.tolist()))
    expected = np.array(sizes) * len(sample) / len(labels)
    assert np.abs(np.bincount(sample.labels, minlength=len(sizes)) - expected).max() <= len(sizes) / 2 + 1


@given(sizes=st.lists(st.integers(1, 60), min_size=2, max_size=8), shots=st.integers(1, 80), seed=st.integers(0, 99))
def test_a_sample_by_shots_holds_so_many_of_each_class(sizes: list[int], shots: int, seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    whole = Split(ImageArrays(np.zeros((len(labels), 1, 1), np.uint8), "x"), np.arange(len(labels)), labels)
    sample = Sample(shots=shots).split(ImageData(whole, whole, ()), Rng(seed)).train
    assert np.bincount(sample.labels).tolist() == [min(size, shots) for size in sizes]
    assert np.all(np.diff(sample.source_indices) > 0)


def test_a_split_without_images_is_refused() -> None:
    tiny = ImageData(arrays(1, 0), arrays(1, 1), ("a", "b", "c", "d"))
    with pytest.raises(UserError, match=r"split\.test_fraction: of 2 images none would be left to test on"):
        Merged(test_fraction=0.1).split(tiny, Rng(0))
    with pytest.raises(UserError, match=r"split\.fraction: of 1 images none would be left to test on"):
        Validation(fraction=0.1).split(tiny, Rng(0))


def test_leave_domain_out_tests_on_all_images_of_one_domain() -> None:
    train, test = arrays(12, 0), arrays(8, 12)
    domains = [np.array(["photo", "sketch", "art"])[np.arange(size) % 3] for size in (12, 8)]
    data = ImageData(replace(train, groups=domains[0]), replace(test, groups=domains[1]), ("a", "b", "c", "d"))
    left_out = LeaveDomainOut(domain="sketch").split(data, Rng(0))
    assert numbers(left_out.train) == [number for number in range(12) if number % 3 != 1]
    assert numbers(left_out.test) == [1, 4, 7, 10, 13, 16, 19]
    assert set(left_out.test.groups.tolist()) == {"sketch"}
    with pytest.raises(UserError, match=r"split\.domain: unknown domain 'scetch'; did you mean 'sketch'\?"):
        LeaveDomainOut(domain="scetch").split(data, Rng(0))
    with pytest.raises(UserError, match="the data name no domains"):
        LeaveDomainOut(domain="sketch").split(ImageData(train, test, data.class_names), Rng(0))
