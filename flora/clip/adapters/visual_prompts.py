"""Adapters that learn tokens beside those of an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flora.clip.adapters.base import Adapter, AttachedAdapter
from flora.clip.adapters.outside import AttachedOutside, FitsEveryModel
from flora.clip.frozen import Architecture, FrozenClip
from flora.core.registry import OptionError, name_of, option, register
from flora.core.rng import Rng
from flora.core.tree import State


@register("visual_prompt")
@dataclass(frozen=True)
class VisualPrompt(FitsEveryModel):
    """Learned tokens behind those of the image, in the first blocks of the vision tower (VPT, arXiv:2203.12119).

    With `depth` 1 they go through all blocks (VPT-shallow); with more, each of the first `depth` blocks gets tokens of
    its own in their place (VPT-deep). The first block's pass the norm before the blocks, as the image's do. Differs
    from the paper: there they stand between the class token and the image's, which changes nothing, for attention knows
    no order; and they start from uniform numbers, here from normal ones of standard deviation 0.02.
    """

    num_tokens: int = option("learned tokens in a block", 8, at_least=1, at_most=1024)
    depth: int = option("blocks that have learned tokens of their own", 1, at_least=1)

    def check_fits(self, architecture: Architecture) -> None:
        check_reads_class_token(self, architecture)
        limit = architecture.vision.num_layers
        if self.depth > limit:
            raise OptionError("depth", f"expected at most {limit}, the blocks of {architecture.name}, got {self.depth}")

    @property
    def adds_image_tokens(self) -> bool:
        return True

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedVisualPrompt(self, clip)


def check_reads_class_token(adapter: Adapter, architecture: Architecture) -> None:
    """Raise `OptionError` if a model's features of images are a mean over tokens, those that are learned among them."""
    if not architecture.reads_class_token:
        needs = f"{name_of(adapter)} needs a vision tower that is read at its class token"
        raise OptionError("", f"{needs}: {architecture.name} is read at the mean of all")


class AttachedVisualPrompt(AttachedOutside):
    """Its state dict is `visual.prompt` `(depth, number of tokens, vision width)`."""

    def __init__(self, options: VisualPrompt, clip: FrozenClip) -> None:
        super().__init__(clip)
        self.trained_from["vision"] = 1
        self._shape = options.depth, options.num_tokens, clip.architecture.vision.width
        self._norm = clip.visual.ln_pre
        self.adapt_block = self._with_tokens

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        return {"visual.prompt": torch.empty(self._shape).normal_(0, 0.02, generator=rng.torch()).to(self.dtype)}

    def _with_tokens(self, number: int, x: Tensor) -> Tensor:
        """What block `number` gets: the image's tokens `(K * B, T, width)` and behind them those learned for it."""
        if self.stack is None or number > self._shape[0]:
            return x
        return put_tokens(number, x, self.stack["visual.prompt"][:, number - 1], self._norm)


def put_tokens(number: int, x: Tensor, tokens: Tensor, norm: nn.Module) -> Tensor:
    """Put each client's learned tokens `(K, P, width)` behind an image's `(K * B, T, width)`, for block `number`.

    The first block's pass the `norm` before the blocks; the others' stand in the places of those before them.
    """
    if number == 1:
        tokens = norm(tokens)
    else:
        x = x[:, : -tokens.shape[1]]
    return torch.cat([x, tokens.repeat_interleave(len(x) // len(tokens), dim=0).to(x.dtype)], dim=1)
