"""The vision tower, cut at the first stage that the adapter changes: frozen stem | trained suffix."""

from __future__ import annotations

import json
from typing import Any

import PIL
import torch
from torch import Tensor, nn

from flora.clip.frozen import FrozenClip
from flora.clip.towers.blocks import NOTHING, AroundBlocks, block_at, project
from flora.clip.towers.speed import ALL_SPEED, SpeedOptions
from flora.clip.towers.tokens import Reducer, ones, pack_sizes, pool, size_mask, unpack_sizes
from flora.core.errors import UserError
from flora.core.tree import state_digest

# Activations of the images that go through a CPU at once: of more, they leave its caches, and each image takes longer
# (docs/benchmarks.md).
CPU_BATCH_BYTES = 40 * 2**20


class VisionTower:
    """Pixels `(N, 3, H, W)` to stem output to image features `(N, embed_dim)`, not normalised.

    Where `clip` has `reads_patches`, to the features of all tokens that are left, `(N, 1 + P, embed_dim)`, the class
    token's first. Where tokens are merged or pooled in the stem, its output `(N, M, D + 1)` has their sizes behind the
    width. Raises `UserError` if patches are to be read where the tower's features are their mean.
    """

    def __init__(self, clip: FrozenClip, cut: int, speed: SpeedOptions = ALL_SPEED) -> None:
        self._clip, self._visual, self.cut, self.reads_patches = clip, clip.visual, cut, clip.reads_patches
        if self.reads_patches and clip.visual.pool_type != "tok":
            raise UserError(
                f"backbone.model: {clip.architecture.name}: features of patches need a vision tower that is read at "
                "its class token"
            )
        self._reads_one = speed.trim_last_block and clip.visual.pool_type == "tok" and not self.reads_patches
        self._num_stages = 2 + len(self._visual.transformer.resblocks)
        self.is_frozen = cut == self._num_stages
        self.num_tokens = int(self._visual.positional_embedding.shape[0])
        self._reducer = None if clip.tokens.is_idle else Reducer(clip.visual, clip.tokens, clip.token_classes)

    @torch.no_grad()
    def stem(self, pixels: Tensor) -> Tensor:
        """The part that no adapter changes: `(N, ...)` of pixels `(N, 3, H, W)`."""
        with self._clip.autocast():
            parts = [self._run(part.to(self._clip.dtype), range(self.cut)) for part in self.in_parts(pixels)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def in_parts(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images `(N, ...)` as they best go through without gradients: on a CPU some at a time."""
        number = len(images)
        if images.device.type == "cpu":
            number = max(1, CPU_BATCH_BYTES // self.activation_bytes())
        return images.split(number)

    def suffix(self, x: Tensor, around: AroundBlocks = NOTHING) -> Tensor:
        """The rest, from the stem's output to the features; blocks `around` which something is done merge no tokens."""
        with self._clip.autocast():
            return self._run(x, range(self.cut, self._num_stages), around)

    def stem_key(self) -> dict[str, Any]:
        """Everything but the images that the stem's output depends on, as JSON types."""
        import torchvision  # takes more than a second, and configurations are read without it

        return {
            "weights": state_digest(self._visual.state_dict()),
            "model": json.loads(json.dumps(self._clip.config)),
            "cut": self.cut,
            "trim_last_block": self._reads_one,
            "preprocess": json.loads(json.dumps(self._clip.preprocess_settings)),
            "precision": self._clip.precision if self._clip.precision != "bf16" else "bf16, own attention",
            "device": self._clip.device.type,
            "versions": {module.__name__: str(module.__version__) for module in (torch, torchvision, PIL)},
            **({"reads_patches": True} if self.reads_patches else {}),
            **({"tokens": self._reducer.key()} if self._reducer is not None else {}),
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
        if self.is_frozen:
            visual.proj = None

    def _run(self, x: Tensor, stages: range, around: AroundBlocks = NOTHING) -> Tensor:
        sizes: Tensor | None = None
        if self._carries_sizes(stages.start):
            x, sizes = unpack_sizes(x, self.num_tokens - 1)
        for stage in stages:
            if stage == 0:
                x = self._visual._embeds(x)
            elif stage < self._num_stages - 1:
                given = x if around.before is None else around.before(stage, x)
                x, sizes = self._block(stage, given, sizes)
                if around.after is not None:  # the last block may give the first token alone
                    x = around.after(stage, given[:, : x.shape[1]], x)
            elif self.reads_patches:
                x = project(self._visual.ln_post(x), self._visual.proj)
            else:
                x = project(pool(self._visual, x, sizes), self._visual.proj)
        if self._carries_sizes(stages.stop):
            x = pack_sizes(x, ones(x) if sizes is None else sizes, self.num_tokens - 1)
        return x

    def _carries_sizes(self, cut: int) -> bool:
        """Whether what stands between the stages before `cut` and those from it on has its tokens' sizes."""
        end = self._num_stages - (2 if self._reads_one else 1)
        return self._reducer is not None and self._reducer.first < cut <= end

    def _block(self, number: int, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run a block, counted from 1, on tokens of these sizes, which are None as long as all are 1."""
        block = self._visual.transformer.resblocks[number - 1]
        if number == self._num_stages - 2 and self._reads_one:
            reads = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
            return block_at(block, x, reads, size_mask(sizes)), None
        return (block(x), None) if self._reducer is None else self._reducer.block(number, x, sizes)
