"""The base class of adapters that work outside of the frozen layers, and the linear layers that they are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.clip.adapters.base import TOWERS, Adapter, AttachedAdapter
from flora.clip.frozen import Architecture, FrozenClip
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


class AttachedOutside(AttachedAdapter):
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


def uniform(rng: Rng, shape: tuple[int, ...], fan_in: int) -> Tensor:
    """Numbers of this `shape` as `torch.nn.Linear` starts: uniform within 1/sqrt(fan_in), fp32."""
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound, generator=rng.torch())


def linear(x: Tensor, stack: StateLike, layer: str) -> Tensor:
    """Each client's linear layer on its own rows: `x` `(K, B, d_in)` to `(K, B, d_out)`."""
    # The weight on the left: so its gradient comes out laid out as it is, and need not be copied to be a row.
    product = torch.bmm(stack[f"{layer}.weight"], x.mT).mT
    return product + stack[f"{layer}.bias"].unsqueeze(1) if f"{layer}.bias" in stack else product
