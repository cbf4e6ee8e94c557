"""Public classification data sets as torchvision reads and downloads them, with class names fit for a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flora.core.registry import register
from flora.data.datasets.class_names import CALTECH101, COUNTRY211, EUROSAT, FASHION_MNIST, FLOWERS102, MNIST
from flora.data.datasets.torchvision_base import SPLIT_TRAIN, SPLIT_VAL, ArraySet, FileSet, UnsplitFileSet
from flora.data.datasets.walk import image_paths

_MNIST_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


@register("mnist")
@dataclass(frozen=True)
class Mnist(ArraySet):
    """MNIST: handwritten digits, 60,000 + 10,000, 28 px, grey."""

    title = "MNIST"
    reader = "MNIST"
    layout = tuple(f"MNIST/raw/{name}" for name in _MNIST_FILES)
    train_parts = ({"train": True},)
    test_parts = ({"train": False},)
    renamed = MNIST

    def _arrays(self, part: Any) -> tuple[np.ndarray, np.ndarray]:
        return part.data.numpy(), part.targets.numpy()


@register("fashion_mnist")
@dataclass(frozen=True)
class FashionMnist(Mnist):
    """Fashion-MNIST: clothes, 60,000 + 10,000, 28 px, grey."""

    title = "Fashion-MNIST"
    reader = "FashionMNIST"
    layout = tuple(f"FashionMNIST/raw/{name}" for name in _MNIST_FILES)
    renamed = FASHION_MNIST


@register("cifar10")
@dataclass(frozen=True)
class Cifar10(ArraySet):
    """CIFAR-10: 50,000 + 10,000 photos, 32 px, 10 classes."""

    title = "CIFAR-10"
    reader = "CIFAR10"
    layout: ClassVar[tuple[str, ...]] = ("cifar-10-batches-py",)
    train_parts = ({"train": True},)
    test_parts = ({"train": False},)

    def _arrays(self, part: Any) -> tuple[np.ndarray, np.ndarray]:
        return part.data, np.array(part.targets)


@register("cifar100")
@dataclass(frozen=True)
class Cifar100(Cifar10):
    """CIFAR-100: 50,000 + 10,000 photos, 32 px, 100 classes."""

    title = "CIFAR-100"
    reader = "CIFAR100"
    layout = ("cifar-100-python",)


@register("svhn")
@dataclass(frozen=True)
class Svhn(ArraySet):
    """SVHN: house numbers, 73,257 + 26,032, 32 px, the digits 0 to 9; the extra training set is not read."""

    title = "SVHN"
    reader = "SVHN"
    layout = ("train_32x32.mat", "test_32x32.mat")
    needs_scipy = True
    names = tuple("0123456789")

    def _arrays(self, part: Any) -> tuple[np.ndarray, np.ndarray]:
        return part.data.transpose(0, 2, 3, 1), part.labels


@register("stl10")
@dataclass(frozen=True)
class Stl10(ArraySet):
    """STL-10: 5,000 + 8,000 photos, 96 px, 10 classes; the unlabelled images are not read."""

    title = "STL-10"
    reader = "STL10"
    layout = ("stl10_binary",)
    names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")

    def _arrays(self, part: Any) -> tuple[np.ndarray, np.ndarray]:
        return part.data.transpose(0, 2, 3, 1), part.labels


@register("fer2013")
@dataclass(frozen=True)
class Fer2013(ArraySet):
    """FER2013: faces in seven moods, 28,709 + 7,178 (public and private test), 48 px, grey."""

    templates = ("a photo of a {} looking face.",)
    title = "FER2013"
    reader = "FER2013"
    layout = ("fer2013/fer2013.csv",)
    by_hand = (
        "torchvision can't download it: get fer2013.csv or icml_face_data.csv, which has the test labels, from "
        "https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-challenge"
    )
    names = ("angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral")

    def _is_there(self, root: Path) -> bool:
        # torchvision also takes train.csv and test.csv, but these have no test labels.
        return any((root / "fer2013" / name).exists() for name in ("fer2013.csv", "icml_face_data.csv"))

    def _arrays(self, part: Any) -> tuple[np.ndarray, np.ndarray]:
        images, labels = zip(*part._samples, strict=True)
        return np.stack([image.numpy() for image in images]), np.array(labels)


@register("eurosat")
@dataclass(frozen=True)
class EuroSat(UnsplitFileSet):
    """EuroSAT: 27,000 satellite images, 64 px, 10 kinds of land use."""

    templates = ("a centered satellite photo of {}.",)
    title = "EuroSAT"
    reader = "EuroSAT"
    layout = ("eurosat/2750",)
    samples = "samples"
    renamed = EUROSAT


@register("caltech101")
@dataclass(frozen=True)
class Caltech101(UnsplitFileSet):
    """Caltech-101: 8,677 photos, 101 kinds of object, without the background class."""

    title = "Caltech-101"
    reader = "Caltech101"
    layout = ("caltech101/101_ObjectCategories",)
    renamed = CALTECH101

    def _class_names(self, part: Any) -> tuple[str, ...]:
        return tuple(self.renamed.get(name, name.replace("_", " ")) for name in part.categories)

    def _files(self, part: Any) -> tuple[Sequence[str | Path], Sequence[int]]:
        # torchvision counts the files and makes their names up; a stray file would make it name one that isn't there.
        folders = [Path(part.root, "101_ObjectCategories", name) for name in part.categories]
        pairs = [(path, label) for label, folder in enumerate(folders) for path in image_paths(folder)]
        return [path for path, _ in pairs], [label for _, label in pairs]


@register("sun397")
@dataclass(frozen=True)
class Sun397(UnsplitFileSet):
    """SUN397: 108,754 photos of 397 scenes; torchvision has none of the official partitions."""

    title = "SUN397"
    reader = "SUN397"
    layout = ("SUN397/ClassName.txt",)

    def _class_names(self, part: Any) -> tuple[str, ...]:
        return tuple(name.replace("_", " ").replace("/", " ") for name in part.classes)

    def _files(self, part: Any) -> tuple[Sequence[str | Path], Sequence[int]]:
        pairs = sorted(zip(part._image_files, part._labels, strict=True), key=lambda pair: pair[0].as_posix())
        return [path for path, _ in pairs], [label for _, label in pairs]


@register("oxford_pets")
@dataclass(frozen=True)
class OxfordPets(FileSet):
    """Oxford-IIIT Pets: 3,680 + 3,669 photos of 37 breeds of cat and dog."""

    templates = ("a photo of a {}, a type of pet.",)
    title = "Oxford-IIIT Pets"
    reader = "OxfordIIITPet"
    layout = ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations")
    train_parts = ({"split": "trainval"},)

    def _files(self, part: Any) -> tuple[Sequence[str | Path], Sequence[int]]:
        return part._images, part._labels


@register("flowers102")
@dataclass(frozen=True)
class Flowers102(FileSet):
    """Flowers-102: 2,040 + 6,149 photos of 102 flowers."""

    templates = ("a photo of a {}, a type of flower.",)
    title = "Flowers-102"
    reader = "Flowers102"
    layout = ("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat")
    needs_scipy = True
    train_parts = (SPLIT_TRAIN, SPLIT_VAL)
    renamed = FLOWERS102


@register("fgvc_aircraft")
@dataclass(frozen=True)
class FgvcAircraft(FileSet):
    """FGVC-Aircraft: 6,667 + 3,333 photos of 100 variants of aircraft."""

    templates = ("a photo of a {}, a type of aircraft.",)
    title = "FGVC-Aircraft"
    reader = "FGVCAircraft"
    layout = ("fgvc-aircraft-2013b/data",)
    train_parts = ({"split": "trainval"},)


@register("food101")
@dataclass(frozen=True)
class Food101(FileSet):
    """Food-101: 75,750 + 25,250 photos of 101 dishes."""

    templates = ("a photo of {}, a type of food.",)
    title = "Food-101"
    reader = "Food101"
    layout = ("food-101/images", "food-101/meta")


@register("dtd")
@dataclass(frozen=True)
class Dtd(FileSet):
    """Describable Textures: 3,760 + 1,880 photos of 47 textures, the first of the ten official partitions."""

    templates = ("a photo of a {} texture.",)
    title = "DTD"
    reader = "DTD"
    layout = ("dtd/dtd/images", "dtd/dtd/labels")
    train_parts = (SPLIT_TRAIN, SPLIT_VAL)


@register("stanford_cars")
@dataclass(frozen=True)
class StanfordCars(FileSet):
    """Stanford Cars: 8,144 + 8,041 photos of 196 models of car."""

    title = "Stanford Cars"
    reader = "StanfordCars"
    layout = tuple(
        f"stanford_cars/{name}"
        for name in (
            *("cars_train", "cars_test", "cars_test_annos_withlabels.mat"),
            *("devkit/cars_train_annos.mat", "devkit/cars_meta.mat"),
        )
    )
    by_hand = "its site is gone: https://github.com/pytorch/vision/issues/7545 says where copies of these files are"
    needs_scipy = True
    samples = "_samples"


@register("country211")
@dataclass(frozen=True)
class Country211(FileSet):
    """Country211: 42,200 + 21,100 photos taken in 211 countries."""

    templates = ("a photo i took in {}.",)
    title = "Country211"
    reader = "Country211"
    layout = ("country211/train", "country211/valid", "country211/test")
    train_parts = (SPLIT_TRAIN, {"split": "valid"})
    samples = "samples"
    renamed = COUNTRY211


@register("rendered_sst2")
@dataclass(frozen=True)
class RenderedSst2(FileSet):
    """Rendered SST2: 7,792 + 1,821 pictures of sentences from film reviews, negative or positive."""

    templates = ("a {} review of a movie.",)
    title = "Rendered SST2"
    reader = "RenderedSST2"
    layout = ("rendered-sst2/train", "rendered-sst2/valid", "rendered-sst2/test")
    train_parts = (SPLIT_TRAIN, SPLIT_VAL)
    samples = "_samples"
