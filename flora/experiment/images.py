"""The images: found, split and checked before the model is loaded, then turned into features."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from flora.clip.towers.towers import AdaptedClip
from flora.config.descriptions import check_known, read_descriptions
from flora.config.rules import in_section
from flora.config.schema import ExperimentConfig
from flora.core.errors import UserError
from flora.core.processes import ALONE, Processes
from flora.core.progress import Tell
from flora.core.registry import name_of
from flora.core.rng import Rng
from flora.core.shared import Shared
from flora.data.augmentation import Augmentation, NoAugmentation
from flora.data.datasets.base import Dataset, ImageData, Split, checked_images, with_jpeg_side
from flora.data.value_range import with_one_range
from flora.data.views import views_of
from flora.experiment.clients import Roster, Shares, deal_out, ranks_of, roster_of
from flora.features.features import Features, StoredFeatures, images_digest
from flora.features.live import LiveFeatures, live_features
from flora.features.loading import load_features
from flora.features.views import ViewFeatures, move_if_they_fit


@dataclass(frozen=True, eq=False)
class Images:
    """The images before they were split and after it, how their classes are called, and whom the data name.

    `descriptions` are the sentences of `prompts.descriptions`, by what the classes are called in prompts. `shares` are
    the clients', if all images can be read. `other` are the data sets of `evaluation.also`, by name.
    """

    whole: ImageData
    data: ImageData
    class_names: tuple[str, ...]
    new_class_names: tuple[str, ...]
    roster: Roster
    value_range: tuple[float, float] | None
    descriptions: Mapping[str, tuple[str, ...]]
    shares: Shares = field(default_factory=Shares)
    other: Mapping[str, ImageData] = field(default_factory=dict)

    @property
    def descriptions_digest(self) -> dict[str, str]:
        """A SHA-256 of the descriptions, if there are any, under the name that `environment.json` has for it."""
        if not self.descriptions:
            return {}
        content = json.dumps(sorted(self.descriptions.items()))
        return {"descriptions_sha256": hashlib.sha256(content.encode()).hexdigest()}


def find_images(config: ExperimentConfig, rng: Rng, tell: Tell, shared: Shared) -> Images:
    """Find the images, split them, and check all that can be checked of them before the model is loaded."""
    images = _split_images(config, rng, tell, shared)
    shares = _dealt_out(config, images.data, images.class_names, rng)
    also = config.seed, repr(config.evaluation.also)
    other = shared.of(("other images", also), lambda: _other_images(config, rng, tell))
    roster = roster_of(config, images.data.train.groups, rng)
    images = replace(images, roster=roster, shares=shares, other=other)
    return _with_one_range(config, images, tell, shared)


def find_test_images(config: ExperimentConfig, rng: Rng, tell: Tell) -> Images:
    """Find the images and split them as `find_images` does, for evaluation alone: nobody is dealt any.

    Raises `UserError` if there are no two classes, or no test images.
    """
    images = _split_images(config, rng, tell, Shared())
    if len(images.class_names) < 2:
        raise UserError(f"data: {images.class_names[0]!r} is the only class: there is nothing to tell it from")
    if not len(images.data.test):
        raise UserError("data: there are no test images")
    return _with_one_range(config, images, tell, Shared())


def _other_images(config: ExperimentConfig, rng: Rng, tell: Tell) -> dict[str, ImageData]:
    """Find the data sets of `evaluation.also` and return them by name, split as in runs of their own.

    Raises `UserError` naming the setting if one is not there, or has no two classes or no test images.
    """
    images = {}
    for dataset in config.evaluation.also:
        setting = f"evaluation.also ({name_of(dataset)})"
        data = images_of(setting, dataset, rng.child("data"), tell)
        if len(data.class_names) < 2 or not len(data.test):
            raise UserError(f"{setting}: expected test images of at least two classes")
        images[name_of(dataset)] = data
    return images


def images_of(setting: str, dataset: Dataset, rng: Rng, tell: Tell) -> ImageData:
    """The images of a data set that is not `data` but of another setting. Raises `UserError` naming that."""
    with naming(setting):
        images = checked_images(setting, dataset, dataset.load_with_progress(rng, tell.progress))
        images = with_jpeg_side(images, dataset.jpeg_side)
        return with_one_range(images, dataset.value_range, whole=images, progress=tell.progress, log=tell.log)[0]


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """A context in which a data set's `UserError` names `setting` in place of `data`, the section of most of them."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"(?<![\w./])data(?=[.:]\B|\.\w)", setting, str(error))) from None


def _images_key(config: ExperimentConfig) -> Hashable:
    return config.seed, repr((config.data, config.split))


def _split_images(config: ExperimentConfig, rng: Rng, tell: Tell, shared: Shared) -> Images:
    whole, data = shared.of(("images", _images_key(config)), lambda: _loaded(config, rng, tell))
    for line in whole.remarks:
        tell.log(f"warning: {line}")
    class_names, new_names = _class_names(config, data)
    descriptions = _descriptions(config, data, (*class_names, *new_names))
    return Images(whole, data, class_names, new_names, Roster(None, None), None, descriptions)


def _loaded(config: ExperimentConfig, rng: Rng, tell: Tell) -> tuple[ImageData, ImageData]:
    """The images before they are split and after it."""
    whole = checked_images("data", config.data, config.data.load_with_progress(rng.child("data"), tell.progress))
    whole = with_jpeg_side(whole, config.data.jpeg_side)
    return whole, checked_images("split", config.split, config.split.split(whole, rng.child("split")))


def _with_one_range(config: ExperimentConfig, images: Images, tell: Tell, shared: Shared) -> Images:
    """The images with those of more than 8 bits scaled by one range, if there are any."""
    data, value_range = shared.of(
        ("range", _images_key(config)),
        lambda: with_one_range(
            images.data, config.data.value_range, whole=images.whole, progress=tell.progress, log=tell.log
        ),
    )
    return replace(images, data=data, value_range=None if value_range is None else value_range.limits)


def features_key(config: ExperimentConfig, data: ImageData, model: AdaptedClip) -> Hashable:
    """The key of the splits' features among those that experiments share: all that they depend on."""
    seed = None if config.cache.views is None else config.seed
    options = config.cache, config.local.augmentation, config.local.self_training, config.data.unreadable
    return "features", id(data), id(model), seed, repr(options)


@dataclass(frozen=True, eq=False)
class SplitFeatures:
    """The features of the training, the test and, where classes were set aside, the new images.

    `unreadable` has a line for each image that can't be read, `digests` are those of the images and the labels.
    """

    train: Features
    test: Features
    new: Features | None
    unreadable: list[str]
    digests: dict[str, str]

    @property
    def runs_stem(self) -> bool:
        """Whether some images go through the stem at each use."""
        return any(features.runs_stem for features in self._all)

    def moved(self, device: torch.device) -> SplitFeatures:
        """The same on `device`, if they fit into half of its free memory."""
        train, test, *new = move_if_they_fit(self._all, device)
        return replace(self, train=train, test=test, new=new[0] if new else None)

    @property
    def _all(self) -> list[Features]:
        return [self.train, self.test] + ([] if self.new is None else [self.new])


def features_of_splits(
    config: ExperimentConfig, data: ImageData, model: AdaptedClip, tell: Tell, processes: Processes = ALONE
) -> SplitFeatures:
    """The features of the splits.

    They are computed once, apart from those of images that are changed at random: the training split's, unless a number
    of views of each is kept.
    """
    splits = {"training": data.train, "test": data.test} | ({"new": data.new} if data.new is not None else {})
    loader = Loader(config, model, tell, config.data.skips_unreadable, processes)
    features = loader.load(splits)
    train = loader.changed_at_random("training", config.local.augmentation, features["training"], data.train)
    self_training = config.local.active_self_training
    if self_training is not None:
        views = {"weak": self_training.weak, "strong": self_training.strong}
        train = replace(
            train,
            views={
                name: loader.changed_at_random(name, augmentation, features["training"], data.train)
                for name, augmentation in views.items()
            },
        )
    features["training"] = train
    if loader.problems:
        number = sum(len(split) for split in splits.values())
        tell.log(f"left out: {len(loader.problems):,} of {number:,} images can't be read")
    digests = {"data_sha256": data_digest(data), "images_sha256": images_digest(list(features.values()))}
    return SplitFeatures(train, features["test"], features.get("new"), loader.problems, digests)


@dataclass(eq=False)
class Loader:
    """Turns images into features. `problems` has a line for each image that can't be read.

    With `skip_unreadable` these are left out; without it the first of them is an error.
    """

    config: ExperimentConfig
    model: AdaptedClip
    tell: Tell
    skip_unreadable: bool
    processes: Processes = ALONE
    problems: list[str] = field(default_factory=list)

    def load(self, splits: Mapping[str, Split]) -> dict[str, Features]:
        """Each split's features by its name, of images as they are."""
        features: dict[str, Features] = {}
        for name in (name for name in splits if self._is_live(name)):
            self.tell.log(f"features of the {name} images: computed at each use")
            features[name], problems = live_features(
                splits[name],
                self.model,
                NoAugmentation(),
                skip_unreadable=self.skip_unreadable,
                progress=self.tell.progress,
            )
            self.problems += problems
        stored = [name for name in splits if not self._is_live(name)]
        if stored:
            loaded = self._stored([splits[name] for name in stored])
            features.update(zip(stored, loaded, strict=True))
        return {name: features[name] for name in splits}

    def changed_at_random(self, name: str, augmentation: Augmentation, features: Features, split: Split) -> Features:
        """The features of a split whose images are changed at random in training; `features` are as they are."""
        if not augmentation.changes_images:
            return features
        number, clip = self.config.cache.views, self.model.clip
        if number is None:
            labels, places = features.labels, features.split_indices
            return LiveFeatures(split, self.model, augmentation, labels, places, features.digests)
        assert isinstance(features, StoredFeatures)
        self.tell.log(f"features of the {name} views of images: {number} of each image are kept")
        size, rng = clip.architecture.image_size, Rng(self.config.seed).child("views", name)
        views = views_of(split.subset(features.split_indices), augmentation, number, size, rng)
        return ViewFeatures(features, self._stored([views])[0], number)

    def _is_live(self, name: str) -> bool:
        """Whether nothing is kept of a split's images as they are."""
        cache, changes = self.config.cache, self.config.local.augmentation.changes_images
        return cache.enabled is False or (name == "training" and changes and cache.views is None)

    def _stored(self, splits: Sequence[Split]) -> list[StoredFeatures]:
        loaded, problems = load_features(
            splits,
            self.model,
            cache=self.config.cache,
            skip_unreadable=self.skip_unreadable,
            tell=self.tell,
            processes=self.processes,
        )
        self.problems += problems
        return loaded


def data_digest(data: ImageData) -> str:
    """A digest that tells other images or labels from these, wherever they are."""
    splits = [data.train, data.test] + ([data.new] if data.new is not None else [])
    parts = [each for split in splits for each in (split.source.contents(split.source_indices), split.labels)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part.tobytes())
    return digest.hexdigest()


def _dealt_out(config: ExperimentConfig, data: ImageData, class_names: Sequence[str], rng: Rng) -> Shares:
    """Each client's share. Raises `UserError` for what labels alone show to be wrong: before any image is read."""
    check_classes(data.train.labels, data.test.labels, class_names)
    shares = deal_out(config, data.train.labels, data.train.groups, rng)
    ranks_of(config, len(shares.clients), rng.child("ranks"))
    return shares


def check_classes(train: np.ndarray, test: np.ndarray, class_names: Sequence[str]) -> None:
    """Raise `UserError` unless there are two classes, all in the labels `train` `(N,)`, and `test` `(M,)` has some."""
    if len(class_names) < 2:
        raise UserError(f"data: {class_names[0]!r} is the only class: there is nothing to tell it from")
    empty = np.flatnonzero(np.bincount(train, minlength=len(class_names)) == 0)
    if len(empty):
        raise UserError(
            f"data: class {class_names[empty[0]]!r} has no training image: the data have none that can be read, or "
            "`split` leaves none"
        )
    if not len(test):
        raise UserError("data: there are no test images")


def warn_of_untested_classes(test: np.ndarray, class_names: Sequence[str], log: Callable[[str], object]) -> None:
    """Log which classes have no test image, by the labels `test` `(N,)`, if there are any."""
    counts = np.bincount(test, minlength=len(class_names)).tolist()
    untested = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if untested:
        names = ", ".join(untested[:10]) + " ..." * (len(untested) > 10)
        log(f"warning: data: {len(untested)} of {len(class_names)} classes have no test image: {names}")


def _class_names(config: ExperimentConfig, data: ImageData) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what the classes are called in prompts: those that are trained on, and those that are set aside."""
    with in_section("prompts"):
        names = config.prompts.rename((*data.class_names, *data.new_class_names))
    return names[: len(data.class_names)], names[len(data.class_names) :]


def _descriptions(config: ExperimentConfig, data: ImageData, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The sentences that the file of `prompts.descriptions` has, by `names`, which are what prompts call all classes.

    The file has the data set's names of them. Raises `UserError` if it can't be read, or describes another class.
    """
    path = config.prompts.descriptions
    if path is None:
        return {}
    sentences, data_names = read_descriptions(path), (*data.class_names, *data.new_class_names)
    check_known(path, sentences, data_names)
    return {name: sentences[key] for key, name in zip(data_names, names, strict=True) if key in sentences}
