"""Features that are computed whenever they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flora.clip.towers.towers import AdaptedClip
from flora.core.progress import Progress
from flora.core.rng import Rng
from flora.data.augmentation import Augmentation
from flora.data.datasets.base import Split
from flora.data.rgb import to_rgb
from flora.data.value_range import UNREADABLE
from flora.features.features import Features, chosen_digests
from flora.features.reading import (
    as_rows,
    check_some_are_left,
    in_threads,
    reading_pool,
    refusal,
    stem_batch_size,
    unreadable,
)


@dataclass(frozen=True, eq=False)
class LiveFeatures(Features):
    """Features that are computed whenever they are asked for: of images that are augmented, or for comparison."""

    split: Split
    model: AdaptedClip
    augmentation: Augmentation
    labels: Tensor
    split_indices: np.ndarray
    digests: np.ndarray | None = None

    @property
    def runs_stem(self) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def take(self, indices: Tensor, device: torch.device, rngs: Iterable[Rng] | None = None) -> Tensor:
        """Raises `UserError` naming an image that can't be read any more."""
        places = self.split_indices[indices.numpy()]
        streams: list[Rng | None] = [None] * len(places)
        if rngs is not None:
            clients = list(rngs)
            streams = [rng.child("image", number) for rng in clients for number in range(len(places) // len(clients))]

        def pixels(place: int, stream: Rng | None) -> Tensor:
            try:
                image = to_rgb(self.split.open(place))
            except UNREADABLE as error:
                raise refusal([unreadable(self.split.name(place), error)]) from None
            if stream is not None:
                image = self.augmentation.apply(image, self.model.clip.architecture.image_size, stream)
            return self.model.clip.preprocess(image)

        size, stems = stem_batch_size(self.model), []
        with reading_pool() as pool:
            for start in range(0, len(places), size):
                part = slice(start, start + size)
                decoded = list(pool.map(pixels, places[part].tolist(), streams[part]))
                stems.append(self.model.vision.stem(torch.stack(decoded).to(self.model.device)))
        return torch.cat(stems).to(device)

    def subset(self, indices: np.ndarray) -> LiveFeatures:
        labels, digests = self.labels[torch.from_numpy(indices)], chosen_digests(self.digests, indices)
        return replace(self, labels=labels, split_indices=self.split_indices[indices], digests=digests, views={})


def live_features(
    split: Split,
    model: AdaptedClip,
    augmentation: Augmentation,
    *,
    skip_unreadable: bool,
    progress: Progress,
) -> tuple[LiveFeatures, list[str]]:
    """Features of a split that are computed at each use, and a line for each image that can't be read.

    All images are read once, for their digests, and with `skip_unreadable` decoded, to find what to leave out. Raises
    `UserError` if one can't be read otherwise, or none can.
    """

    def look(place: int) -> bytes | str:
        try:
            if skip_unreadable:
                to_rgb(split.open(place))
            return split.source.digest(int(split.source_indices[place]))
        except UNREADABLE as error:
            return unreadable(split.name(place), error)

    digests_or_problems = in_threads(look, range(len(split)), progress("checking images", len(split)))
    problems = [each for each in digests_or_problems if isinstance(each, str)]
    if problems and not skip_unreadable:
        raise refusal(problems)
    readable = np.flatnonzero([isinstance(each, bytes) for each in digests_or_problems])
    check_some_are_left(len(readable), len(split), problems)
    digests = as_rows([each for each in digests_or_problems if isinstance(each, bytes)])
    labels = torch.from_numpy(split.labels[readable])
    return LiveFeatures(split, model, augmentation, labels, readable, digests), problems
