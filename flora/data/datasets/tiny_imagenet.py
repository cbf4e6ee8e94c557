"""Tiny-ImageNet, as its archive unpacks."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flora.core.errors import UserError
from flora.core.files import read_text
from flora.core.registry import option, register
from flora.core.rng import Rng
from flora.data.datasets.base import Dataset, ImageData, ImageFiles, Split
from flora.data.datasets.class_names import TINY_IMAGENET
from flora.data.datasets.walk import image_paths

SOURCE = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


@register("tiny_imagenet")
@dataclass(frozen=True)
class TinyImageNet(Dataset):
    """Tiny-ImageNet: 100,000 + 10,000 photos, 64 px, 200 classes.

    Its validation images are those to test on, because its test images have no labels. Class i is the i-th line of
    `wnids.txt`; its name is the first of its synonyms in `words.txt`, or a clearer one from `class_names.py`.
    """

    root: str = option("folder that holds the folder tiny-imagenet-200", "data")
    download: bool = option("fetch the data set into root if it is not there", False)

    def load(self, rng: Rng) -> ImageData:
        """Index the images without decoding them.

        Raises `UserError` if something of the archive is not there or can't be downloaded.
        """
        folder = Path(os.path.expanduser(self.root)) / "tiny-imagenet-200"
        if not folder.is_dir():
            self._fetch(folder)
        wnids = [line.strip() for line in self._lines(folder / "wnids.txt")]
        words = dict(line.split("\t", 1) for line in self._lines(folder / "words.txt") if "\t" in line)
        unknown = next((wnid for wnid in wnids if wnid not in words), None)
        if unknown is not None:
            raise self._error(f"{folder / 'words.txt'} has no name for {unknown}")
        train = [
            (path, label)
            for label, wnid in enumerate(wnids)
            for path in image_paths(self._folder(folder / "train" / wnid))
        ]
        index = {wnid: label for label, wnid in enumerate(wnids)}
        test = []
        annotations = folder / "val" / "val_annotations.txt"
        for line in self._lines(annotations):
            name, wnid = [*line.split("\t"), ""][:2]
            if wnid not in index or Path(name).name != name:
                raise self._error(
                    f"{annotations}: expected an image and one of {len(wnids)} classes, got {line[:80]!r}"
                )
            test.append((folder / "val" / "images" / name, index[wnid]))
        names = tuple(TINY_IMAGENET.get(wnid, words[wnid].split(",")[0].strip()) for wnid in wnids)
        return ImageData(_split(train), _split(test), names)

    def _fetch(self, folder: Path) -> None:
        """Download and unpack `folder`. Raises `UserError` if that isn't asked for or doesn't succeed."""
        if not self.download:
            raise self._error(
                f"it is not there; expected {folder}; set data.download=true to fetch it (or the right root)"
            )
        from torchvision.datasets import utils  # takes more than a second, and configurations are read without it

        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Unpacked beside its place, then moved there: what a broken run leaves is never taken for the data.
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tiny-imagenet-") as unpacked:
                utils.download_and_extract_archive(SOURCE, str(folder.parent), unpacked, md5=MD5)
                os.replace(Path(unpacked) / folder.name, folder)
        except Exception as error:  # Downloads and archives raise errors of all kinds.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise self._error(f"the download failed ({reason}); expected {folder}") from error

    def _folder(self, path: Path) -> Path:
        if not path.is_dir():
            raise self._missing(path)
        return path

    def _lines(self, path: Path) -> list[str]:
        try:
            return [line for line in read_text(path).splitlines() if line.strip()]
        except FileNotFoundError:
            raise self._missing(path) from None
        except (OSError, ValueError) as error:
            raise self._error(f"{path}: {error}") from None

    def _missing(self, path: Path) -> UserError:
        return self._error(f"it is not complete; expected {path}; unpack {SOURCE} again")

    def _error(self, message: str) -> UserError:
        return UserError(f"data.root: {self.root}: Tiny-ImageNet: {message}")


def _split(examples: list[tuple[Path, int]]) -> Split:
    labels = np.array([label for _, label in examples], dtype=np.int64)
    return Split(ImageFiles([path for path, _ in examples]), np.arange(len(examples)), labels)
