"""Importing this module registers every component that the package ships."""

from flora.clip import adapters, baselines
from flora.data import augmentation, digits, folders, glyphs, partition, splits, tiny_imagenet, torchvision_sets
from flora.federated import (
    aggregation,
    combiners,
    corrections,
    objectives,
    optimizers,
    penalties,
    sampling,
    server_optimizers,
)

__all__ = [
    "adapters",
    "aggregation",
    "augmentation",
    "baselines",
    "combiners",
    "corrections",
    "digits",
    "folders",
    "glyphs",
    "objectives",
    "optimizers",
    "partition",
    "penalties",
    "sampling",
    "server_optimizers",
    "splits",
    "tiny_imagenet",
    "torchvision_sets",
]
