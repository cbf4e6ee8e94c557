"""The two towers of a model, each cut at the first stage that the adapter changes: frozen stem | trained suffix.

A tower is a row of stages: the embedding (0), its blocks (1 to n) and the head (n + 1). Stems run once, without
gradients; what they give is all that training and evaluation ever see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import PIL
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from flora.clip.adapters import AttachedAdapter
from flora.clip.backbone import FrozenClip
from flora.clip.packing import one_by_one, pack
from flora.errors import UserError
from flora.registry import Options, option


@dataclass(frozen=True)
class SpeedOptions(Options):
    """Ways to compute the same numbers faster; each can be switched off to measure what it brings."""

    cut_prompts: bool = option(
        "end prompts at their end-of-text token (causal text towers; with dropout the masks are drawn anew)", True
    )
    share_prefixes: bool = option(
        "compute tokens that prompts begin with in common once (needs cut_prompts; off where adapters have dropout, "
        "because each prompt has masks of its own)",
        True,
    )


@dataclass(frozen=True, eq=False)
class Prompts:
    """The tokenised prompts of all classes, class-major: T templates of class 0, then those of class 1.

    They are laid out in G sequences of M tokens: `tokens` and `positions` are int64 `(G, M)`, `mask` is added to the
    attention's logits, `(G, 1, M, M)` or `(1, 1, M, M)` or None, and prompt p of the P = C * T is read at slot
    `ends[p]` of the flattened `(G * M,)`.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor | None
    ends: Tensor
    num_classes: int


class VisionTower:
    """Pixels `(N, 3, H, W)` to stem output to image features `(N, embed_dim)`, not normalised."""

    def __init__(self, clip: FrozenClip, cut: int) -> None:
        self._clip, self._visual, self.cut = clip, clip.visual, cut
        self._num_stages = 2 + len(self._visual.transformer.resblocks)
        self.num_tokens = int(self._visual.positional_embedding.shape[0])

    @torch.no_grad()
    def stem(self, pixels: Tensor) -> Tensor:
        """The part that no adapter changes."""
        with self._clip.autocast():
            return self._run(pixels, range(self.cut))

    def suffix(self, x: Tensor) -> Tensor:
        """The rest, from the stem's output to the features."""
        with self._clip.autocast():
            return self._run(x, range(self.cut, self._num_stages))

    def stem_key(self) -> dict[str, Any]:
        """Everything but the images that the stem's output depends on, as JSON types."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._visual.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return {
            "weights": digest.hexdigest(),
            "model": json.loads(json.dumps(self._clip.config)),
            "cut": self.cut,
            "preprocess": json.loads(json.dumps(self._clip.preprocess_settings)),
            "precision": self._clip.precision,
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
            elif stage <= len(blocks):
                x = blocks[stage - 1](x)
            else:
                x = _project(self._visual._pool(x)[0], self._visual.proj)
        return x


class TextTower:
    """Prompts to stem output to text features `(P, embed_dim)`, not normalised."""

    def __init__(self, clip: FrozenClip, cut: int, *, has_dropout: bool = False) -> None:
        self._clip, self._text, self.cut, self.has_dropout = clip, clip.text, cut, has_dropout
        self._blocks = self._text.transformer.resblocks
        self._num_stages = 2 + len(self._blocks)
        # Only a causal tower that is read at the end-of-text token never looks at what stands behind it.
        self.is_cut_at_end = self._text.attn_mask is not None and clip.text_pool in ("argmax", "eos")

    def prompts(
        self, class_names: Sequence[str], templates: Sequence[str], speed: SpeedOptions = SpeedOptions()
    ) -> Prompts:
        """Tokenise every template for every class; cut and share what `speed` allows and the tower makes exact."""
        tokens = self._clip.tokenize([template.format(name) for name in class_names for template in templates])
        _check_distinct(tokens, class_names)
        ends = self._ends(tokens)
        if not (self.is_cut_at_end and speed.cut_prompts):
            return self._padded_prompts(tokens, ends, len(class_names))
        sequences = [row[: end + 1] for row, end in zip(tokens.tolist(), ends.tolist(), strict=True)]
        width = self._clip.architecture.text.width
        share = speed.share_prefixes and not self.has_dropout
        packing = pack(sequences, width) if share else one_by_one(sequences)
        hidden = torch.from_numpy(~packing.visible).unsqueeze(1)
        return Prompts(
            tokens=torch.from_numpy(packing.tokens).to(self._clip.device),
            positions=torch.from_numpy(packing.positions).to(self._clip.device),
            mask=torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf).to(self._clip.device),
            ends=torch.from_numpy(packing.ends).to(self._clip.device),
            num_classes=len(class_names),
        )

    def _padded_prompts(self, tokens: Tensor, ends: Tensor, num_classes: int) -> Prompts:
        """The prompts as OpenCLIP takes them: one by one, at full length, under the tower's own mask."""
        number, length = tokens.shape
        mask = self._text.attn_mask
        return Prompts(
            tokens=tokens.to(self._clip.device),
            positions=torch.arange(length, device=self._clip.device).expand(number, length),
            mask=None if mask is None else mask[:length, :length].unsqueeze(0).unsqueeze(0),
            ends=(torch.arange(number) * length + ends).to(self._clip.device),
            num_classes=num_classes,
        )

    def _ends(self, tokens: Tensor) -> Tensor:
        """The position at which each of the prompts `(P, L)` is read, as `open_clip` pools it."""
        if self._clip.text_pool == "argmax":
            return tokens.argmax(dim=-1)
        if self._clip.text_pool == "eos":
            return torch.eq(tokens, self._clip.text_end_token).int().argmax(dim=-1)
        position = 0 if self._clip.text_pool == "first" else tokens.shape[1] - 1
        return torch.full((len(tokens),), position)

    @torch.no_grad()
    def stem(self, prompts: Prompts) -> Tensor:
        """The part that no adapter changes: `(G, M, ...)`, or `(P, embed_dim)` if it is everything."""
        with self._clip.autocast():
            return self._run(prompts.tokens, prompts, range(self.cut), num_clients=1)

    def suffix(self, x: Tensor, prompts: Prompts, num_clients: int) -> Tensor:
        """The rest: the stem's output repeated for K clients, client-major, to features `(K * P, embed_dim)`."""
        with self._clip.autocast():
            return self._run(x, prompts, range(self.cut, self._num_stages), num_clients=num_clients)

    def release_stem(self) -> None:
        """Take the stem's weights out of memory, once nothing will run through it any more."""
        if self.cut > 0:
            self._text.token_embedding = self._text.positional_embedding = None
        for block in range(min(self.cut - 1, len(self._blocks))):
            self._blocks[block] = nn.Identity()

    def _run(self, x: Tensor, prompts: Prompts, stages: range, *, num_clients: int) -> Tensor:
        text, mask = self._text, prompts.mask
        if mask is not None and len(mask) > 1:
            mask = mask.repeat(num_clients, 1, 1, 1)
        for stage in stages:
            if stage == 0:
                x = text.token_embedding(x) + text.positional_embedding[prompts.positions.repeat(num_clients, 1)]
            elif stage <= len(self._blocks):
                x = self._blocks[stage - 1](x, attn_mask=mask)
            else:
                # Each row is normalised by itself, so reading the rows first gives the same numbers.
                read = x.unflatten(0, (num_clients, -1)).flatten(1, 2)[:, prompts.ends].flatten(0, 1)
                x = _project(text.ln_final(read), text.text_projection)
        return x


def _check_distinct(tokens: Tensor, class_names: Sequence[str]) -> None:
    """Raise `UserError` if two classes have the same prompts: nothing could tell them apart."""
    seen: dict[tuple[int, ...], str] = {}
    for name, rows in zip(class_names, tokens.unflatten(0, (len(class_names), -1)).flatten(1).tolist(), strict=True):
        other = seen.setdefault(tuple(rows), name)
        if other is not name:
            reason = "case and what lies beyond the context length don't count"
            raise UserError(f"prompts: classes {other!r} and {name!r} have the same prompts ({reason})")


def _project(x: Tensor, projection: Tensor | nn.Linear | None) -> Tensor:
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


class AdaptedClip:
    """A frozen model, an adapter attached to it, and the prompts: all that local training and evaluation call."""

    def __init__(
        self,
        clip: FrozenClip,
        adapter: AttachedAdapter,
        *,
        class_names: Sequence[str],
        templates: Sequence[str],
        speed: SpeedOptions = SpeedOptions(),
    ) -> None:
        self.clip, self.adapter = clip, adapter
        self.device = clip.device
        self.vision = VisionTower(clip, adapter.trained_from["vision"])
        self.text = TextTower(clip, adapter.trained_from["text"], has_dropout=adapter.has_dropout)
        self.prompts = self.text.prompts(class_names, templates, speed)
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

    def release_stems(self) -> None:
        """Take what is frozen in front of the adapters out of memory; from now on only features go in."""
        self.vision.release_stem()
        self.text.release_stem()

    def logit_scale(self) -> Tensor:
        """The factor of the cosine similarities, a scalar."""
        scale: Tensor = self.clip.model.logit_scale  # type: ignore[assignment]
        return scale.float().exp().reshape(())
