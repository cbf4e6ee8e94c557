"""Penalties on each client's loss that keep the adapted model near the frozen one."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.client.objectives import masked_mean
from flora.core.registry import Component, option, register


class StepView(NamedTuple):
    """What K clients make of a step's batch: unit features, but for the rows of a linear head.

    `images` `(K, B, d)` and `classes` `(K, C, d)` are with adapters, `frozen_images` `(K, B, d)` and `frozen_classes`
    `(C, d)` without. `example_mask` `(K, B)` is True for real examples.
    """

    images: Tensor
    classes: Tensor
    frozen_images: Tensor
    frozen_classes: Tensor
    example_mask: Tensor
    logit_scale: Tensor


@dataclass(frozen=True)
class Penalty(Component):
    """What is added to each client's loss."""

    is_idle: ClassVar[bool] = False

    @abstractmethod
    def loss(self, seen: StepView) -> Tensor:
        """Each client's penalty, `(K,)`."""


@register("none")
@dataclass(frozen=True)
class NoPenalty(Penalty):
    """The loss as it is."""

    is_idle = True

    def loss(self, seen: StepView) -> Tensor:
        return torch.zeros(len(seen.images), device=seen.images.device)


@register("anchor")
@dataclass(frozen=True)
class Anchor(Penalty):
    """weight * mean over classes of 1 - cos(t_c, t_c^0): class features stay near the frozen ones.

    Source: KgCoOp, arXiv:2303.13283, equation 4. Differs from the paper: there it is the squared distance, which for
    unit vectors is twice this.
    """

    weight: float = option("weight beside the objective", 1.0, above=0)

    def loss(self, seen: StepView) -> Tensor:
        return self.weight * (1 - F.cosine_similarity(seen.classes, seen.frozen_classes, dim=-1)).mean(dim=-1)


@register("distillation")
@dataclass(frozen=True)
class Distillation(Penalty):
    """weight * T^2 * KL(frozen model's probabilities || adapted one's), both at temperature T (arXiv:1503.02531)."""

    weight: float = option("weight beside the objective", 1.0, above=0)
    temperature: float = option("what logits are divided by: higher looks at all classes", 2.0, above=0)

    def loss(self, seen: StepView) -> Tensor:
        own = seen.logit_scale * torch.bmm(seen.images, seen.classes.transpose(1, 2))
        frozen = seen.logit_scale * seen.frozen_images @ seen.frozen_classes.T
        return self.weight * divergence(own, frozen, seen.example_mask, self.temperature)


def divergence(own: Tensor, other: Tensor, example_mask: Tensor, temperature: float) -> Tensor:
    """Each client's mean of T^2 KL(other's probabilities || own ones), `(K,)`, from logits `(K, B, C)`."""
    own, other = ((logits / temperature).log_softmax(dim=-1) for logits in (own, other))
    each = F.kl_div(own, other, reduction="none", log_target=True).sum(dim=-1)
    return temperature**2 * masked_mean(each, example_mask)
