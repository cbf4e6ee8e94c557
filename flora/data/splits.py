"""Which images are trained on and which are the common test set."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from PIL import Image

from flora.core.counts import part_of
from flora.core.errors import UserError
from flora.core.registry import Component, OptionError, option, register, suggest
from flora.core.rng import Rng
from flora.data.datasets.base import ImageData, ImageSource, Split, stratified_split


@dataclass(frozen=True)
class Splitter(Component):
    """Which images are trained on and which are the common test set."""

    sets_classes_aside: ClassVar[bool] = False
    """Whether there are classes that nobody trains on, to be tested on by themselves."""

    @abstractmethod
    def split(self, data: ImageData, rng: Rng) -> ImageData:
        """Return the images, or some of them, in the splits to use. Raises `UserError` if one would be empty."""


@register("official")
@dataclass(frozen=True)
class Official(Splitter):
    """The data set's own splits; where it has none, a seeded stratified share to test on (`data.test_fraction`)."""

    def split(self, data: ImageData, rng: Rng) -> ImageData:
        return data


@register("merged")
@dataclass(frozen=True)
class Merged(Splitter):
    """All images together, a random share of them to test on, whatever their class (as FLoRA's code, arXiv:2404.15182).

    Figures are not comparable with those on official test images, some of which are now trained on.
    """

    test_fraction: float = option("share of all images to test on", 0.2, above=0, below=1)

    def split(self, data: ImageData, rng: Rng) -> ImageData:
        whole = _together(data.train, data.test)
        order = rng.numpy().permutation(len(whole))
        num_test = round(part_of(self.test_fraction, len(whole)))
        _require("split.test_fraction", len(whole) - num_test, num_test)
        test, train = np.sort(order[:num_test]), np.sort(order[num_test:])
        return ImageData(whole.subset(train), whole.subset(test), data.class_names)


@register("validation")
@dataclass(frozen=True)
class Validation(Splitter):
    """A stratified share of the training images to test on; the test images stay unread. For choosing settings.

    Where the split is drawn at random (no official one, or `merged`), another seed has other test images.
    """

    fraction: float = option("share of the training images to test on", 0.2, above=0, below=1)
    of: Splitter = option("whose training images", Official())

    def check(self) -> None:
        _check_inner(self.of)

    def split(self, data: ImageData, rng: Rng) -> ImageData:
        data = self.of.split(data, rng.child("of"))
        train, test = stratified_split(data.train.labels, self.fraction, rng)
        _require("split.fraction", len(train), len(test))
        return ImageData(data.train.subset(train), data.train.subset(test), data.class_names)


@register("sample")
@dataclass(frozen=True)
class Sample(Splitter):
    """A stratified sample of what another splitter gives, for a quick look; fewer images than that are taken whole."""

    num_train: int = option("images to train on", 10_000, at_least=1)
    num_test: int = option("images to test on", 2_000, at_least=1)
    shots: int | None = option("images of each class to train on, in place of `num_train`", None, at_least=1)
    of: Splitter = option("what the sample is drawn from", Official())

    def check(self) -> None:
        _check_inner(self.of)

    def split(self, data: ImageData, rng: Rng) -> ImageData:
        data = self.of.split(data, rng.child("of"))
        if self.shots is None:
            train = _some(data.train, self.num_train, rng.child("train"))
        else:
            train = _of_each(data.train, self.shots, rng.child("train"))
        return ImageData(train, _some(data.test, self.num_test, rng.child("test")), data.class_names)


@register("base_to_new")
@dataclass(frozen=True)
class BaseToNew(Splitter):
    """The first half of the classes is trained and tested on; the others are new, tested on by themselves.

    Of an odd number the first half has one more. A run reports both and their harmonic mean (arXiv:2203.05557,
    section 4.1). Each half is told apart among its own classes.
    """

    sets_classes_aside = True
    of: Splitter = option("what images there are", Official())

    def check(self) -> None:
        _check_inner(self.of)

    def split(self, data: ImageData, rng: Rng) -> ImageData:
        data = self.of.split(data, rng.child("of"))
        number = len(data.class_names)
        if number < 4:
            raise UserError(f"split: base_to_new needs at least four classes, the data have {number}")
        num_base = (number + 1) // 2
        train, test = (part.subset(part.labels < num_base) for part in (data.train, data.test))
        new = data.test.subset(data.test.labels >= num_base)
        _require("split", len(train), len(test))
        if not len(new):
            raise UserError("split: no test image is of a new class")
        new = replace(new, labels=new.labels - num_base)
        return ImageData(train, test, data.class_names[:num_base], new, data.class_names[num_base:])


@register("leave_domain_out")
@dataclass(frozen=True)
class LeaveDomainOut(Splitter):
    """All images of one domain are tested on, those of the others are trained on (leave one domain out).

    The domains are the groups that the data name. What the data set has to test on of the other domains is not read
    (arXiv:2007.01434, section 3, tests on all images of the domain, too).
    """

    domain: str = option("the domain that nobody trains on")

    def split(self, data: ImageData, rng: Rng) -> ImageData:
        if data.train.groups is None or data.test.groups is None:
            raise UserError("split: the data name no domains, which leave_domain_out needs, such as data.groups=folder")
        names = np.unique(np.concatenate([data.train.groups, data.test.groups])).tolist()
        if self.domain not in names:
            raise UserError(f"split.domain: unknown domain {self.domain!r}; {suggest(self.domain, names)}")
        its_train, its_test = data.train.groups == self.domain, data.test.groups == self.domain
        test = _together(data.train.subset(its_train), data.test.subset(its_test))
        train = data.train.subset(~its_train)
        _require("split.domain", len(train), len(test))
        return replace(data, train=train, test=test)


def _check_inner(of: Splitter) -> None:
    if of.sets_classes_aside:
        raise OptionError("of", "base_to_new takes other splits inside, and is not to be inside of one")


def _some(split: Split, number: int, rng: Rng) -> Split:
    """`number` of the examples, each class in proportion; all if there are no more."""
    order = rng.numpy().permutation(len(split))
    depth = np.empty(len(split))
    for label in np.unique(split.labels):
        members = order[split.labels[order] == label]
        # How deep into its class an example lies, from 0 to 1: a sample takes all classes to the same depth.
        depth[members] = (np.arange(len(members)) + 0.5) / len(members)
    return split.subset(np.sort(order[np.argsort(depth[order], kind="stable")[:number]]))


def _of_each(split: Split, number: int, rng: Rng) -> Split:
    """`number` of the examples of each class; all of a class that has no more."""
    order = rng.numpy().permutation(len(split))
    chosen = [order[split.labels[order] == label][:number] for label in np.unique(split.labels)]
    return split.subset(np.sort(np.concatenate(chosen)))


@dataclass(frozen=True, eq=False)
class _Concatenation:
    """Two sources as one: the images of the second follow those of the first."""

    first: ImageSource
    second: ImageSource

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def name(self, index: int) -> str:
        return self.first.name(index) if index < len(self.first) else self.second.name(index - len(self.first))

    def open(self, index: int) -> Image.Image:
        return self.first.open(index) if index < len(self.first) else self.second.open(index - len(self.first))

    def fingerprint(self, indices: np.ndarray) -> str:
        first, second = self._parts(indices)
        return _joint(self.first.fingerprint(first), self.second.fingerprint(second))

    def contents(self, indices: np.ndarray) -> str:
        first, second = self._parts(indices)
        return _joint(self.first.contents(first), self.second.contents(second), (indices < len(self.first)).tobytes())

    def digest(self, index: int) -> bytes:
        return self.first.digest(index) if index < len(self.first) else self.second.digest(index - len(self.first))

    def _parts(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cut = len(self.first)
        return indices[indices < cut], indices[indices >= cut] - cut


def _joint(first: str, second: str, order: bytes = b"") -> str:
    return hashlib.sha256(f"{first} {second} ".encode() + order).hexdigest()


def _together(train: Split, test: Split) -> Split:
    """The examples of both splits, those of `train` first."""
    same = train.source is test.source
    source = train.source if same else _Concatenation(train.source, test.source)
    source_indices = np.concatenate([train.source_indices, test.source_indices + (0 if same else len(train.source))])
    groups = None
    if train.groups is not None and test.groups is not None:
        groups = np.concatenate([train.groups, test.groups])
    return Split(source, source_indices, np.concatenate([train.labels, test.labels]), groups)


def _require(option: str, num_train: int, num_test: int) -> None:
    for name, number in (("train", num_train), ("test", num_test)):
        if not number:
            raise UserError(f"{option}: of {num_train + num_test} images none would be left to {name} on")
