"""Contexts that are made anew: of the classes' names, or for each image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.clip.adapters.base import HELD_CLASSES, AttachedAdapter
from flora.clip.adapters.outside import linear, uniform
from flora.clip.adapters.prompts import AttachedContext, PromptContext, WithContext, put_vectors
from flora.clip.comparison import Comparison, CosinesByImage
from flora.clip.frozen import Architecture, FrozenClip
from flora.core.registry import OptionError, option, register
from flora.core.rng import Rng
from flora.core.tree import State, StateLike

INNER_FACTOR = 4
"""The inner width of the generator's feed-forward layer over the text width."""


@register("fedtpg")
@dataclass(frozen=True)
class FedTpg(WithContext):
    """A generator that makes the context of the classes' names (FedTPG, arXiv:2310.06123).

    Learned queries attend to the frozen unit features of the names, and a feed-forward layer follows: a vector for each
    query, in the places of the words before every class's name. The generator is what is trained and what travels. New
    classes have a context, too: that of their own names. In training a client's generator reads the names of the
    classes that it has examples of; at evaluation all.

    Layers and sizes are those of the authors' code: norms before both layers, four heads, a residual beside the second
    layer alone, which is gated by GELU, no layer of self-attention. Differs from the paper: a client there also chooses
    among its own classes alone, here among all of the experiment, as with every adapter. In the
    authors' code clients count equally (`server.strategy.weighting: uniform`).
    """

    words: str | None = option(
        "words whose places the vectors take; the frozen model reads them. none: x's", "a photo of a"
    )
    num_tokens: int = option("vectors, if there are no words", 4, at_least=1, at_most=64)
    heads: int = option("heads of the attention", 4, at_least=1)
    names: str = option(
        "which names a client's generator reads in training: of the classes that the client has, or of all",
        "client",
        choices=("client", "all"),
    )

    @property
    def context(self) -> PromptContext:
        return PromptContext(words=self.words, num_tokens=self.num_tokens)

    def check_fits(self, architecture: Architecture) -> None:
        super().check_fits(architecture)
        width = architecture.text.width
        if width % self.heads:
            raise OptionError("heads", f"expected a divisor of {width}, {architecture.name}'s text width")

    @property
    def changes_images(self) -> bool:
        return False

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedFedTpg(self, clip)


class AttachedFedTpg(AttachedContext):
    """Its state dict is the generator's, with n queries, text width w and embed_dim d.

    `queries` `(n, w)`; weights `query` and `out` `(w, w)`, `key` and `value` `(w, d)`, `up` `(8 w, w)`, `down`
    `(w, 4 w)` and their biases; norms `norm_queries` `(w,)`, `norm_names` `(d,)`, `norm_mixed` `(w,)`.
    """

    reads_names = True

    def __init__(self, options: FedTpg, clip: FrozenClip) -> None:
        super().__init__(options.context, clip)
        self.reads_held_classes = options.names == "client"
        self._heads, self._embed_dim = options.heads, clip.architecture.embed_dim
        self.learned_context = {"num_vectors": self._shape[0], "starts_from": None}

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        (number, width), embed_dim = self._shape, self._embed_dim
        state = {"queries": torch.empty(number, width).normal_(0, 0.02, generator=rng.child("queries").torch())}
        for name, size in (("norm_queries", width), ("norm_names", embed_dim), ("norm_mixed", width)):
            state |= {f"{name}.weight": torch.ones(size), f"{name}.bias": torch.zeros(size)}
        for name, size in (("query", width), ("key", embed_dim), ("value", embed_dim)):
            bound = math.sqrt(6 / (3 * width + size))  # as `nn.MultiheadAttention`, where the three are one matrix
            weight = torch.empty(width, size).uniform_(-bound, bound, generator=rng.child(name).torch())
            state |= {f"{name}.weight": weight, f"{name}.bias": torch.zeros(width)}
        inner = INNER_FACTOR * width
        state["out.weight"], state["out.bias"] = uniform(rng.child("out"), (width, width), width), torch.zeros(width)
        for name, d_out, d_in in (("up", 2 * inner, width), ("down", width, inner)):
            state[f"{name}.weight"] = uniform(rng.child(name, "weight"), (d_out, d_in), d_in)
            state[f"{name}.bias"] = uniform(rng.child(name, "bias"), (d_out,), d_in)
        return {name: tensor.to(self.dtype) for name, tensor in state.items()}

    def adapt_tokens_by_names(self, x: Tensor, positions: Tensor, learned: Tensor | None, names: Tensor) -> Tensor:
        if self.stack is None:
            return x
        assert learned is not None
        return put_vectors(x, self._generate(self.stack, names), learned, self._positional[positions])

    def _generate(self, stack: StateLike, names: Tensor) -> Tensor:
        """Each client's context `(K, n, text width)`, from the features of names `(C, embed_dim)`."""
        queries = _norm(stack["queries"], stack, "norm_queries")
        read = _norm(names.expand(len(queries), -1, -1), stack, "norm_names")
        q, k, v = (
            linear(each, stack, name).unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for name, each in (("query", queries), ("key", read), ("value", read))
        )
        held = stack[HELD_CLASSES][:, None, None] if HELD_CLASSES in stack else None
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=held).transpose(1, 2).flatten(2)
        mixed = linear(mixed, stack, "out")
        inner, gates = linear(_norm(mixed, stack, "norm_mixed"), stack, "up").chunk(2, dim=-1)
        return mixed + linear(inner * F.gelu(gates), stack, "down")


@register("cocoop")
@dataclass(frozen=True)
class CoCoOp(PromptContext):
    """A context that each image shifts, by two layers on its feature (CoCoOp, arXiv:2203.05557).

    Every vector of the context gets W2 relu(W1 f + b1) + b2 added, with f the image's unit feature. Context and layers
    are what is trained and what travels. Costly: B images and C classes are B x C prompts through the text tower, in
    each step and at evaluation, where other contexts need C. The authors' runs have one image a step.
    """

    reduction: int = option("the image feature's width over that between the two layers", 16, at_least=1)

    def check_fits(self, architecture: Architecture) -> None:
        super().check_fits(architecture)
        if self.reduction > architecture.embed_dim:
            limit = f"at most embed_dim of {architecture.name}, {architecture.embed_dim}"
            raise OptionError("reduction", f"expected {limit}, got {self.reduction}")

    @property
    def comparison(self) -> Comparison:
        return CosinesByImage()

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedCoCoOp(self, clip)


class AttachedCoCoOp(AttachedContext):
    """Beside `context`, with d the width of image features and w the text width, `down.weight` `(d // reduction, d)`,
    `up.weight` `(w, d // reduction)` and their biases."""

    def __init__(self, options: CoCoOp, clip: FrozenClip) -> None:
        super().__init__(options, clip)
        self.comparison = options.comparison
        self._embed_dim = clip.architecture.embed_dim
        self._inner = self._embed_dim // options.reduction

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        state = super().initial_state(rng, class_features)
        for name, d_out, d_in in (("down", self._inner, self._embed_dim), ("up", self._shape[1], self._inner)):
            state[f"{name}.weight"] = uniform(rng.child(name, "weight"), (d_out, d_in), d_in).to(self.dtype)
            state[f"{name}.bias"] = uniform(rng.child(name, "bias"), (d_out,), d_in).to(self.dtype)
        return state

    def for_images(self, images: Tensor) -> StateLike:
        assert self.stack is not None
        shifts = linear(linear(images, self.stack, "down").relu(), self.stack, "up")
        context = self.stack["context"].unsqueeze(1)
        between = (1,) * (context.dim() - 3)  # the vectors, and the classes where they have their own
        return {"context": (context + shifts.unflatten(2, (*between, -1))).flatten(0, 1)}


def _norm(x: Tensor, stack: StateLike, name: str) -> Tensor:
    """Each client's layer norm of its own rows: `x` `(K, B, d)`."""
    weight, bias = stack[f"{name}.weight"].unsqueeze(1), stack[f"{name}.bias"].unsqueeze(1)
    return F.layer_norm(x, x.shape[-1:]) * weight + bias
