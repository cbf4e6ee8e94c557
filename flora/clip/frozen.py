"""The frozen model once it is loaded: its architecture, its preprocessing, its tokenizer, and how its towers run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from flora.clip.layers import Gelu, LoraAttention, LoraLinear
from flora.clip.towers.tokens import AllTokens, TokenReduction


@dataclass(frozen=True)
class TowerShape:
    """The sizes of one tower's transformer."""

    width: int
    mlp_width: int
    num_layers: int


@dataclass(frozen=True)
class Architecture:
    """What can be known of a model without building it."""

    name: str
    vision: TowerShape
    text: TowerShape
    embed_dim: int
    image_size: tuple[int, int]
    context_length: int
    has_vision_pre_norm: bool = True
    reads_class_token: bool = True
    """Whether the vision tower is read at its class token, not at the mean of all."""
    reads_text_end: bool = True
    """Whether the text tower is read at a prompt's end-of-text token."""

    def tower(self, name: str) -> TowerShape:
        """The shape of the tower called `name`: "vision" or "text"."""
        return self.vision if name == "vision" else self.text

    @property
    def common_layers(self) -> int:
        """How many blocks both towers have: those of the shallower one."""
        return min(self.vision.num_layers, self.text.num_layers)


@dataclass(frozen=True, eq=False)
class FrozenClip:
    """A loaded model whose weights nobody writes to, with its image preprocessing and its tokenizer.

    `preprocess` turns a PIL image into float32 `(3, H, W)`; `tokenize` turns P texts into int64 `(P, context_length)`,
    cut where they are longer; `num_tokens` is how long a text is, with its start and its end. `tokens` says with which
    tokens of an image the vision tower goes on; `token_classes` `(C, embed_dim)` are the unit text features of all the
    run's classes, if that depends on them. With `reads_patches` it gives the features of all tokens, not of one.
    """

    model: nn.Module
    architecture: Architecture
    preprocess: Callable[[Image.Image], Tensor]
    preprocess_settings: dict[str, Any]
    config: dict[str, Any]
    tokenize: Callable[[Sequence[str]], Tensor]
    num_tokens: Callable[[str], int]
    device: torch.device
    precision: str
    tokens: TokenReduction = AllTokens()
    token_classes: Tensor | None = None
    reads_patches: bool = False

    @property
    def visual(self) -> Any:
        """The vision tower (`open_clip.transformer.VisionTransformer`)."""
        return self.model.visual

    @property
    def text(self) -> Any:
        """The module that holds the text tower's parts: the model itself (CLIP) or its `.text` (CustomTextCLIP)."""
        return getattr(self.model, "text", self.model)

    @property
    def text_prefix(self) -> str:
        """What precedes the text tower's names in the model's state dict."""
        return "text." if hasattr(self.model, "text") else ""

    @property
    def text_pool(self) -> str:
        """Where the text tower is read: argmax or eos (at the end-of-text token), first, last."""
        return str(getattr(self.model, "text_pool_type", None) or self.text.pool_type)

    @property
    def text_end_token(self) -> int:
        """The id of the token at which the pooling called eos reads."""
        return int(getattr(self.model, "text_eos_id", None) or self.text.eos_id)

    @property
    def dtype(self) -> torch.dtype:
        """The type of features, adapters, and all that is computed from them: float64 with fp64, else float32."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def keep_matrices_in_bf16(self) -> None:
        """Keep the matrices in the type in which autocast uses them: the same products, without a copy at each call."""
        kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention, LoraLinear, LoraAttention)
        modules = [module for module in self.model.modules() if isinstance(module, kinds)]
        matrices = [matrix for module in modules for matrix in module.parameters(recurse=False)]
        projections = (self.visual.proj, self.text.text_projection)
        for matrix in (*matrices, *(each for each in projections if isinstance(each, nn.Parameter))):
            matrix.data = matrix.data.to(torch.bfloat16)

    def autocast(self) -> torch.autocast:
        """The context in which the towers run: bf16 autocast, or nothing for fp32 and fp64."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def use_own_attention(tower: Any) -> None:
    """Replace OpenCLIP's attention, which takes no mask for each sequence; ours computes the same, same weights."""
    for block in tower.transformer.resblocks:
        block.attn = LoraAttention(block.attn, {})


def use_own_gelu(tower: Any) -> None:
    """Replace OpenCLIP's GELU, where that is PyTorch's own, by one that takes no memory without gradients."""
    for block in tower.transformer.resblocks:
        if type(block.mlp.gelu) is nn.GELU:
            block.mlp.gelu = Gelu()


def parameter_count(model: nn.Module) -> int:
    """Return how many parameters the model has."""
    return sum(parameter.numel() for parameter in model.parameters())
