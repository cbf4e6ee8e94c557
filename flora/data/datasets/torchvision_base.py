"""How a data set that torchvision reads becomes ours: labels without decoding, one-line errors, official splits."""

from __future__ import annotations

import importlib.util
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from flora.core.errors import UserError
from flora.core.registry import option
from flora.core.rng import Rng
from flora.data.datasets.base import Dataset, ImageArrays, ImageData, ImageFiles, Split
from flora.data.datasets.folders import split_at_random

SPLIT_TRAIN, SPLIT_VAL, SPLIT_TEST = {"split": "train"}, {"split": "val"}, {"split": "test"}


@dataclass(frozen=True)
class TorchvisionSet(Dataset):
    """A data set that torchvision reads.

    Class i is torchvision's class i. The official splits are used; where there are three, the validation split
    belongs to the training split, as in the linear probes of CLIP (arXiv:2103.00020, table 9).
    """

    title: ClassVar[str]
    reader: ClassVar[str]
    """The name of the class of `torchvision.datasets`."""
    layout: ClassVar[tuple[str, ...]]
    """What must be below `root`."""
    by_hand: ClassVar[str] = ""
    """Where the data come from, if torchvision can't download them."""
    needs_scipy: ClassVar[bool] = False
    """Whether torchvision reads .mat files for it."""
    train_parts: ClassVar[tuple[dict[str, Any], ...]] = (SPLIT_TRAIN,)
    """The reader's arguments for each part of the training split."""
    test_parts: ClassVar[tuple[dict[str, Any], ...]] = (SPLIT_TEST,)
    names: ClassVar[tuple[str, ...]] = ()
    """All class names, if torchvision has none or unfit ones."""
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Better names for some of torchvision's; in the others underscores become spaces."""

    root: str = option("folder that holds the data set's own folder, laid out as torchvision expects", "data")
    download: bool = option("fetch the data set into root if it is not there", False)

    def load(self, rng: Rng) -> ImageData:
        """Index the images without decoding files; nothing is drawn at random.

        Raises `UserError` if the data are missing or damaged or can't be downloaded.
        """
        train = self._read_parts(self.train_parts)
        test = self._read_parts(self.test_parts)
        names = self._class_names(train[0])
        if any(self._class_names(part) != names for part in (*train, *test)):
            raise self._error("its splits don't have the same classes")
        return ImageData(self._split(train, "train"), self._split(test, "test"), names)

    @abstractmethod
    def _split(self, parts: Sequence[Any], name: str) -> Split:
        """The examples of torchvision's data sets `parts`, one after the other. The split is called `name`."""

    def _error(self, message: str) -> UserError:
        return UserError(f"data.root: {self.root}: {self.title}: {message}")

    def _is_there(self, root: Path) -> bool:
        return all((root / path).exists() for path in self.layout)

    def _read_parts(self, parts: Sequence[Mapping[str, Any]]) -> list[Any]:
        """torchvision's data sets for each of the `parts`' arguments, downloaded first if that is asked for."""
        root = Path(os.path.expanduser(self.root))
        expected = ", ".join(str(root / path) for path in self.layout)
        there = self._is_there(root)
        if not there and (self.by_hand or not self.download):
            mend = self.by_hand or "set data.download=true to fetch it (or the right root)"
            raise UserError(f"data.root: {self.root}: {self.title} is not there; expected {expected}; {mend}")
        if self.needs_scipy and importlib.util.find_spec("scipy") is None:
            raise UserError(f"data: {self.title} is stored in .mat files: pip install scipy to read them")
        from torchvision import datasets  # takes more than a second, and configurations are read without it

        reader = getattr(datasets, self.reader)
        fetch = {"download": True} if self.download and not self.by_hand else {}
        try:
            return [reader(str(root), **arguments, **fetch) for arguments in parts]
        except Exception as error:  # torchvision, its downloads and archives raise errors of all kinds.
            reason = " ".join(str(error).split()) or type(error).__name__
            problem = ("it can't be read" + " or downloaded" * bool(fetch)) if there else "the download failed"
            raise self._error(f"{problem} ({reason}); expected {expected}") from error

    def _class_names(self, part: Any) -> tuple[str, ...]:
        return self.names or tuple(self.renamed.get(name, name.replace("_", " ")) for name in part.classes)


@dataclass(frozen=True)
class FileSet(TorchvisionSet):
    """A data set of image files."""

    samples: ClassVar[str] = ""
    """torchvision's attribute that lists pairs of path and label; empty: `_image_files` and `_labels` list them."""

    def _split(self, parts: Sequence[Any], name: str) -> Split:
        paths: list[Path] = []
        labels: list[int] = []
        for part in parts:
            part_paths, part_labels = self._files(part)
            paths += map(Path, part_paths)
            labels += part_labels
        return Split(ImageFiles(paths), np.arange(len(paths)), np.array(labels, dtype=np.int64))

    def _files(self, part: Any) -> tuple[Sequence[str | Path], Sequence[int]]:
        """The paths and labels of one of torchvision's data sets, in an order that no file system determines."""
        if not self.samples:
            return part._image_files, part._labels
        samples = getattr(part, self.samples)
        return [path for path, _ in samples], [label for _, label in samples]


@dataclass(frozen=True)
class UnsplitFileSet(FileSet):
    """A data set of image files without an official split: it is drawn at random, each class in proportion."""

    test_fraction: float = option("share of the images to test on", 0.2, above=0, below=1)

    def load(self, rng: Rng) -> ImageData:
        """Index the images and draw the split from `rng`. Raises `UserError` as the sets with a split do."""
        (part,) = self._read_parts([{}])
        train, test = split_at_random(self._split([part], "all"), self.test_fraction, rng)
        return ImageData(train, test, self._class_names(part))


@dataclass(frozen=True)
class ArraySet(TorchvisionSet):
    """A data set of small images that torchvision keeps in memory."""

    def _split(self, parts: Sequence[Any], name: str) -> Split:
        pixels, labels = zip(*(self._arrays(part) for part in parts), strict=True)
        all_pixels = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
        all_labels = np.concatenate(labels).astype(np.int64)
        return Split(ImageArrays(all_pixels, f"{self.title} {name}"), np.arange(len(all_labels)), all_labels)

    @abstractmethod
    def _arrays(self, part: Any) -> tuple[np.ndarray, np.ndarray]:
        """The images, `(N, H, W)` or `(N, H, W, 3)` uint8, and their labels `(N,)`."""
