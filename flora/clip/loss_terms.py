"""What a loss reads of one local step of K clients, and what every term of a loss does with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.clip.comparison import COSINES, Comparison

ImagesAndClasses = tuple[Tensor, Tensor]
"""Features of images `(K, B, embed_dim)` and of classes `(K, C, embed_dim)`."""


@dataclass(frozen=True, eq=False)
class StepView:
    """What a term of the loss sees of K clients' step: unit features, but for the rows of a linear head.

    `images` `(K, B, d)` and `classes` `(K, C, d)` are with adapters; `frozen_images` `(K, B, d)` and `frozen_classes`
    `(C, d)`, or `(K, C, d)` where prompts are drawn, without, where a term has `needs_frozen`. `batch` are the step's
    tensors by name: `labels` `(K, B)` int64, `example_mask` `(K, B)`, True for real examples, of which each client has
    one, and where examples count differently `weights` `(K, B)`. `others` are the features that the clients' other
    models make of the same step, where an adapter stands for several. `more` are features of other images of the step,
    by name, `(K, U, d)`: of those without labels; `frozen_more` the same without adapters. Where `comparison` is not by
    cosines, features with adapters have the shapes that it reads.
    """

    images: Tensor
    classes: Tensor
    logit_scale: Tensor
    batch: Mapping[str, Tensor]
    frozen_images: Tensor | None = None
    frozen_classes: Tensor | None = None
    others: tuple[ImagesAndClasses, ...] = ()
    more: Mapping[str, Tensor] = field(default_factory=dict)
    frozen_more: Mapping[str, Tensor] = field(default_factory=dict)
    comparison: Comparison = COSINES

    @property
    def labels(self) -> Tensor:
        """The examples' classes `(K, B)`, int64."""
        return self.batch["labels"]

    @property
    def example_mask(self) -> Tensor:
        """True for real examples, False for padding, `(K, B)`."""
        return self.batch["example_mask"]

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` `(K, B)` over each client's real examples, each times its weight: `(K,)`."""
        weights = self.batch.get("weights")
        return masked_mean(values if weights is None else values * weights, self.example_mask)

    @property
    def logits(self) -> Tensor:
        """The scaled similarities of images and classes, `(K, B, C)`."""
        return self.logit_scale * self.comparison.similarities(self.images, self.classes)

    def logits_of(self, name: str) -> Tensor:
        """The scaled similarities of the images called `name` and the classes, `(K, U, C)`."""
        return self.logit_scale * self.comparison.similarities(self.more[name], self.classes)

    def frozen_logits_of(self, name: str) -> Tensor:
        """The frozen model's scaled similarities of the images called `name` and the classes, `(K, U, C)`."""
        assert self.frozen_classes is not None
        return self.logit_scale * self.frozen_more[name] @ self.frozen_classes.mT


@dataclass(frozen=True, eq=False)
class LogitsView(StepView):
    """What a loss sees that reads logits alone: those that are `known`, `(K, B, C)`. It has no features."""

    known: Tensor = field(kw_only=True)

    @classmethod
    def of(cls, logits: Tensor, logit_scale: Tensor, batch: Mapping[str, Tensor]) -> LogitsView:
        """Return the view of a step's logits `(K, B, C)` and the tensors of its batch."""
        none = logits.new_empty(0)
        return cls(none, none, logit_scale, batch, known=logits)

    @property
    def logits(self) -> Tensor:
        return self.known


class LossTerm(Protocol):
    """A term of the loss: a number for each client of a step, independent of the others."""

    @property
    def needs_frozen(self) -> bool:
        """Whether it compares with the frozen model's features."""

    @property
    def in_batch(self) -> bool:
        """Whether no class matters to it but those of the batch."""

    def loss(self, view: StepView) -> Tensor:
        """Each client's number, `(K,)`, a mean over its real examples."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean along the last axis of `values` `(K, B)` where `mask` is True, `(K,)`."""
    return torch.where(mask, values, 0.0).sum(dim=-1) / mask.sum(dim=-1)


def divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 KL(target's probabilities || own ones) for each example, `(K, B)`, from logits `(K, B, C)`."""
    own, other = ((each / temperature).log_softmax(dim=-1) for each in (logits, target))
    return temperature**2 * F.kl_div(own, other, reduction="none", log_target=True).sum(dim=-1)
