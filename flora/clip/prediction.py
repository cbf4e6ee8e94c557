"""How an image's class is predicted: by the adapted model alone, or by both it and the frozen one."""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.clip.towers.towers import AdaptedClip
from flora.core.counts import part_of
from flora.core.registry import Component, Options, option, register
from flora.core.tree import StateLike


@dataclass(frozen=True)
class Fusion(Component):
    """How the adapted and the frozen model's logits become one: z = (1 - w) z_adapted + w z_frozen."""

    @property
    def is_idle(self) -> bool:
        """Whether the adapted model answers alone."""
        return False

    @abstractmethod
    def frozen_weight(self, adapted: Tensor, frozen: Tensor) -> Tensor:
        """The weight w of the frozen model for each image, `(K, B)`, from logits `(K, B, C)`."""

    def combine(self, adapted: Tensor, frozen: Tensor) -> Tensor:
        """The logits `(K, B, C)` of both together."""
        weight = self.frozen_weight(adapted, frozen).unsqueeze(-1)
        return (1 - weight) * adapted + weight * frozen


@register("none")
@dataclass(frozen=True)
class NoFusion(Fusion):
    """The adapted model alone (the default)."""

    @property
    def is_idle(self) -> bool:
        return True

    def frozen_weight(self, adapted: Tensor, frozen: Tensor) -> Tensor:
        return adapted.new_zeros(adapted.shape[:-1])


@register("fixed")
@dataclass(frozen=True)
class FixedFusion(Fusion):
    """The same weight for all images: at 0 the adapted model alone, at 1 the frozen one."""

    weight: float = option("weight of the frozen model", 0.5, at_least=0, at_most=1)

    @property
    def is_idle(self) -> bool:
        return self.weight == 0

    def frozen_weight(self, adapted: Tensor, frozen: Tensor) -> Tensor:
        return adapted.new_full(adapted.shape[:-1], self.weight)


@register("entropy")
@dataclass(frozen=True)
class EntropyFusion(Fusion):
    """Whoever is surer of an image weighs more: w = sigma((H(adapted) - H(frozen)) / temperature), H in nats.

    Source: after the adaptive fusion of ADEM-VL, arXiv:2410.17779. Differs from the paper: it fuses two models' logits
    at inference, not images into a language model's layers; nothing is learned or sent.
    """

    temperature: float = option("small: the surer one alone; large: both alike", 1.0, above=0)

    def frozen_weight(self, adapted: Tensor, frozen: Tensor) -> Tensor:
        return torch.sigmoid((_entropy(adapted) - _entropy(frozen)) / self.temperature)


def _entropy(logits: Tensor) -> Tensor:
    """The entropies in nats of the probabilities of logits `(K, B, C)`: `(K, B)`."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


@dataclass(frozen=True)
class PatchAttention(Options):
    """Adds to an image's cosine with a class its patches' cosines: z_c = cos(x, t_c) + alpha * sum_p s_cp m_cp / n.

    s_cp is the cosine of patch p, of n, with the text of class c; m_cp is 0 for the share `dropped` of the patches that
    are least like the class, else 1. Source: the parameter-free attention and its dropping of irrelevant features of
    ADEM-VL, arXiv:2410.17779. Differs from the paper: class texts attend to an image's patches, in the joint space; at
    inference only.
    """

    alpha: float = option("weight of the patches; 0: the image's own cosine alone", 0.5, at_least=0)
    dropped: float = option("share of the patches that a class leaves out", 0.5, at_least=0, below=1)

    def cosines(self, patches: Tensor, classes: Tensor) -> Tensor:
        """What patches `(K, B, P, d)` add to the cosines with classes `(K, C, d)`: `(K, B, C)`."""
        similar = torch.einsum("kbpd,kcd->kbcp", patches, classes)
        number = similar.shape[-1]
        num_kept = number - math.floor(part_of(self.dropped, number))
        return self.alpha * similar.topk(num_kept, dim=-1).values.sum(dim=-1) / number


@dataclass(frozen=True)
class Prediction:
    """How classes are predicted at evaluation: with the frozen model's help, the patches', both or neither."""

    fusion: Fusion = NoFusion()
    patches: PatchAttention | None = None

    def logits(self, model: AdaptedClip, stack: StateLike, stem: Tensor, classes: Tensor) -> Tensor:
        """The logits `(K, B, C)` of stem outputs `(K * B, ...)`, with adapters `(K, ...)` and `classes` `(K, C, d)`.

        The classes' features are with the adapters. Without any it is the frozen model that predicts, K = 1.
        """
        with bound(model, stack):
            adapted = self._logits(model, stem, classes)
        if self.fusion.is_idle or not stack:
            return adapted
        frozen_classes = model.frozen_class_features().expand(len(classes), -1, -1)
        return self.fusion.combine(adapted, self._logits(model, stem, frozen_classes))

    def _logits(self, model: AdaptedClip, stem: Tensor, classes: Tensor) -> Tensor:
        if self.patches is None or not self.patches.alpha:
            return model.logits(stem, classes)
        images, patches = model.image_and_patch_features(stem, len(classes))
        own = model.comparison.similarities(images, classes)
        return model.logit_scale() * (own + self.patches.cosines(patches, classes))


PLAIN = Prediction()
"""The adapted model's own logits."""


def bound(model: AdaptedClip, stack: StateLike) -> AbstractContextManager[object]:
    """A context in which the model computes with adapters `(K, ...)`, if there are any."""
    context: AbstractContextManager[object] = model.adapter.bind(stack) if stack else nullcontext()
    return context
