"""Importing this module registers every component that the package ships."""

from flora.clip import adapters, baselines
from flora.data import augmentation, digits, folders, glyphs, partition, tiny_imagenet, torchvision_sets
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
    "tiny_imagenet",
    "torchvision_sets",
]
