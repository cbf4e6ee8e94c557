"""Importing this module registers every component that the package ships."""

from flora.clip import adapters, baselines, dual
from flora.data import augmentation, digits, folders, glyphs, partition, splits, tiny_imagenet, torchvision_sets
from flora.federated import (
    aggregation,
    combiners,
    compressors,
    corrections,
    network,
    objectives,
    optimizers,
    penalties,
    personal,
    ranks,
    sampling,
    server_optimizers,
)

__all__ = [
    "adapters",
    "aggregation",
    "augmentation",
    "baselines",
    "combiners",
    "compressors",
    "corrections",
    "digits",
    "dual",
    "folders",
    "glyphs",
    "network",
    "objectives",
    "optimizers",
    "partition",
    "penalties",
    "personal",
    "ranks",
    "sampling",
    "server_optimizers",
    "splits",
    "tiny_imagenet",
    "torchvision_sets",
]
