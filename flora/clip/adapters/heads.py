"""Classifiers in place of the classes' text features, on the frozen model's images or on a vision tower that learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.clip.adapters.base import AttachedAdapter
from flora.clip.adapters.full import AttachedFull
from flora.clip.adapters.outside import AttachedOutside, FitsEveryModel
from flora.clip.frozen import FrozenClip
from flora.core.registry import option, register
from flora.core.rng import Rng
from flora.core.tree import State, StateLike


@dataclass(frozen=True)
class Head(FitsEveryModel):
    """A classifier on the frozen image features: it has weights for each class, and changes no image's features."""

    @property
    def knows_classes(self) -> bool:
        return True

    @property
    def changes_images(self) -> bool:
        return False


@register("linear_head")
@dataclass(frozen=True)
class LinearHead(Head):
    """A linear classifier on the frozen image features that starts as the zero-shot one (FedLC, arXiv:2404.15182)."""

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedHead(clip)


class AttachedHead(AttachedOutside):
    """Its state dict is `head.weight` `(C, embed_dim)`; its rows stand for the classes' text features."""

    is_linear = True

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        return {"head.weight": _head(class_features)}

    def adapt_classes(self, features: Tensor) -> Tensor:
        return features if self.stack is None else self.stack["head.weight"]

    def products(self, images: Tensor, classes: Tensor) -> Tensor:
        return self.linear(images, "head")


@register("taskres")
@dataclass(frozen=True)
class TaskRes(Head):
    """t_c + alpha x_c in place of a class's feature t_c, normalised, with a learned x_c that starts at zero.

    Source: TaskRes, arXiv:2211.10277, where alpha is 0.5, for Flowers-102 1. Differs from the released code: t_c is of
    unit length, where that takes the mean of the text tower's outputs as long as they are, so that an x_c turns a class
    by more here.
    """

    alpha: float = option("what the learned residuals are multiplied with", 0.5, above=0)

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedTaskRes(self, clip)


class AttachedTaskRes(AttachedOutside):
    """Its state dict is `head.difference` `(C, embed_dim)`, the x_c."""

    def __init__(self, options: TaskRes, clip: FrozenClip) -> None:
        super().__init__(clip)
        self._alpha = options.alpha

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        return {"head.difference": torch.zeros_like(_head(class_features))}

    def adapt_classes(self, features: Tensor) -> Tensor:
        if self.stack is None:
            return features
        return F.normalize(features + self._alpha * self.stack["head.difference"], dim=-1)


@register("lp_plus_plus")
@dataclass(frozen=True)
class LpPlusPlus(Head):
    """Logits s f (w_c + alpha_c t_c): a learned row for each class, and how much its text feature t_c counts.

    Source: LP++, arXiv:2404.02285. Differs from the paper: s, the model's logit scale, is 1 there; w_c starts at zero
    and alpha_c at a number that is given, where the paper computes both from the features of all images, which clients
    do not share; and both are trained by the local optimizer at its rate, where the paper derives a step size for each
    from these features. The released code has a learned bias for each class, too, and a step of alpha after every ten
    of w, along the sum of all its gradients so far.
    """

    alpha: float = option("how much the text features count at first; 1: as in the zero-shot classifier", 1.0, above=0)

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedLpPlusPlus(self, clip)


class AttachedLpPlusPlus(AttachedOutside):
    """Its state dict is `head.weight` `(C, embed_dim)`, the w_c, and `head.alpha` `(C,)`."""

    def __init__(self, options: LpPlusPlus, clip: FrozenClip) -> None:
        super().__init__(clip)
        self._alpha = options.alpha

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        weight = torch.zeros_like(_head(class_features))
        return {"head.weight": weight, "head.alpha": torch.full(weight.shape[:1], self._alpha, dtype=weight.dtype)}

    def adapt_classes(self, features: Tensor) -> Tensor:
        if self.stack is None:
            return features
        return self.stack["head.weight"] + self.stack["head.alpha"].unsqueeze(-1) * features


@register("vision_and_head")
@dataclass(frozen=True)
class VisionAndHead(FitsEveryModel):
    """A linear classifier as `linear_head`, and every weight of the vision tower (FedVM-LC, arXiv:2404.15182)."""

    @property
    def knows_classes(self) -> bool:
        return True

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedVisionAndHead(clip)


class AttachedVisionAndHead(AttachedFull):
    """Its state dict is `head.weight` `(C, embed_dim)` and the vision tower's parameters under OpenCLIP's names."""

    mergeable = False

    def __init__(self, clip: FrozenClip) -> None:
        super().__init__(clip, below="visual.")
        self.trained_from = {"vision": 0, "text": 2 + clip.architecture.text.num_layers}
        self._head: Tensor | None = None

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        return {"head.weight": _head(class_features), **super().initial_state(rng, class_features)}

    @contextmanager
    def bind(self, stack: StateLike, generators: Sequence[torch.Generator] | None = None) -> Iterator[None]:
        self._head = stack["head.weight"]
        try:
            with super().bind(stack, generators):
                yield
        finally:
            self._head = None

    def adapt_classes(self, features: Tensor) -> Tensor:
        return features if self._head is None else self._head


def _head(class_features: Tensor | None) -> Tensor:
    if class_features is None:
        raise ValueError("a head starts from the classes' text features")
    return class_features.cpu().clone()
