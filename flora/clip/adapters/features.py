"""Adapters that change what the vision tower gets or gives: its first norm, or the features of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora.clip.adapters.base import Adapter, AttachedAdapter
from flora.clip.adapters.outside import AttachedOutside, FitsEveryModel, uniform
from flora.clip.frozen import Architecture, FrozenClip
from flora.core.registry import OptionError, option, register
from flora.core.rng import Rng
from flora.core.tree import State, StateLike


@register("attention_adapter")
@dataclass(frozen=True)
class AttentionAdapter(FitsEveryModel):
    """f * softmax(W2 tanh(W1 f + b1) + b2) in place of the image feature f (FedCLIP, arXiv:2302.13485)."""

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedAttention(clip)


class AttachedAttention(AttachedOutside):
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


class AttachedClipAdapter(AttachedOutside):
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


class AttachedNorm(AttachedOutside):
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
