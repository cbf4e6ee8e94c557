"""Importing this module registers every component that the package ships."""

from flora.clip import adapters
from flora.data import augmentation, digits, folders, glyphs, partition, torchvision_sets
from flora.federated import aggregation, objectives, optimizers, sampling

__all__ = [
    "adapters",
    "aggregation",
    "augmentation",
    "digits",
    "folders",
    "glyphs",
    "objectives",
    "optimizers",
    "partition",
    "sampling",
    "torchvision_sets",
]
