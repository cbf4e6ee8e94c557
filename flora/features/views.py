"""Features of images that change at random, of which some views were kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flora.core.memory import available_memory_bytes
from flora.core.rng import Rng
from flora.features.features import Features, StoredFeatures
from flora.features.live import LiveFeatures


@dataclass(frozen=True, eq=False)
class ViewFeatures(Features):
    """Stored features of N images, and of V random views of each: which one training sees is drawn at each look.

    `stored_views` has those of image i at places i * V to i * V + V - 1.
    """

    images: StoredFeatures
    stored_views: StoredFeatures
    num_views: int

    @property
    def labels(self) -> Tensor:  # type: ignore[override]
        return self.images.labels

    @property
    def split_indices(self) -> np.ndarray:  # type: ignore[override]
        return self.images.split_indices

    @property
    def digests(self) -> np.ndarray | None:  # type: ignore[override]
        return self.images.digests

    @property
    def device(self) -> torch.device:
        return self.images.device

    def take(self, indices: Tensor, device: torch.device, rngs: Iterable[Rng] | None = None) -> Tensor:
        if rngs is None:
            return self.images.take(indices, device)
        streams = list(rngs)
        drawn = [rng.numpy().integers(self.num_views, size=len(indices) // len(streams)) for rng in streams]
        chosen = indices * self.num_views + torch.from_numpy(np.concatenate(drawn)).to(indices.device)
        return self.stored_views.take(chosen, device)

    def subset(self, indices: np.ndarray) -> Features:
        """The images at `indices`, as they are: what is held out is not changed at random."""
        return self.images.subset(indices)

    def with_labels(self, labels: Tensor) -> Features:
        return replace(self, images=self.images.with_labels(labels))


def move_if_they_fit(features: Sequence[Features], device: torch.device) -> list[Features]:
    """Stored features on `device` if they fit into half of its free memory, else where they are."""
    stems = {id(each.stem): each.stem for whole in features for each in _stored(whole)}
    if device.type == "cpu" or sum(stem.nbytes for stem in stems.values()) > available_memory_bytes(device) // 2:
        return list(features)
    moved = {key: stem.to(device) for key, stem in stems.items()}
    return [_moved(each, moved, device) for each in features]


def _stored(features: Features) -> Iterator[StoredFeatures]:
    """All stored features that these, and their views, consist of."""
    if isinstance(features, StoredFeatures):
        yield features
    elif isinstance(features, ViewFeatures):
        yield from (features.images, features.stored_views)
    for view in features.views.values():
        yield from _stored(view)


def _moved(features: Features, stems: Mapping[int, Tensor], device: torch.device) -> Features:
    """The same features on a device, with the `stems` there in place of those that have their ids."""
    views = {name: _moved(view, stems, device) for name, view in features.views.items()}
    if isinstance(features, ViewFeatures):
        images, own = (_with_stem(each, stems, device) for each in (features.images, features.stored_views))
        return ViewFeatures(images, own, features.num_views, views=views)
    if isinstance(features, StoredFeatures):
        return replace(_with_stem(features, stems, device), views=views)
    assert isinstance(features, LiveFeatures)
    return replace(features, views=views)


def _with_stem(features: StoredFeatures, stems: Mapping[int, Tensor], device: torch.device) -> StoredFeatures:
    return replace(features, stem=stems[id(features.stem)], rows=features.rows.to(device))
