"""Low-rank adapters in chosen matrices of either tower (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flora.clip.adapters.base import TOWERS, Adapter, AttachedAdapter
from flora.clip.frozen import Architecture, FrozenClip
from flora.clip.layers import Dropout, LoraAttention, LoraLinear, LowRank
from flora.core.registry import OptionError, option, register
from flora.core.rng import Rng
from flora.core.tree import State, StateLike

ATTENTION_TARGETS = ("q", "k", "v", "out")
TARGETS = (*ATTENTION_TARGETS, "fc", "proj")


@register("lora")
@dataclass(frozen=True)
class Lora(Adapter):
    """Low-rank adaptation, W + scaling B A (arXiv:2106.09685). Differs from FLoRA's code: see `scaling`."""

    towers: tuple[str, ...] = option("which towers are adapted", ("text",), choices=TOWERS)
    targets: tuple[str, ...] = option("which matrices of a block are adapted", ("q", "v"), choices=TARGETS)
    layers: tuple[int, ...] | None = option("which blocks; negative numbers count from the end; none: all", None)
    rank: int = option("inner width r of the two factors", 8, at_least=1)
    alpha: float = option("numerator of the scaling", 16.0, above=0)
    scaling: str = option(
        "factor before B A; FLoRA's released code uses alpha alone",
        "alpha/r",
        choices=("alpha/r", "alpha/sqrt(r)", "alpha"),
    )
    dropout: float = option("fraction of an adapter's inputs zeroed in training", 0.0, at_least=0, below=1)
    init: str = option(
        "how A starts (B starts at zero): uniform within 1/sqrt(d_in), or normal with standard deviation 1/sqrt(r)",
        "uniform",
        choices=("uniform", "normal"),
    )
    start: str | None = option(
        "an adapter to begin from in place of a random A and a B of zeros: a folder of the library PEFT's, or a run's",
        None,
    )

    def check(self) -> None:
        for name in ("towers", "targets"):
            chosen = getattr(self, name)
            if not chosen or len(set(chosen)) != len(chosen):
                raise OptionError(name, f"expected at least one, each once, got {list(chosen)}")
        if self.layers is not None and not self.layers:
            raise OptionError("layers", "expected at least one block, or none for all of them")

    @property
    def factor(self) -> float:
        """The number that multiplies B A."""
        return {"alpha/r": self.alpha / self.rank, "alpha/sqrt(r)": self.alpha / math.sqrt(self.rank)}.get(
            self.scaling, self.alpha
        )

    def blocks(self, num_layers: int) -> list[int]:
        """The adapted blocks of a tower of `num_layers`, in order. Raises `OptionError` for one it doesn't have."""
        chosen = range(num_layers) if self.layers is None else self.layers
        for block in chosen:
            if not -num_layers <= block < num_layers:
                allowed = f"{-num_layers} to {num_layers - 1}"
                raise OptionError("layers", f"expected blocks from {allowed} ({num_layers} in the tower), got {block}")
        blocks = sorted({block % num_layers for block in chosen})
        if len(blocks) < len(chosen):
            raise OptionError("layers", f"expected each block once ({num_layers} in the tower), got {list(chosen)}")
        return blocks

    @property
    def changes_images(self) -> bool:
        return "vision" in self.towers

    def check_fits(self, architecture: Architecture) -> None:
        for tower in self.towers:
            shape = architecture.tower(tower)
            self.blocks(shape.num_layers)
            if self.rank > shape.width:
                limit = f"at most the width of the {tower} tower of {architecture.name}, {shape.width}"
                raise OptionError("rank", f"expected {limit}, got {self.rank}")

    def attach(self, clip: FrozenClip) -> AttachedLora:
        return AttachedLora(self, clip)


class AttachedLora(AttachedAdapter):
    """LoRA layers in the blocks of a frozen model.

    Its state dict holds, for tower T, block i and target t, `T.i.t.lora_A` `(r, d_in)` and `T.i.t.lora_B` `(d_out, r)`.
    """

    def __init__(self, options: Lora, clip: FrozenClip) -> None:
        self.options = options
        self.has_dropout = options.dropout > 0
        self._dtype = clip.dtype
        self.layers: dict[str, LowRank] = {}
        self.trained_from = {}
        self._prefix = {"text": clip.text_prefix + "transformer", "vision": "visual.transformer"}
        for tower in TOWERS:
            num_layers = clip.architecture.tower(tower).num_layers
            transformer = (clip.visual if tower == "vision" else clip.text).transformer
            blocks = options.blocks(num_layers) if tower in options.towers else []
            self.trained_from[tower] = 1 + blocks[0] if blocks else 2 + num_layers
            for block in blocks:
                for target, layer in self._adapt(transformer.resblocks[block]).items():
                    self.layers[f"{tower}.{block}.{target}"] = layer.to(clip.device)
        # Made once, because they are needed at every step.
        self._names = [
            tuple(f"{name}.{factor}" for factor in ("lora_A", "lora_B", "residual_A", "residual_B"))
            for name in self.layers
        ]

    def _adapt(self, block: Any) -> dict[str, LowRank]:
        """Put LoRA layers in the place of the block's chosen ones; return them by target."""
        width, mlp_width = block.mlp.c_fc.in_features, block.mlp.c_fc.out_features
        sizes = {"fc": (width, mlp_width), "proj": (mlp_width, width)}
        layers = {
            target: LowRank(*sizes.get(target, (width, width)), self.options.factor)
            for target in TARGETS
            if target in self.options.targets
        }
        attention = {target: layers[target] for target in ATTENTION_TARGETS if target in layers}
        if attention:
            block.attn = LoraAttention(block.attn, attention)
        if "fc" in layers:
            block.mlp.c_fc = LoraLinear(block.mlp.c_fc, layers["fc"])
        if "proj" in layers:
            block.mlp.c_proj = LoraLinear(block.mlp.c_proj, layers["proj"])
        return layers

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        state: State = {}
        rank = self.options.rank
        for name, layer in self.layers.items():
            state[f"{name}.lora_A"] = self._start(rng.child(name), rank, layer)
            state[f"{name}.lora_B"] = torch.zeros(layer.d_out, rank, dtype=self._dtype)
        return state

    def _start(self, rng: Rng, rank: int, layer: LowRank) -> Tensor:
        """A random A `(rank, d_in)`."""
        lora_A, generator = torch.empty(rank, layer.d_in), rng.torch()
        if self.options.init == "uniform":
            bound = 1 / math.sqrt(layer.d_in)
            lora_A.uniform_(-bound, bound, generator=generator)
        else:
            lora_A.normal_(0, 1 / math.sqrt(rank), generator=generator)
        return lora_A.to(self._dtype)

    @contextmanager
    def bind(self, stack: StateLike, generators: Sequence[torch.Generator] | None = None) -> Iterator[None]:
        fraction = self.options.dropout
        dropout = Dropout(fraction, generators) if generators is not None and fraction > 0 else None
        try:
            for layer, (lora_A, lora_B, residual_A, residual_B) in zip(self.layers.values(), self._names, strict=True):
                residual = None
                if residual_A in stack:  # of all clients, so its leading axis is 1
                    residual = stack[residual_A][0], stack[residual_B][0]
                layer.attach(stack[lora_A], stack[lora_B], dropout, residual)
            yield
        finally:
            for layer in self.layers.values():
                layer.detach()

    def merged_state_dict(self, state_dict: StateLike, adapter: StateLike) -> State:
        merged = dict(state_dict)
        for name, layer in self.layers.items():
            tower, block, target = name.split(".")
            weight, rows = _place(target, layer)
            key = f"{self._prefix[tower]}.resblocks.{block}.{weight}"
            full = merged[key].to(torch.float64, copy=True)
            for kind in ("lora", "residual"):
                if f"{name}.{kind}_A" in adapter:
                    left, right = adapter[f"{name}.{kind}_B"].double(), adapter[f"{name}.{kind}_A"].double()
                    full[rows] += layer.scaling * (left @ right).to(full.device)
            merged[key] = full.to(state_dict[key].dtype)
        return merged


def _place(target: str, layer: LowRank) -> tuple[str, slice]:
    """The parameter of a block that a target adapts, and which of its rows."""
    if target in ("q", "k", "v"):
        start = "qkv".index(target) * layer.d_out
        return "attn.in_proj_weight", slice(start, start + layer.d_out)
    names = {"out": "attn.out_proj.weight", "fc": "mlp.c_fc.weight", "proj": "mlp.c_proj.weight"}
    return names[target], slice(None)
