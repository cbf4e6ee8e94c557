"""Features of several runs one after the other, so that clients of all of them can share a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from flora.core.rng import Rng
from flora.features.features import Features, StoredFeatures


@dataclass(frozen=True, eq=False)
class JoinedFeatures(Features):
    """The examples of several `parts`, one part after the other; part p's first one is example `starts[p]`."""

    is_constant: ClassVar[bool] = True
    parts: tuple[StoredFeatures, ...]
    starts: tuple[int, ...]
    labels: Tensor
    split_indices: np.ndarray
    digests: np.ndarray | None = None

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def take(self, indices: Tensor, device: torch.device, rngs: Iterable[Rng] | None = None) -> Tensor:
        inner = torch.tensor(self.starts[1:], device=indices.device)
        part_of = torch.bucketize(indices, inner, right=True)
        stacked: Tensor | None = None
        for number in part_of.unique().tolist():
            places = torch.nonzero(part_of == number).squeeze(1)
            rows = self.parts[number].take(indices[places] - self.starts[number], device, rngs)
            if len(places) == len(indices):
                return rows
            if stacked is None:
                stacked = rows.new_empty((len(indices), *rows.shape[1:]))
            stacked[places.to(device)] = rows
        assert stacked is not None
        return stacked

    def subset(self, indices: np.ndarray) -> Features:
        raise NotImplementedError("what is joined for training is not cut again")


def can_be_joined(features: Features) -> bool:
    """Whether `joined` takes features: those that were computed before, with nothing beside them."""
    return isinstance(features, StoredFeatures) and not features.views and not features.targets


def joined(parts: Sequence[Features]) -> tuple[Features, list[int]]:
    """Features of all examples of `parts`, and the place at which each part's first one is among them.

    A part that is there twice is taken once.
    """
    known: dict[int, StoredFeatures] = {}
    for part in parts:
        assert isinstance(part, StoredFeatures) and can_be_joined(part)
        known[id(part)] = part
    distinct = tuple(known.values())
    starts = np.concatenate([[0], np.cumsum([len(part) for part in distinct])[:-1]]).tolist()
    start_of = dict(zip(known, starts, strict=True))
    places = [start_of[id(part)] for part in parts]
    if len(distinct) == 1:
        return distinct[0], places
    labels = torch.cat([part.labels for part in distinct])
    split_indices = np.concatenate([part.split_indices for part in distinct])
    return JoinedFeatures(distinct, tuple(starts), labels, split_indices), places
