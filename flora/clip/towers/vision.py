"""The vision tower, cut at the first stage that the adapter changes: frozen stem | trained suffix."""

from __future__ import annotations

import json
from typing import Any

import PIL
import torch
import torchvision
from torch import Tensor, nn

from flora.clip.frozen import FrozenClip
from flora.clip.towers.blocks import block_at, project
from flora.clip.towers.speed import ALL_SPEED, SpeedOptions
from flora.core.tree import state_digest


class VisionTower:
    """Pixels `(N, 3, H, W)` to stem output to image features `(N, embed_dim)`, not normalised."""

    def __init__(self, clip: FrozenClip, cut: int, speed: SpeedOptions = ALL_SPEED) -> None:
        self._clip, self._visual, self.cut = clip, clip.visual, cut
        self._reads_one = speed.trim_last_block and clip.visual.pool_type == "tok"
        self._num_stages = 2 + len(self._visual.transformer.resblocks)
        self.num_tokens = int(self._visual.positional_embedding.shape[0])

    @torch.no_grad()
    def stem(self, pixels: Tensor) -> Tensor:
        """The part that no adapter changes."""
        with self._clip.autocast():
            return self._run(pixels.to(self._clip.dtype), range(self.cut))

    def suffix(self, x: Tensor) -> Tensor:
        """The rest, from the stem's output to the features."""
        with self._clip.autocast():
            return self._run(x, range(self.cut, self._num_stages))

    def stem_key(self) -> dict[str, Any]:
        """Everything but the images that the stem's output depends on, as JSON types."""
        return {
            "weights": state_digest(self._visual.state_dict()),
            "model": json.loads(json.dumps(self._clip.config)),
            "cut": self.cut,
            "trim_last_block": self._reads_one,
            "preprocess": json.loads(json.dumps(self._clip.preprocess_settings)),
            "precision": self._clip.precision if self._clip.precision != "bf16" else "bf16, own attention",
            "device": self._clip.device.type,
            "versions": {module.__name__: str(module.__version__) for module in (torch, torchvision, PIL)},
        }

    def stem_shape(self) -> tuple[torch.Size, torch.dtype]:
        """Shape and type of the stem's output for one image."""
        output = self.stem(torch.zeros(1, 3, *self._clip.architecture.image_size, device=self._clip.device))
        return output.shape[1:], output.dtype

    def activation_bytes(self) -> int:
        """About what one image takes in a block that runs without gradients."""
        return 8 * self.num_tokens * self._clip.architecture.vision.mlp_width

    def release_stem(self) -> None:
        """Take the stem's weights out of memory, once nothing will run through it any more."""
        visual, blocks = self._visual, self._visual.transformer.resblocks
        if self.cut > 0:
            visual.conv1 = visual.class_embedding = visual.positional_embedding = None
        for block in range(min(self.cut - 1, len(blocks))):
            blocks[block] = nn.Identity()
        if self.cut == self._num_stages:
            visual.proj = None

    def _run(self, x: Tensor, stages: range) -> Tensor:
        blocks = self._visual.transformer.resblocks
        for stage in stages:
            if stage == 0:
                x = self._visual._embeds(x)
            elif stage == len(blocks) and self._reads_one:
                x = block_at(blocks[stage - 1], x, torch.zeros(len(x), 1, dtype=torch.int64, device=x.device), None)
            elif stage <= len(blocks):
                x = blocks[stage - 1](x)
            else:
                x = project(self._visual._pool(x)[0], self._visual.proj)
        return x
