"""The sixteen data sets of FLoRA's experiments (arXiv:2404.15182): their default prompts."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from torchvision import datasets as tv

from flora.core.registry import components
from flora.data.datasets import tiny_imagenet, torchvision_sets
from flora.data.datasets.base import Dataset
from flora.data.datasets.class_names import CALTECH101, COUNTRY211, EUROSAT, FASHION_MNIST, TINY_IMAGENET
from flora.data.datasets.torchvision_base import TorchvisionSet

# The first of each list in data/prompts.md of github.com/openai/CLIP. That file lacks Fashion-MNIST and Tiny-ImageNet,
# which have the same as CIFAR.
TEMPLATES = {
    "fashion_mnist": "a photo of a {}.",
    "cifar10": "a photo of a {}.",
    "cifar100": "a photo of a {}.",
    "tiny_imagenet": "a photo of a {}.",
    "caltech101": "a photo of a {}.",
    "stanford_cars": "a photo of a {}.",
    "sun397": "a photo of a {}.",
    "oxford_pets": "a photo of a {}, a type of pet.",
    "flowers102": "a photo of a {}, a type of flower.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "food101": "a photo of {}, a type of food.",
    "dtd": "a photo of a {} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "fer2013": "a photo of a {} looking face.",
    "country211": "a photo i took in {}.",
    "rendered_sst2": "a {} review of a movie.",
}


def class_names(name: str, *raw: str) -> tuple[str, ...]:
    """The data set's names for classes that torchvision calls `raw`."""
    dataset = components(Dataset)[name]()
    assert isinstance(dataset, TorchvisionSet)
    return dataset._class_names(SimpleNamespace(classes=raw, categories=raw))


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(name: str) -> None:
    dataset = components(Dataset)[name]
    assert dataset.__module__ in (torchvision_sets.__name__, tiny_imagenet.__name__)
    assert dataset.templates == (TEMPLATES[name],)


def test_there_are_sixteen() -> None:
    assert len(TEMPLATES) == 16


# One of the least readable names of each data set, as its files or torchvision spell it.
@pytest.mark.parametrize(
    ("name", "raw", "prompt"),
    [
        ("fashion_mnist", "T-shirt/top", "a photo of a t-shirt."),
        ("cifar10", "automobile", "a photo of a automobile."),
        ("cifar100", "sweet_pepper", "a photo of a sweet pepper."),
        ("caltech101", "water_lilly", "a photo of a water lily."),
        ("caltech101", "car_side", "a photo of a side of a car."),
        ("stanford_cars", "Ram C/V Cargo Van Minivan 2012", "a photo of a Ram C/V Cargo Van Minivan 2012."),
        ("sun397", "balcony/interior", "a photo of a balcony interior."),
        ("sun397", "theater/indoor_seats", "a photo of a theater indoor seats."),
        ("oxford_pets", "American Pit Bull Terrier", "a photo of a American Pit Bull Terrier, a type of pet."),
        ("flowers102", "pink-yellow dahlia?", "a photo of a pink-yellow dahlia, a type of flower."),
        ("fgvc_aircraft", "F/A-18", "a photo of a F/A-18, a type of aircraft."),
        ("food101", "baby_back_ribs", "a photo of baby back ribs, a type of food."),
        ("dtd", "polka-dotted", "a photo of a polka-dotted texture."),
        ("eurosat", "HerbaceousVegetation", "a centered satellite photo of brushland or shrubland."),
        ("fer2013", "0", "a photo of a angry looking face."),
        ("country211", "XK", "a photo i took in Kosovo."),
        ("rendered_sst2", "negative", "a negative review of a movie."),
    ],
)
def test_names_fit_the_prompts(name: str, raw: str, prompt: str) -> None:
    assert TEMPLATES[name].format(class_names(name, raw)[0]) == prompt


@pytest.mark.parametrize(
    "names",
    [
        class_names("fashion_mnist", *tv.FashionMNIST.classes),
        class_names("flowers102", *tv.Flowers102.classes),
        class_names("fer2013"),
        *(tuple(names.values()) for names in (CALTECH101, COUNTRY211, EUROSAT, TINY_IMAGENET)),
    ],
    ids=("fashion_mnist", "flowers102", "fer2013", "caltech101", "country211", "eurosat", "tiny_imagenet"),
)
def test_names_are_words(names: tuple[str, ...]) -> None:
    assert len(set(names)) == len(names)
    assert not [name for name in names if not re.fullmatch(r"[A-Za-z]+((, |[ '-])[A-Za-z]+)*", name)]


def test_all_of_torchvisions_names_for_clothes_are_replaced() -> None:
    assert set(FASHION_MNIST) == set(tv.FashionMNIST.classes)
