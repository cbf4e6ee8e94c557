"""Adapters beside the upper blocks of both towers, of which the middle is one for both: what travels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flora.clip.adapters.base import TOWERS, Adapter, AttachedAdapter, check_depth
from flora.clip.adapters.outside import AttachedOutside
from flora.clip.frozen import Architecture, FrozenClip
from flora.core.registry import option, register
from flora.core.rng import Rng
from flora.core.tree import State


@register("pfedmma")
@dataclass(frozen=True)
class PFedMma(Adapter):
    """A bottleneck beside the upper blocks of both towers, whose middle both share (pFedMMA, arXiv:2507.05394).

    A block that gets x gives `scale` * up(relu(shared(relu(down(norm(x)))))) more than without, where norm is the one
    before its attention. All three layers, each with a bias, are learned; the shared ones travel, down and up stay with
    the client. Blocks are paired from the top. Starts as the authors' code: weights are normal numbers of variance
    2 / d_out, biases zero. Differs from it: there the gradients of these layers are divided by `scale`, which is a
    learning rate of 1 / `scale` as much for SGD, and nothing for Adam; blocks are paired from the bottom; and one
    optimiser, with its momentum, goes from client to client.
    """

    has_personal = True

    rank: int = option("inner width r of the bottleneck", 32, at_least=1)
    depth: int | None = option(
        "blocks of each tower that have one, counted from the top; none: two thirds of the shallower tower's, as 8 of "
        "12",
        None,
        at_least=1,
    )
    scale: float = option("factor of what is added", 0.001, above=0)

    def check_fits(self, architecture: Architecture) -> None:
        check_depth(self.depth, architecture)

    def depth_in(self, architecture: Architecture) -> int:
        """How many blocks of each tower have a bottleneck."""
        return self.depth or -(-2 * architecture.common_layers // 3)

    @property
    def takes_fewer_tokens(self) -> bool:
        return False

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedPFedMma(self, clip)


class AttachedPFedMma(AttachedOutside):
    """Its state dict has, for the n upper blocks from the lowest on, the layers' weights and biases.

    These are `T.down.weight` `(n, r, width)`, `T.down.bias` `(n, r)`, `T.up.weight` `(n, width, r)` and `T.up.bias`
    `(n, width)` for each tower T; `shared.weight` `(n, r, r)` and `shared.bias` `(n, r)`.
    """

    def __init__(self, options: PFedMma, clip: FrozenClip) -> None:
        super().__init__(clip)
        self._rank, self._scale = options.rank, options.scale
        self._depth = options.depth_in(clip.architecture)
        self._widths = {tower: clip.architecture.tower(tower).width for tower in TOWERS}
        blocks = {"text": clip.text.transformer.resblocks, "vision": clip.visual.transformer.resblocks}
        self._first = {tower: 1 + len(blocks[tower]) - self._depth for tower in TOWERS}
        self._norms: dict[str, list[Any]] = {
            tower: [block.ln_1 for block in blocks[tower][-self._depth :]] for tower in TOWERS
        }
        self.trained_from = dict(self._first)
        self.after_block = self._with_bottleneck

    def stays(self, name: str) -> bool:
        return not name.startswith("shared.")

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        rank, sizes = self._rank, {"shared": (self._rank, self._rank)}
        for tower, width in self._widths.items():
            sizes |= {f"{tower}.down": (rank, width), f"{tower}.up": (width, rank)}
        state: State = {}
        for layer, (d_out, d_in) in sizes.items():
            weight = torch.empty(self._depth, d_out, d_in)
            weight.normal_(0, math.sqrt(2 / d_out), generator=rng.child(layer).torch())
            state[f"{layer}.weight"] = weight.to(self.dtype)
            state[f"{layer}.bias"] = torch.zeros(self._depth, d_out, dtype=self.dtype)
        return state

    def _with_bottleneck(self, tower: str, number: int, given: Tensor, x: Tensor) -> Tensor:
        """What a block gives, and what the bottleneck makes of what it got, both `(K * N, R, width)`."""
        place = number - self._first[tower]
        if self.stack is None or place < 0:
            return x
        number_of_clients = len(self.stack["shared.bias"])
        rows = self._norms[tower][place](given).reshape(number_of_clients, -1, given.shape[-1])
        inner = self._layer(f"{tower}.down", place, rows).relu()
        inner = self._layer("shared", place, inner).relu()
        return x + self._scale * self._layer(f"{tower}.up", place, inner).view(x.shape)

    def _layer(self, name: str, place: int, x: Tensor) -> Tensor:
        """Each client's linear layer on its own rows, `(K, M, d_in)` to `(K, M, d_out)`."""
        assert self.stack is not None
        weight, bias = self.stack[f"{name}.weight"][:, place], self.stack[f"{name}.bias"][:, place]
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
