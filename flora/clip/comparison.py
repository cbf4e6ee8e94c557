"""How images and classes become logits: what is read of both towers, and what is made of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Comparison(ABC):
    """Similarities of images and classes; times the model's scale they are its logits.

    It is a function of features alone, so that whoever has these needs no adapter. An adapter that has one other than
    `COSINES` is compared so wherever it is bound; the frozen model is compared by cosines.
    """

    reads_patches: ClassVar[bool] = False
    """Whether an image is its patches' features `(K, B, M, d)`, not one `(K, B, d)`."""
    reads_prompts: ClassVar[bool] = False
    """Whether a class is each of its T prompts' features `(K, C, T, d)`, not their mean `(K, C, d)`."""
    by_image: ClassVar[bool] = False
    """Whether each image has class features of its own, `(K, B, C, d)`: see `AttachedAdapter.for_images`."""

    @abstractmethod
    def similarities(self, images: Tensor, classes: Tensor) -> Tensor:
        """The similarities `(K, B, C)` of unit features in these shapes."""

    def means(self, classes: Tensor) -> Tensor:
        """One unit feature for each class, `(K, C, d)`, where none depends on an image."""
        return F.normalize(classes.mean(dim=2), dim=-1) if self.reads_prompts else classes


@dataclass(frozen=True)
class Cosines(Comparison):
    """The cosine of an image's feature and a class's, as CLIP does it."""

    def similarities(self, images: Tensor, classes: Tensor) -> Tensor:
        return torch.bmm(images, classes.transpose(1, 2))


@dataclass(frozen=True)
class CosinesByImage(Comparison):
    """The cosine of an image's feature and a class's, of which each image has its own."""

    by_image: ClassVar[bool] = True

    def similarities(self, images: Tensor, classes: Tensor) -> Tensor:
        return torch.einsum("kbd,kbcd->kbc", images, classes)


COSINES = Cosines()
