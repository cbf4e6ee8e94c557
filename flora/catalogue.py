"""Importing this module registers every component that the package ships."""

from flora.clip import adapters, baselines
from flora.data import augmentation, digits, folders, glyphs, partition, splits, tiny_imagenet, torchvision_sets
from flora.federated import aggregation, objectives, optimizers, sampling

__all__ = [
    "adapters",
    "aggregation",
    "augmentation",
    "baselines",
    "digits",
    "folders",
    "glyphs",
    "objectives",
    "optimizers",
    "partition",
    "sampling",
    "splits",
    "tiny_imagenet",
    "torchvision_sets",
]
