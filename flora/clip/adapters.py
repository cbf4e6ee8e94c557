"""What the clients train: an adapter, described by its options and attached to one frozen model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flora.clip.backbone import Architecture, FrozenClip
from flora.clip.lora import Dropout, LoraAttention, LoraLinear, LowRank
from flora.registry import Component, OptionError, option, register
from flora.rng import Rng
from flora.tree import State, StateLike

ATTENTION_TARGETS = ("q", "k", "v", "out")
TARGETS = (*ATTENTION_TARGETS, "fc", "proj")
TOWERS = ("text", "vision")


@dataclass(frozen=True)
class Mutual:
    """How two models of one client learn from each other: by `weight` T^2 KL(other || own) at temperature T."""

    weight: float
    temperature: float


class AttachedAdapter(ABC):
    """An adapter attached to a frozen model.

    `trained_from` says for each tower which of its stages is the first that the adapter changes: stage 0 is the
    embedding, stage 1 + i block i, stage 1 + num_layers the head, and 2 + num_layers means that it changes none.
    `is_large` says that it is about as large as the model, `is_beside_the_model` that it can't be merged into it.
    `gates` are tensors that `threshold` times the learning rate draws nearer to zero after each step, and not beyond.
    """

    trained_from: dict[str, int]
    max_clients_per_block: int | None = None
    has_dropout = False
    is_large = False
    is_beside_the_model = False
    gates: tuple[str, ...] = ()
    threshold: float = 0.0
    mutual: Mutual | None = None
    learned_context: Mapping[str, Any] | None = None
    """What is known of vectors that are learned in place of a prompt's first words, as JSON types."""

    @abstractmethod
    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        """The adapter that the server starts from, as a state dict on the CPU, without a client axis.

        Its numbers are of the type `FrozenClip.dtype`; random ones are the same in each precision, up to rounding.

        `class_features` `(C, embed_dim)` are the frozen model's unit text features of the classes, which heads need.
        """

    @abstractmethod
    def bind(self, stack: StateLike, generators: Sequence[torch.Generator] | None = None) -> Any:
        """A context in which the model computes with the adapters of K clients, tensors `(K, ...)`.

        `generators`, one a client, switch dropout on: they are for training.
        """

    def stays(self, name: str) -> bool:
        """Whether a tensor never leaves its client."""
        return False

    def views(self, stack: StateLike) -> list[StateLike]:
        """The models that an adapter stands for, each as what to `bind`: the server's first, the client's own last."""
        return [stack]

    @abstractmethod
    def merged_state_dict(self, state_dict: StateLike, adapter: StateLike) -> State:
        """A new OpenCLIP state dict that computes what `state_dict` with `adapter` beside it does."""

    def adapt_patches(self, x: Tensor) -> Tensor:
        """What becomes of the vision stem's output `(K * B, ...)` before the trained part sees it."""
        return x

    def adapt_tokens(self, x: Tensor, positions: Tensor) -> Tensor:
        """What becomes of the text stem's output `(K * G, M, width)`; `positions` `(K * G, M)` are those in prompts."""
        return x

    def adapt_images(self, features: Tensor) -> Tensor:
        """What becomes of image features `(K, B, embed_dim)`, before they are normalised."""
        return features

    def adapt_classes(self, features: Tensor) -> Tensor:
        """What becomes of the classes' unit features `(K, C, embed_dim)`."""
        return features


@dataclass(frozen=True)
class Adapter(Component):
    """What the clients train."""

    has_personal: ClassVar[bool] = False
    """Whether some of its tensors never leave their client."""
    knows_classes: ClassVar[bool] = False
    """Whether it has weights for each class, and so none for classes that it has not seen."""

    @abstractmethod
    def check_fits(self, architecture: Architecture) -> None:
        """Raise `OptionError` where the options don't fit the model."""

    @abstractmethod
    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        """Attach to `clip`. The model computes as before until an adapter is bound."""

    def templates(self, given: Sequence[str]) -> tuple[str, ...]:
        """The prompts' templates; `given` are the experiment's."""
        return tuple(given)

    def shown_templates(self, given: Sequence[str]) -> tuple[str, ...]:
        """The templates for a reader: `[learned context]` stands where vectors are learned in place of words."""
        return self.templates(given)


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
        return sorted({block % num_layers for block in chosen})

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


@register("full")
@dataclass(frozen=True)
class FullFineTuning(Adapter):
    """Every weight is trained and travels: the baseline that the paper compares with (FedFFT).

    Weight decay, if there is any, applies to all of them, norms and `logit_scale` included.
    """

    def check_fits(self, architecture: Architecture) -> None:
        """It fits every model."""

    def attach(self, clip: FrozenClip) -> AttachedFull:
        return AttachedFull(clip)


class AttachedFull(AttachedAdapter):
    """A state dict of the whole model, `(K, ...)` with K = 1, that stands in for the frozen weights while bound.

    Or of what is `below` a name in it.
    """

    max_clients_per_block = 1
    is_large = True

    def __init__(self, clip: FrozenClip, below: str = "") -> None:
        self.trained_from = dict.fromkeys(TOWERS, 0)
        self._dtype = clip.dtype
        self._frozen = {name: each for name, each in clip.model.named_parameters() if name.startswith(below)}
        self._places: list[tuple[nn.Module, str, str]] = [
            (module, leaf, f"{prefix}.{leaf}" if prefix else leaf)
            for prefix, module in clip.model.named_modules()
            for leaf, _ in module.named_parameters(recurse=False)
            if f"{prefix}.{leaf}".startswith(below) or not below
        ]

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        return {name: parameter.detach().to(self._dtype).cpu().clone() for name, parameter in self._frozen.items()}

    @contextmanager
    def bind(self, stack: StateLike, generators: Sequence[torch.Generator] | None = None) -> Iterator[None]:
        try:
            for module, leaf, name in self._places:
                module._parameters[leaf] = stack[name][0]  # type: ignore[assignment]
            yield
        finally:
            for module, leaf, name in self._places:
                module._parameters[leaf] = self._frozen[name]

    def merged_state_dict(self, state_dict: StateLike, adapter: StateLike) -> State:
        return {
            name: adapter[name].to(tensor.dtype) if name in adapter else tensor for name, tensor in state_dict.items()
        }
