"""Penalties on each client's loss that keep the adapted model near the frozen one."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.clip.loss_terms import StepView, divergence
from flora.core.registry import Component, option, register


@dataclass(frozen=True)
class Penalty(Component):
    """What is added to each client's loss: a term that compares with the frozen model."""

    is_idle: ClassVar[bool] = False
    in_batch: ClassVar[bool] = False
    needs_frozen: ClassVar[bool] = True
    is_by_example: ClassVar[bool] = False
    """Whether it is a mean over examples, or the same for each, so that one example alone has a penalty, too."""
    from_logits: ClassVar[bool] = False
    """Whether it looks at logits alone, in whatever way these come about, and at no features."""

    @abstractmethod
    def loss(self, view: StepView) -> Tensor:
        """Each client's penalty, `(K,)`."""


@register("none")
@dataclass(frozen=True)
class NoPenalty(Penalty):
    """The loss as it is."""

    is_idle = True
    is_by_example = True
    from_logits = True

    def loss(self, view: StepView) -> Tensor:
        return torch.zeros(len(view.images), device=view.images.device)


@register("anchor")
@dataclass(frozen=True)
class Anchor(Penalty):
    """weight * mean over classes of 1 - cos(t_c, t_c^0): class features stay near the frozen ones.

    Source: KgCoOp, arXiv:2303.13283, equation 4. Differs from the paper: there it is the squared distance, which for
    unit vectors is twice this.
    """

    is_by_example = True
    weight: float = option("weight beside the objective", 1.0, above=0)

    def loss(self, view: StepView) -> Tensor:
        assert view.frozen_classes is not None
        return self.weight * (1 - F.cosine_similarity(view.classes, view.frozen_classes, dim=-1)).mean(dim=-1)


@register("distillation")
@dataclass(frozen=True)
class Distillation(Penalty):
    """weight * T^2 * KL(frozen model's probabilities || adapted one's), both at temperature T (arXiv:1503.02531)."""

    is_by_example = True
    from_logits = True
    weight: float = option("weight beside the objective", 1.0, above=0)
    temperature: float = option("what logits are divided by: higher looks at all classes", 2.0, above=0)

    def loss(self, view: StepView) -> Tensor:
        assert view.frozen_images is not None and view.frozen_classes is not None
        frozen = view.logit_scale * view.frozen_images @ view.frozen_classes.mT
        return self.weight * view.mean(divergence(view.logits, frozen, self.temperature))


@register("reciprocal_consistency")
@dataclass(frozen=True)
class ReciprocalConsistency(Penalty):
    """weight * T^2 * the mean of two symmetric divergences between the adapted and the frozen model's similarities.

    One is over the classes for each image, the other over the batch's images for each class, each KL(p || q) +
    KL(q || p), halved, of similarities at temperature T; both are means, over images and over classes.

    Source: the reciprocal semantic consistency of UniDiff, arXiv:2306.00813. Differs from the paper: there it is
    between CLIP's and a diffusion model's image features; here between the adapted and the frozen model's similarities.
    """

    from_logits = True
    weight: float = option("weight beside the objective", 1.0, above=0)
    temperature: float = option("what logits are divided by: higher looks at all classes and images", 2.0, above=0)

    def loss(self, view: StepView) -> Tensor:
        assert view.frozen_images is not None and view.frozen_classes is not None
        frozen = view.logit_scale * view.frozen_images @ view.frozen_classes.mT
        adapted, frozen = view.logits / self.temperature, frozen / self.temperature
        of_images = _symmetric_divergence(adapted, frozen)
        # A finite number: minus infinity on both sides would give NaN.
        lowest, is_padding = torch.finfo(adapted.dtype).min / 2, ~view.example_mask.unsqueeze(1)
        to_images = (each.transpose(1, 2).masked_fill(is_padding, lowest) for each in (adapted, frozen))
        of_classes = _symmetric_divergence(*to_images)
        both = view.mean(of_images) + of_classes.mean(dim=-1)
        return self.weight * self.temperature**2 * both / 2


def _symmetric_divergence(one: Tensor, other: Tensor) -> Tensor:
    """Half of KL(p || q) + KL(q || p) along the last axis, of the probabilities of two logits `(K, N, C)`: `(K, N)`."""
    log_p, log_q = one.log_softmax(dim=-1), other.log_softmax(dim=-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1) / 2
