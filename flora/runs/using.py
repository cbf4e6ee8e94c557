"""Use the model of a finished run: on the images of its own evaluation or others, with its classes or new ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flora.clip.prediction import Prediction
from flora.clip.towers.towers import AdaptedClip
from flora.core import tree
from flora.core.devices import choose_device
from flora.core.errors import UserError
from flora.core.progress import Progress
from flora.core.registry import name_of
from flora.core.rng import Rng
from flora.core.tree import State
from flora.data.augmentation import NoAugmentation
from flora.data.datasets.base import ImageFiles, ImageSource, Split
from flora.data.datasets.walk import image_paths
from flora.data.value_range import EightBitSource, ValueRange
from flora.experiment.prepared import adapted_models
from flora.features.features import Features
from flora.features.live import LiveFeatures, live_features
from flora.runs.finished import Classes, FinishedRun


@dataclass(frozen=True, eq=False)
class AdaptedRun:
    """A finished run's model, ready to answer: `models` are those of its classes and, if there are any, of new ones.

    `stack` is the adapter `(1, ...)`, the server's or a client's own.
    """

    run: FinishedRun
    models: Sequence[AdaptedClip]
    stack: State

    @property
    def prediction(self) -> Prediction:
        """How the run predicts classes."""
        return self.run.config.evaluation.prediction

    @property
    def batch_size(self) -> int:
        """Images through the trained part of a tower at once."""
        return self.run.config.evaluation.batch_size


def adapted_run(run: FinishedRun, classes: Classes, client: str | None = None) -> AdaptedRun:
    """Load a run's backbone and put its adapter into it, with the prompts of `classes`, which may be new to it.

    Raises `UserError` if no round was trained, if the adapter knows its own classes only and these are others, and as
    `FinishedRun.adapter_of` does.
    """
    config = run.config
    if not run.num_rounds:
        raise UserError(f"{run.path}: this run has no rounds: its adapter is as it began, and there is nothing to use")
    if config.adapter.knows_classes and classes.names != run.classes().names:
        raise UserError(
            f"{run.path}: its adapter ({name_of(config.adapter)}) has weights for each of its "
            f"{len(run.classes().names)} classes, and none for others"
        )
    clip = run.load_backbone(choose_device(config.device), config.backbone.precision)
    models = adapted_models(config, clip, (classes.names, classes.new_names), classes.descriptions)
    run.check_fits(models[0].initial_adapter(Rng(0)))
    adapter = run.adapter_of(client, models[0].adapter)
    return AdaptedRun(run, models, tree.expand(adapter, 1))


@dataclass(frozen=True, eq=False)
class _Rounded(LiveFeatures):
    """Features that are rounded as those are that `cache.storage` keeps."""

    storage: torch.dtype | None = None

    def take(self, indices: Tensor, device: torch.device, rngs: object = None) -> Tensor:
        stem = super().take(indices, device)
        return stem if self.storage is None else stem.to(self.storage).to(stem.dtype)


def features_of_files(
    adapted: AdaptedRun, paths: Sequence[Path], *, progress: Progress, log: Callable[[str], object]
) -> Features:
    """Features of image files, computed when they are asked for; example i is `paths[split_indices[i]]`.

    Images of more than 8 bits are scaled as the run's were. Raises `UserError` for one that can't be read, or with
    `data.unreadable: skip` logs it and leaves it out.
    """
    config, model = adapted.run.config, adapted.models[0]
    source: ImageSource = ImageFiles(paths)
    limits = config.data.value_range or adapted.run.value_range
    if limits is not None:
        source = EightBitSource(source, ValueRange(limits[0], limits[1]))
    every = np.arange(len(paths))
    live, problems = live_features(
        Split(source, every, np.zeros(len(paths), dtype=np.int64)),
        model,
        NoAugmentation(),
        skip_unreadable=config.data.skips_unreadable,
        progress=progress,
    )
    for line in problems:
        log(f"left out: {line}")
    return _Rounded(
        live.split,
        model,
        live.augmentation,
        live.labels,
        live.split_indices,
        live.digests,
        storage=config.cache.dtype,
    )


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The images that paths name: files as they are, folders by all images anywhere below them, sorted.

    Raises `UserError` for a path that isn't there, or a folder without images.
    """
    images: list[Path] = []
    for path in paths:
        try:
            images_of_path = image_paths(path) if path.is_dir() else [path] if os.path.exists(path) else []
        except OSError as error:
            raise UserError(f"{path}: can't be read: {error.strerror or error}") from None
        if not images_of_path:
            raise UserError(
                f"{path}: no images below this folder" if path.is_dir() else f"{path}: no such file or folder"
            )
        images += images_of_path
    return images
