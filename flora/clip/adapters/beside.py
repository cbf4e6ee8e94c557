"""Adapters beside the towers: heads, feature adapters, norms (the rivals of arXiv:2404.15182).

All but `norm` see nothing but final features, so a step costs next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora.clip.adapters.base import TOWERS, Adapter, AttachedAdapter
from flora.clip.adapters.full import AttachedFull
from flora.clip.frozen import Architecture, FrozenClip
from flora.core.registry import OptionError, option, register
from flora.core.rng import Rng
from flora.core.tree import State, StateLike


@dataclass(frozen=True, eq=False)
class LinearUse:
    """One use of a linear layer: what went in, `(K, B, d_in)`, without a gradient, and what came out, with one.

    The gradient of an example's loss by the layer's weight is the outer product of those by what came out,
    `(K, B, d_out)`, and of what went in, so that its norm is the product of theirs.
    """

    layer: str
    inputs: Tensor
    outputs: Tensor


class AttachedBeside(AttachedAdapter):
    """An adapter outside of the frozen model: `stack` is its tensors `(K, ...)` while they are bound, else None.

    `uses` are the uses of its linear layers so far, while they are noted down.
    """

    uses: list[LinearUse] | None = None
    mergeable = False

    def __init__(self, clip: FrozenClip) -> None:
        self.dtype = clip.dtype
        self.trained_from = {tower: 2 + clip.architecture.tower(tower).num_layers for tower in TOWERS}

    @contextmanager
    def bind(self, stack: StateLike, generators: Sequence[torch.Generator] | None = None) -> Iterator[None]:
        before, self.stack = self.stack, stack
        try:
            yield
        finally:
            self.stack = before

    @contextmanager
    def traced(self) -> Iterator[list[LinearUse]]:
        """A context that notes down the uses of linear layers. Bind the adapter's tensors without gradients."""
        uses: list[LinearUse] = []
        self.uses = uses
        try:
            yield uses
        finally:
            self.uses = None

    def linear(self, x: Tensor, layer: str) -> Tensor:
        """Each client's linear layer on its own rows: `x` `(K, B, d_in)` to `(K, B, d_out)`. A stack is bound."""
        assert self.stack is not None
        outputs = linear(x, self.stack, layer)
        if self.uses is not None:
            outputs = outputs if outputs.requires_grad else outputs.requires_grad_()
            self.uses.append(LinearUse(layer, x.detach(), outputs))
        return outputs

    def products(self, images: Tensor, classes: Tensor) -> Tensor:
        """The products `(K, B, C)` of features of images `(K, B, d)` and of classes `(K, C, d)`."""
        return torch.bmm(images, classes.transpose(1, 2))

    def merged_state_dict(self, state_dict: StateLike, adapter: StateLike) -> State:
        raise NotImplementedError


@dataclass(frozen=True)
class FitsEveryModel(Adapter):
    """An adapter without options that a model could contradict."""

    def check_fits(self, architecture: Architecture) -> None:
        """It fits every model."""


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


class AttachedHead(AttachedBeside):
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


class AttachedTaskRes(AttachedBeside):
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
    of w.
    """

    alpha: float = option("how much the text features count at first; 1: as in the zero-shot classifier", 1.0, above=0)

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedLpPlusPlus(self, clip)


class AttachedLpPlusPlus(AttachedBeside):
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


@register("attention_adapter")
@dataclass(frozen=True)
class AttentionAdapter(FitsEveryModel):
    """f * softmax(W2 tanh(W1 f + b1) + b2) in place of the image feature f (FedCLIP, arXiv:2302.13485)."""

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedAttention(clip)


class AttachedAttention(AttachedBeside):
    """Its state dict is `first.weight`, `second.weight` `(d, d)` and `first.bias`, `second.bias` `(d,)`."""

    is_linear = True

    def __init__(self, clip: FrozenClip) -> None:
        super().__init__(clip)
        self._width = clip.architecture.embed_dim

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        return {
            f"{layer}.{name}": uniform(rng.child(layer, name), shape, self._width).to(self.dtype)
            for layer in ("first", "second")
            for name, shape in (("weight", (self._width, self._width)), ("bias", (self._width,)))
        }

    def adapt_images(self, features: Tensor) -> Tensor:
        if self.stack is None:
            return features
        hidden = torch.tanh(self.linear(features, "first"))
        return features * self.linear(hidden, "second").softmax(dim=-1)


@register("clip_adapter")
@dataclass(frozen=True)
class ClipAdapter(FitsEveryModel):
    """ratio * relu(W2 relu(W1 f)) + (1 - ratio) f in place of the image feature f (CLIP-Adapter, arXiv:2110.04544)."""

    reduction: int = option("the feature's width over that between the two matrices", 4, at_least=1)
    ratio: float = option("share of what the matrices give", 0.2, above=0, at_most=1)

    def check_fits(self, architecture: Architecture) -> None:
        if self.reduction > architecture.embed_dim:
            limit = f"at most embed_dim of {architecture.name}, {architecture.embed_dim}"
            raise OptionError("reduction", f"expected {limit}, got {self.reduction}")

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedClipAdapter(self, clip)


class AttachedClipAdapter(AttachedBeside):
    """Its state dict is `down.weight` `(d // reduction, d)` and `up.weight` `(d, d // reduction)`."""

    is_linear = True

    def __init__(self, options: ClipAdapter, clip: FrozenClip) -> None:
        super().__init__(clip)
        self._ratio, self._width = options.ratio, clip.architecture.embed_dim
        self._inner = self._width // options.reduction

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        return {
            "down.weight": uniform(rng.child("down"), (self._inner, self._width), self._width).to(self.dtype),
            "up.weight": uniform(rng.child("up"), (self._width, self._inner), self._inner).to(self.dtype),
        }

    def adapt_images(self, features: Tensor) -> Tensor:
        if self.stack is None:
            return features
        adapted = self.linear(self.linear(features, "down").relu(), "up").relu()
        return self._ratio * adapted + (1 - self._ratio) * features


@register("norm")
@dataclass(frozen=True)
class Norm(Adapter):
    """The weight and bias of the norm before the vision tower's blocks (NormFit)."""

    def check_fits(self, architecture: Architecture) -> None:
        if not architecture.has_vision_pre_norm:
            raise OptionError(
                "", f"norm trains the norm before the vision tower's blocks: {architecture.name} has none"
            )

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedNorm(clip)


class AttachedNorm(AttachedBeside):
    """Its state dict is `visual.ln_pre.weight` and `visual.ln_pre.bias`, `(vision width,)`.

    The norm is taken out of the vision tower's stem, so that what the stem gives can be kept.
    """

    mergeable = True

    def __init__(self, clip: FrozenClip) -> None:
        super().__init__(clip)
        self.trained_from["vision"] = 1
        self._norm: nn.LayerNorm = clip.visual.ln_pre
        clip.visual.ln_pre = nn.Identity()

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        return {
            "visual.ln_pre.weight": self._norm.weight.detach().to(self.dtype).cpu().clone(),
            "visual.ln_pre.bias": self._norm.bias.detach().to(self.dtype).cpu().clone(),
        }

    def adapt_patches(self, x: Tensor) -> Tensor:
        if self.stack is None:
            return self._norm(x)
        weight, bias = self.stack["visual.ln_pre.weight"], self.stack["visual.ln_pre.bias"]
        normed = F.layer_norm(x, self._norm.normalized_shape, eps=self._norm.eps)
        per_client = normed.unflatten(0, (len(weight), -1))
        return (per_client * weight[:, None, None] + bias[:, None, None]).flatten(0, 1)

    def merged_state_dict(self, state_dict: StateLike, adapter: StateLike) -> State:
        merged = dict(state_dict)
        merged.update({name: tensor.to(merged[name].dtype) for name, tensor in adapter.items()})
        return merged


def _head(class_features: Tensor | None) -> Tensor:
    if class_features is None:
        raise ValueError("a head starts from the classes' text features")
    return class_features.cpu().clone()


def uniform(rng: Rng, shape: tuple[int, ...], fan_in: int) -> Tensor:
    """As `torch.nn.Linear` starts: uniform within 1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound, generator=rng.torch())


def linear(x: Tensor, stack: StateLike, layer: str) -> Tensor:
    """Each client's linear layer on its own rows: `x` `(K, B, d_in)` to `(K, B, d_out)`."""
    # The weight on the left: so its gradient comes out laid out as it is, and need not be copied to be a row.
    product = torch.bmm(stack[f"{layer}.weight"], x.mT).mT
    return product + stack[f"{layer}.bias"].unsqueeze(1) if f"{layer}.bias" in stack else product
