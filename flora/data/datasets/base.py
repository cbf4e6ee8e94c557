"""The base class of data sets, and labelled images that are read on demand."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from PIL import Image

from flora.core.contracts import refuse
from flora.core.counts import part_of
from flora.core.errors import UserError
from flora.core.files import open_regular
from flora.core.progress import Progress
from flora.core.registry import Component, OptionError, option
from flora.core.rng import Rng

# What is kept of a SHA-256 that tells an image from others.
DIGEST_BYTES = 16


class ImageSource(Protocol):
    """A numbered collection of images."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what to call image `index` in a message: its path, or its place in an archive."""

    def open(self, index: int) -> Image.Image:
        """Decode image `index`, in whatever mode and size it has. Raises OSError if it can't be read."""

    def fingerprint(self, indices: np.ndarray) -> str:
        """A digest that changes when one of these images does, found without decoding them."""

    def contents(self, indices: np.ndarray) -> str:
        """A digest that tells other images from these, and is the same wherever they are; found without reading them.

        What it overlooks, `digest` doesn't.
        """

    def digest(self, index: int) -> bytes:
        """The first `DIGEST_BYTES` of a SHA-256 of image `index`, as it is stored. Raises OSError as `open` does."""


@dataclass(frozen=True)
class ImageFiles:
    """Images in files of their own.

    `jpeg_side`: JPEG files are decoded at the smallest of 1, 1/2, 1/4 and 1/8 of their size at which both sides have as
    many pixels; None: at their size.
    """

    paths: Sequence[Path]
    jpeg_side: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def open(self, index: int) -> Image.Image:
        with self.undecoded(index) as image:
            image.load()
            return image

    @contextmanager
    def undecoded(self, index: int) -> Iterator[Image.Image]:
        """Image `index`, whose pixels are decoded where they are first asked for. Raises OSError as `open` does."""
        try:
            with open_regular(self.paths[index]) as file, Image.open(file) as image:
                if self.jpeg_side is not None:
                    image.draft(None, (self.jpeg_side, self.jpeg_side))
                yield image
        except (OSError, MemoryError):
            raise
        except Exception as error:  # Pillow's decoders raise ValueError, SyntaxError and more on a damaged file.
            raise OSError(f"cannot decode image file: {error}") from error

    def fingerprint(self, indices: np.ndarray) -> str:
        """Of the files' paths, sizes and times of change. A file that is missing has neither of the last two."""
        digest = hashlib.sha256(b"" if self.jpeg_side is None else repr(self.jpeg_side).encode())
        for index in indices:
            path = self.paths[index]
            try:
                status = path.stat()
                # The time of change of the inode can't be set by copying tools.
                times = (status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
                digest.update(repr((str(path.resolve()), status.st_size, times)).encode())
            except OSError:
                digest.update(repr(str(path)).encode())
        return digest.hexdigest()

    def contents(self, indices: np.ndarray) -> str:
        """Of the files' names and sizes."""
        digest = hashlib.sha256()
        for index in indices:
            path = self.paths[index]
            try:
                digest.update(repr((path.name, path.stat().st_size)).encode())
            except OSError:
                digest.update(repr(path.name).encode())
        return digest.hexdigest()

    def digest(self, index: int) -> bytes:
        """Of the file's bytes."""
        digest = hashlib.sha256()
        with open_regular(self.paths[index]) as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        return digest.digest()[:DIGEST_BYTES]


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """Images of one size in memory: `pixels` is uint8, `(N, H, W)` grey or `(N, H, W, 3)` RGB."""

    pixels: np.ndarray
    title: str

    def __post_init__(self) -> None:
        found = getattr(self.pixels, "dtype", type(self.pixels).__name__), getattr(self.pixels, "shape", ())
        if found[0] != np.uint8 or len(found[1]) not in (3, 4):
            shape = "an array of uint8, (N, H, W) grey or (N, H, W, 3) RGB"
            raise UserError(f"data: the pixels of {self.title}: expected {shape}, got {found[0]} {found[1]}")

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def fingerprint(self, indices: np.ndarray) -> str:
        """Of the pixels themselves."""
        return self.contents(indices)

    def contents(self, indices: np.ndarray) -> str:
        """Of the pixels themselves."""
        chosen = self.pixels[indices]
        return hashlib.sha256(repr((chosen.shape, str(chosen.dtype))).encode() + chosen.tobytes()).hexdigest()

    def digest(self, index: int) -> bytes:
        """Of the pixels."""
        return hashlib.sha256(self.pixels[index].tobytes()).digest()[:DIGEST_BYTES]


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images.

    `labels` is `(N,)` int64, an index into the class names; example i is image `source_indices[i]` of `source`.
    `groups`, where the data names a client for each image, is `(N,)` of str.
    """

    source: ImageSource
    source_indices: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.groups is not None and len(self.groups) != len(self.labels):
            raise UserError(f"data: {len(self.groups)} groups for {len(self.labels)} images")

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return what to call example `index` in a message."""
        return self.source.name(int(self.source_indices[index]))

    def open(self, index: int) -> Image.Image:
        """Decode example `index`. Raises OSError if it can't be read."""
        return self.source.open(int(self.source_indices[index]))

    def subset(self, indices: np.ndarray) -> Split:
        """The examples at `indices` (integers or a boolean mask), in that order."""
        groups = None if self.groups is None else self.groups[indices]
        return Split(self.source, self.source_indices[indices], self.labels[indices], groups)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set's two splits and the names of its classes, as the data calls them.

    `new` are test images of classes that were set aside, labelled from 0, and `new_class_names` what these are called.
    `remarks` are lines that a data set has for its user: what it left out, or what looks like a mistake.
    """

    train: Split
    test: Split
    class_names: tuple[str, ...]
    new: Split | None = None
    new_class_names: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def checked_images(setting: str, component: Component, images: object) -> ImageData:
    """Return `images`, which must be an `ImageData` whose images and classes exist."""
    if not isinstance(images, ImageData):
        refuse(setting, component, f"a {type(images).__name__}, expected ImageData")
    named = (("training", images.train, images.class_names), ("test", images.test, images.class_names),
             ("new", images.new, images.new_class_names))  # fmt: skip
    for name, split, class_names in named:
        if split is None:
            continue
        rows = (("labels", split.labels, len(class_names)), ("source_indices", split.source_indices, len(split.source)))
        for what, numbers, below in rows:
            if len(numbers) != len(split) or (len(numbers) and numbers.dtype.kind not in "iu"):
                refuse(setting, component, f"{what} of the {name} images that are not a whole number for each image")
            if len(numbers) and not 0 <= numbers.min() <= numbers.max() < below:
                wrong = numbers.min() if numbers.min() < 0 else numbers.max()
                refuse(setting, component, f"{wrong} among the {what} of the {name} images, expected 0 to {below - 1}")
        if split.groups is not None and len(split.groups) != len(split):
            refuse(setting, component, f"{len(split.groups)} groups for {len(split)} {name} images")
    return images


def with_jpeg_side(data: ImageData, side: int | None) -> ImageData:
    """The same images, those in JPEG files decoded at a part of their size: see `ImageFiles`."""
    if side is None:
        return data
    smaller: dict[int, ImageSource] = {}

    def changed(split: Split) -> Split:
        source = split.source
        if isinstance(source, ImageFiles):  # one for all splits that share it
            source = smaller.setdefault(id(source), replace(source, jpeg_side=side))
        return replace(split, source=source)

    new = None if data.new is None else changed(data.new)
    return replace(data, train=changed(data.train), test=changed(data.test), new=new)


@dataclass(frozen=True, kw_only=True)
class Dataset(Component):
    """Where the images come from. `templates` are the prompts used unless the experiment sets its own."""

    templates: ClassVar[tuple[str, ...]] = ("a photo of a {}.",)

    unreadable: str = option("what to do with an image that can't be read", "error", choices=("error", "skip"))
    value_range: tuple[float, ...] | None = option(
        "[LOW, HIGH]: the values of images of more than 8 bits that are black and white; none: what the files' tags "
        "say, or the range of all values in the data set",
        None,
    )
    jpeg_side: int | None = option(
        "large JPEG files are decoded at 1/2, 1/4 or 1/8 of their size, as long as both sides keep at least as many "
        "pixels: faster, not the same features; none: at their size",
        None,
        at_least=1,
    )

    def __post_init__(self) -> None:
        """Check the options, those that all data sets have and the data set's own."""
        super().__post_init__()
        limits = self.value_range
        if limits is not None and not (len(limits) == 2 and -math.inf < limits[0] < limits[1] < math.inf):
            raise OptionError("value_range", f"expected [LOW, HIGH] with LOW below HIGH, got {list(limits)}")

    @property
    def skips_unreadable(self) -> bool:
        """Whether images that can't be read are left out."""
        return self.unreadable == "skip"

    @abstractmethod
    def load(self, rng: Rng) -> ImageData:
        """Index the images without decoding them; any random split is drawn from `rng`.

        The order of the examples doesn't depend on the order in which a file system lists them.
        Raises `UserError` naming what was expected where, if the data are not there.
        """

    def load_with_progress(self, rng: Rng, progress: Progress) -> ImageData:
        """Do the same as `load`; a data set that takes long shows how far it is."""
        return self.load(rng)


def stratified_split(labels: np.ndarray, test_fraction: float, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of a train and a test part that hold each class in the same proportion.

    A class of n examples gives round(n * test_fraction) to the test part, at least one to each part if n > 1.
    """
    train, test = [], []
    for label in np.unique(labels):
        members = rng.child("class", int(label)).numpy().permutation(np.flatnonzero(labels == label))
        num_test = round(part_of(test_fraction, len(members)))
        if len(members) > 1:
            num_test = min(max(num_test, 1), len(members) - 1)
        test.append(members[:num_test])
        train.append(members[num_test:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))
