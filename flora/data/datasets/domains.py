"""Data sets whose images come from several domains: photos, sketches, paintings of the same classes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from flora.core.errors import UserError
from flora.core.files import read_text
from flora.core.registry import OptionError, option, register, suggest
from flora.core.rng import Rng
from flora.data.datasets.base import Dataset, ImageData, stratified_split
from flora.data.datasets.folders import Example, to_split
from flora.data.datasets.walk import image_paths, subfolders


@dataclass(frozen=True)
class DomainSet(Dataset):
    """A data set with a folder for each domain, and in each one for each class: `root/FOLDER/DOMAIN/CLASS/image`.

    Copies spell the domains' folders in many ways; capitals, spaces, `_` and `-` don't matter. The domain is what the
    data name for each image, so `partition: natural` makes each domain a client, and `split: leave_domain_out` tests on
    one that nobody trains on. The test images are drawn at random, of each class in each domain in proportion.
    """

    title: ClassVar[str]
    folders: ClassVar[tuple[str, ...]]
    """What the folder of the domains may be called, below `root`; the first one that is there is read."""
    known_domains: ClassVar[tuple[str, ...]]
    num_classes: ClassVar[int]
    source: ClassVar[str]
    """Where the data come from: they can't be fetched automatically."""
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Better names for some class folders; in the others underscores become spaces."""

    root: str = option("folder that holds the data set's own folder", "data")
    domains: tuple[str, ...] = option("the domains to read; none: all", ())
    classes: tuple[str, ...] = option("the class folders to read; none: all", ())
    test_fraction: float = option("share of the images to test on", 0.2, above=0, below=1)

    def check(self) -> None:
        for domain in self.domains:
            if domain not in self.known_domains:
                raise OptionError("domains", f"unknown domain {domain!r}; {suggest(domain, self.known_domains)}")
        for name, values in (("domains", self.domains), ("classes", self.classes)):
            if len(set(values)) != len(values):
                raise OptionError(name, "expected each once")

    def load(self, rng: Rng) -> ImageData:
        """Index the images, ordered by domain, class and path. Raises `UserError` naming the folder that is missing."""
        folder = self._folder()
        examples = self._examples(folder)
        class_names = tuple(sorted({example.label for example in examples}))
        if not self.classes and len(class_names) != self.num_classes:
            raise self._error(f"expected the same {self.num_classes} classes in each domain, got {len(class_names)}")
        whole = to_split(examples, class_names)
        assert whole.groups is not None
        cells = np.unique(whole.groups, return_inverse=True)[1] * len(class_names) + whole.labels
        train, test = stratified_split(cells, self.test_fraction, rng)
        return ImageData(whole.subset(train), whole.subset(test), class_names)

    def _folder(self) -> Path:
        root = Path(os.path.expanduser(self.root))
        for name in self.folders:
            if (root / name).is_dir():
                return root / name
        expected = root / self.folders[0] / self.known_domains[0] / "CLASS" / "image"
        raise self._error(f"it is not there; expected {expected}; {self.source}")

    def _examples(self, folder: Path) -> list[Example]:
        examples: list[Example] = []
        by_name = {_plain(path.name): path for path in subfolders(folder)}
        for domain in self.domains or self.known_domains:
            if _plain(domain) not in by_name:
                raise self._error(f"it is not complete; expected {folder / domain}; {self.source}")
            for path in self._class_folders(by_name[_plain(domain)]):
                paths = image_paths(path)
                if not paths:
                    raise self._error(f"no images in {path}")
                examples += [Example(image, self._name(path.name), domain) for image in paths]
        return examples

    def _class_folders(self, folder: Path) -> Sequence[Path]:
        """Return a domain's class folders. Raises `UserError` unless those that are asked for, or all, are there."""
        folders = subfolders(folder)
        names = [path.name for path in folders]
        for name in self.classes:
            if name not in names:
                raise UserError(f"data.classes: no folder {name!r} in {folder}; {suggest(name, names)}")
        if not self.classes and len(folders) != self.num_classes:
            raise self._error(
                f"it is not complete; expected {self.num_classes} class folders in {folder}, got {len(folders)}"
            )
        return [path for path in folders if not self.classes or path.name in self.classes]

    def _name(self, folder: str) -> str:
        return self.renamed.get(folder, folder.replace("_", " "))

    def _error(self, message: str) -> UserError:
        return UserError(f"data.root: {self.root}: {self.title}: {message}")


@register("pacs")
@dataclass(frozen=True)
class Pacs(DomainSet):
    """PACS: 9,991 photos, paintings, cartoons and sketches of 7 classes (arXiv:1710.03077)."""

    title = "PACS"
    folders = ("PACS/kfold", "PACS", "pacs")
    known_domains = ("art_painting", "cartoon", "photo", "sketch")
    num_classes = 7
    source = "it comes from the authors: https://domaingeneralization.github.io/#data"


@register("office_home")
@dataclass(frozen=True)
class OfficeHome(DomainSet):
    """Office-Home: 15,588 images of 65 things in offices and homes, in four domains (arXiv:1706.07522)."""

    title = "Office-Home"
    folders = ("OfficeHomeDataset_10072016", "OfficeHome", "office_home")
    known_domains = ("Art", "Clipart", "Product", "Real World")
    num_classes = 65
    source = "its folder comes from the authors: https://www.hemanthdv.org/officeHomeDataset.html"


@register("office_caltech10")
@dataclass(frozen=True)
class OfficeCaltech10(DomainSet):
    """Office-Caltech10: 2,533 images of 10 things, from a shop, two cameras and the web (Gong et al., CVPR 2012)."""

    title = "Office-Caltech10"
    folders = ("office_caltech_10", "OfficeCaltech10", "Office_Caltech_DA_Dataset")
    known_domains = ("amazon", "caltech", "dslr", "webcam")
    num_classes = 10
    source = "its folder comes with the code of FedBN (arXiv:2102.07623): https://github.com/med-air/FedBN"
    renamed = MappingProxyType({"back_pack": "backpack", "laptop_computer": "laptop computer"})


@register("domainnet")
@dataclass(frozen=True)
class DomainNet(DomainSet):
    """DomainNet: 586,575 images of 345 classes in six domains, with its own lists of test images (arXiv:1812.01754).

    `DOMAIN_train.txt` and `DOMAIN_test.txt` beside the folders of the domains list `DOMAIN/CLASS/image NUMBER`, and
    `test_fraction` is not read. Papers often take 10 of the classes: `classes`.
    """

    title = "DomainNet"
    folders = ("DomainNet", "domainnet", "domain_net")
    known_domains = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
    num_classes = 345
    source = "its archives and lists come from the authors: https://ai.bu.edu/M3SDA"

    def load(self, rng: Rng) -> ImageData:
        """Index the images that the lists name. Raises `UserError` naming the list or the folder that is missing."""
        folder = self._folder()
        train, test = (self._listed(folder, part) for part in ("train", "test"))
        class_names = tuple(sorted({example.label for example in train}))
        unknown = sorted({example.label for example in test}.difference(class_names))
        if unknown:
            raise self._error(f"class {unknown[0]!r} has test images and no training images")
        return ImageData(to_split(train, class_names), to_split(test, class_names), class_names)

    def _listed(self, folder: Path, part: str) -> list[Example]:
        """Return one part's images of all domains, by domain and path. Raises `UserError` for a line that is none."""
        examples: list[Example] = []
        for domain in self.domains or self.known_domains:
            path = folder / f"{domain}_{part}.txt"
            try:
                lines = [line for line in read_text(path).splitlines() if line.strip()]
            except FileNotFoundError:
                raise self._error(f"it is not complete; expected {path}; {self.source}") from None
            except (OSError, ValueError) as error:
                raise self._error(f"{path}: {error}") from None
            for line in sorted(lines):
                image = Path(line.rsplit(" ", 1)[0])
                if len(image.parts) != 3 or image.parts[0] != domain or ".." in image.parts:
                    raise self._error(f"{path}: expected {domain}/CLASS/IMAGE NUMBER, got {line[:80]!r}")
                if not self.classes or image.parts[1] in self.classes:
                    examples.append(Example(folder / image, self._name(image.parts[1]), domain))
        missing = set(map(self._name, self.classes)).difference(example.label for example in examples)
        if missing:
            raise UserError(f"data.classes: the lists of {folder} have no {part} image of {sorted(missing)[0]!r}")
        return examples


def _plain(name: str) -> str:
    """Return a folder's name in small letters and digits alone, as its spellings have in common."""
    return "".join(each for each in name.casefold() if each.isalnum())
