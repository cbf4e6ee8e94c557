"""The output of the frozen stem for a split's images, wherever it comes from; and where it was computed before."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from flora.core.rng import Rng


@dataclass(frozen=True, eq=False, kw_only=True)
class _Shared:
    """The fields that all kinds of features have: see `Features`."""

    views: Mapping[str, Features] = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)


class Features(_Shared, ABC):
    """Stem outputs and labels of a split's readable examples, whether they were computed before or are computed now.

    Example i of the N has label `labels[i]` (on the CPU) and is example `split_indices[i]` of the split. `digests`
    `(N, 16)` uint8 are those of the images as they are stored, if they are known. `views` are features of the same
    examples that are changed at random in other ways, by name, for images without labels. `targets` are tensors
    `(N, ...)`, on the CPU, that a step's batch has under the same names, for the examples that it sees.
    """

    labels: Tensor
    split_indices: np.ndarray
    digests: np.ndarray | None
    is_constant: ClassVar[bool] = False
    """Whether an example's stem output is known, and the same at each look."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def runs_stem(self) -> bool:
        """Whether images go through the stem at each use, of these features or of a view of theirs."""
        return any(view.runs_stem for view in self.views.values())

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that the indices of `take` have to be on."""

    @abstractmethod
    def take(self, indices: Tensor, device: torch.device, rngs: Iterable[Rng] | None = None) -> Tensor:
        """Stem outputs `(n, ...)` of the examples at `indices` `(n,)`, on `device`.

        `rngs`, one a client and step, say that this is for training: where images are augmented, that is drawn from
        them, and `indices` are client-major.
        """

    @abstractmethod
    def subset(self, indices: np.ndarray) -> Features:
        """The examples at `indices` `(n,)`, in that order; what is large is shared."""

    def with_labels(self, labels: Tensor) -> Features:
        """The same examples with other labels `(N,)`, on the CPU."""
        return replace(self, labels=labels)  # type: ignore[call-arg]


@dataclass(frozen=True, eq=False)
class StoredFeatures(Features):
    """Features that were computed before: example i has row `rows[i]` of `stem`.

    `computed_as` is the type in which the stem gave them, where they are kept in another.
    """

    is_constant: ClassVar[bool] = True
    stem: Tensor
    rows: Tensor
    labels: Tensor
    split_indices: np.ndarray
    digests: np.ndarray | None = None
    computed_as: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        return self.stem.device

    def take(self, indices: Tensor, device: torch.device, rngs: Iterable[Rng] | None = None) -> Tensor:
        stem = self.stem.index_select(0, self.rows[indices])
        return stem.to(device).to(self.computed_as or self.stem.dtype)

    def subset(self, indices: np.ndarray) -> StoredFeatures:
        chosen = torch.from_numpy(indices)
        return StoredFeatures(
            self.stem,
            self.rows[chosen.to(self.device)],
            self.labels[chosen],
            self.split_indices[indices],
            chosen_digests(self.digests, indices),
            computed_as=self.computed_as,
        )

    def with_labels(self, labels: Tensor) -> StoredFeatures:
        return replace(self, labels=labels)


def chosen_digests(digests: np.ndarray | None, indices: np.ndarray) -> np.ndarray | None:
    """The rows of `digests` `(N, 16)` at `indices`, if there are any."""
    return None if digests is None else digests[indices]


def images_digest(features: Sequence[Features]) -> str:
    """A SHA-256 of the images that the features are of, of which split they are, and in which order."""
    digest = hashlib.sha256()
    for each in features:
        assert each.digests is not None
        digest.update(repr(len(each)).encode() + each.split_indices.tobytes() + each.digests.tobytes())
    return digest.hexdigest()
