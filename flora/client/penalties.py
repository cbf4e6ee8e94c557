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


@dataclass(frozen=True)
class Guide(Penalty):
    """A penalty that is not added to the loss: its gradient says which part of the loss's gradient is left out."""

    @abstractmethod
    def guided(self, gradients: Tensor, own: Tensor) -> Tensor:
        """Each client's gradient `(K, P)` to go on with, from that of the loss and the penalty's `own`, both `(K, P)`.

        A function of each row alone, without a branch on numbers, so that steps can be recorded.
        """


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

    Source: KgCoOp, arXiv:2303.13283, as its released code has it, where its lambda of 8 is `weight: 8`. Differs from
    the paper: that has the squared distance, which for unit features is twice this, so that its lambda of 8 is
    `weight: 16`. There the frozen features are those of a prompt for each data set; here those of the prompts that the
    adapter reads, which for `prompt_context` have the words that it starts from.
    """

    is_by_example = True
    weight: float = option("weight beside the objective", 1.0, above=0)

    def loss(self, view: StepView) -> Tensor:
        assert view.frozen_classes is not None
        return self.weight * (1 - F.cosine_similarity(view.classes, view.frozen_classes, dim=-1)).mean(dim=-1)


@register("distillation")
@dataclass(frozen=True)
class Distillation(Penalty):
    """weight * T^2 * KL(frozen model's probabilities || adapted one's), both at temperature T (arXiv:1503.02531).

    With a weight and a temperature of 1 it is what the benchmark FLiP (arXiv:2503.22263) runs as ProGrad: its released
    code adds the cross-entropy with the frozen model's probabilities, which has the same gradient. ProGrad itself is
    `prograd`.
    """

    is_by_example = True
    from_logits = True
    weight: float = option("weight beside the objective", 1.0, above=0)
    temperature: float = option("what logits are divided by: higher looks at all classes", 2.0, above=0)

    def loss(self, view: StepView) -> Tensor:
        return self.weight * _from_frozen(view, self.temperature)


@register("prograd")
@dataclass(frozen=True)
class ProGrad(Guide):
    """What goes against KL(frozen model's probabilities || adapted one's) is taken out of the loss's gradient.

    With g the gradient of the loss over all that a client trains and h that of T^2 times the divergence at temperature
    T, a step goes along g - strength (g.h) / (h.h) h where g.h < 0, else along g. Each client and step has its own h.
    The loss that is recorded is without the divergence.

    Source: ProGrad, arXiv:2205.14865. Its released code does this tensor by tensor, which is the same for the one that
    it trains, the context. Differs from the paper: the frozen features are those of the prompts that the adapter
    reads, not of a prompt for each data set; and an h that is shorter than the square root of the precision times g is
    nothing but rounding, as it is in the first step, and takes nothing out.
    """

    from_logits = True
    strength: float = option("share of the opposing component that is taken out, lambda", 1.0, above=0)
    temperature: float = option("what logits are divided by: higher looks at all classes", 1.0, above=0)

    def loss(self, view: StepView) -> Tensor:
        return _from_frozen(view, self.temperature)

    def guided(self, gradients: Tensor, own: Tensor) -> Tensor:
        product, square = (gradients * own).sum(dim=1, keepdim=True), own.square().sum(dim=1, keepdim=True)
        is_rounding = square <= torch.finfo(own.dtype).eps * gradients.square().sum(dim=1, keepdim=True)
        factors = torch.where(is_rounding, 0.0, self.strength * product.clamp(max=0) / square)
        return gradients - factors * own


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


def _from_frozen(view: StepView, temperature: float) -> Tensor:
    """T^2 times the mean divergence of clients' probabilities from the frozen model's, at temperature T: `(K,)`."""
    assert view.frozen_images is not None and view.frozen_classes is not None
    frozen = view.logit_scale * view.frozen_images @ view.frozen_classes.mT
    return view.mean(divergence(view.logits, frozen, temperature))


def _symmetric_divergence(one: Tensor, other: Tensor) -> Tensor:
    """Half of KL(p || q) + KL(q || p) along the last axis, of the probabilities of two logits `(K, N, C)`: `(K, N)`."""
    log_p, log_q = one.log_softmax(dim=-1), other.log_softmax(dim=-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1) / 2
