"""The two towers of a model, each cut at the first stage that the adapter changes: frozen stem | trained suffix.

A tower is a row of stages: the embedding (0), its blocks (1 to n) and the head (n + 1). Stems run once, without
gradients; what they give is all that training and evaluation ever see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora.clip.adapters import AttachedAdapter
from flora.clip.backbone import FrozenClip


@dataclass(frozen=True, eq=False)
class Prompts:
    """The tokenised prompts of all classes, class-major: T templates of class 0, then those of class 1.

    `tokens` is int64 `(C * T, L)`; `ends` `(C * T,)` is the position at which the tower is read.
    """

    tokens: Tensor
    ends: Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.tokens)


class VisionTower:
    """Pixels `(N, 3, H, W)` to stem output to image features `(N, embed_dim)`, not normalised."""

    def __init__(self, clip: FrozenClip, cut: int) -> None:
        self._clip, self._visual, self.cut = clip, clip.visual, cut
        self._num_stages = 2 + len(self._visual.transformer.resblocks)

    @torch.no_grad()
    def stem(self, pixels: Tensor) -> Tensor:
        """The part that no adapter changes."""
        with self._clip.autocast():
            return self._run(pixels, range(self.cut))

    def suffix(self, x: Tensor) -> Tensor:
        """The rest, from the stem's output to the features."""
        with self._clip.autocast():
            return self._run(x, range(self.cut, self._num_stages))

    def _run(self, x: Tensor, stages: range) -> Tensor:
        blocks = self._visual.transformer.resblocks
        for stage in stages:
            if stage == 0:
                x = self._visual._embeds(x)
            elif stage <= len(blocks):
                x = blocks[stage - 1](x)
            else:
                x = _project(self._visual._pool(x)[0], self._visual.proj)
        return x


class TextTower:
    """Prompts to stem output to text features `(P, embed_dim)`, not normalised."""

    def __init__(self, clip: FrozenClip, cut: int) -> None:
        self._clip, self._text, self.cut = clip, clip.text, cut
        self._num_stages = 2 + len(self._text.transformer.resblocks)
        # Only a causal tower that is read at the end-of-text token never looks at what stands behind it.
        self.is_cut_at_end = self._text.attn_mask is not None and clip.text_pool in ("argmax", "eos")

    def prompts(self, class_names: Sequence[str], templates: Sequence[str]) -> Prompts:
        """Tokenise every template for every class, cut behind the last end-of-text token where that is exact."""
        texts = [template.format(name) for name in class_names for template in templates]
        tokens = self._clip.tokenize(texts).to(self._clip.device)
        ends = self._ends(tokens)
        if self.is_cut_at_end:
            tokens = tokens[:, : int(ends.max()) + 1]
        return Prompts(tokens, ends, len(class_names))

    def _ends(self, tokens: Tensor) -> Tensor:
        """The position at which each of the prompts `(P, L)` is read, as `open_clip` pools it."""
        if self._clip.text_pool == "argmax":
            return tokens.argmax(dim=-1)
        if self._clip.text_pool == "eos":
            return torch.eq(tokens, self._clip.text_end_token).int().argmax(dim=-1)
        position = 0 if self._clip.text_pool == "first" else tokens.shape[1] - 1
        return torch.full((len(tokens),), position, device=tokens.device)

    @torch.no_grad()
    def stem(self, prompts: Prompts) -> Tensor:
        """The part that no adapter changes, `(P, ...)`."""
        with self._clip.autocast():
            return self._run(prompts.tokens, prompts.ends, range(self.cut))

    def suffix(self, x: Tensor, prompts: Prompts, num_clients: int) -> Tensor:
        """The rest: the stem's output, repeated for K clients `(K * P, ...)`, to features `(K * P, embed_dim)`."""
        with self._clip.autocast():
            return self._run(x, prompts.ends.repeat(num_clients), range(self.cut, self._num_stages))

    def _run(self, x: Tensor, ends: Tensor, stages: range) -> Tensor:
        text, blocks = self._text, self._text.transformer.resblocks
        for stage in stages:
            if stage == 0:
                x = text.token_embedding(x) + text.positional_embedding[: x.shape[1]]
            elif stage <= len(blocks):
                length = x.shape[1]
                mask = None if text.attn_mask is None else text.attn_mask[:length, :length]
                x = blocks[stage - 1](x, attn_mask=mask)
            else:
                # Each row is normalised by itself, so reading the row first gives the same numbers.
                read = x[torch.arange(len(x), device=x.device), ends]
                x = _project(text.ln_final(read), text.text_projection)
        return x


def _project(x: Tensor, projection: Tensor | nn.Linear | None) -> Tensor:
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


class AdaptedClip:
    """A frozen model, an adapter attached to it, and the prompts: all that local training and evaluation call."""

    def __init__(
        self, clip: FrozenClip, adapter: AttachedAdapter, *, class_names: Sequence[str], templates: Sequence[str]
    ) -> None:
        self.clip, self.adapter = clip, adapter
        self.device = clip.device
        self.vision = VisionTower(clip, adapter.trained_from["vision"])
        self.text = TextTower(clip, adapter.trained_from["text"])
        self.prompts = self.text.prompts(class_names, templates)
        self._text_stem = self.text.stem(self.prompts)

    def image_features(self, stem: Tensor, num_clients: int) -> Tensor:
        """Unit image features `(K, B, embed_dim)` from stem outputs `(K * B, ...)`, client-major."""
        features = self.vision.suffix(stem).float()
        return F.normalize(features, dim=-1).unflatten(0, (num_clients, -1))

    def class_features(self, num_clients: int) -> Tensor:
        """Unit text features of the classes, `(K, C, embed_dim)`; an ensemble's mean is normalised once more."""
        stem = self._text_stem
        repeated = stem.unsqueeze(0).expand(num_clients, *stem.shape).flatten(0, 1)
        features = F.normalize(self.text.suffix(repeated, self.prompts, num_clients).float(), dim=-1)
        ensembles = features.unflatten(0, (num_clients, self.prompts.num_classes, -1))
        return F.normalize(ensembles.mean(dim=2), dim=-1)

    def logit_scale(self) -> Tensor:
        """The factor of the cosine similarities, a scalar."""
        scale: Tensor = self.clip.model.logit_scale  # type: ignore[assignment]
        return scale.float().exp().reshape(())
