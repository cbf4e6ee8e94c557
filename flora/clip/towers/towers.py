"""The two towers of a model, each cut at the first stage that the adapter changes: frozen stem | trained suffix.

A tower is a row of stages: the embedding (0), its blocks (1 to n) and the head (n + 1). Stems run once, without
gradients; what they give is all that training and evaluation ever see.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import PIL
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from flora.clip.adapters.base import AttachedAdapter
from flora.clip.frozen import FrozenClip
from flora.clip.towers.layout import Layout, Prompts
from flora.clip.towers.packing import one_by_one, pack
from flora.core.errors import UserError
from flora.core.registry import Options, option
from flora.core.rng import Rng
from flora.core.tree import State, state_digest

# Text tokens through the stem at once: at width 768 an MLP's inner layer then takes 200 MB.
STEM_TOKENS = 2**14


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
    trim_last_block: bool = option(
        "a tower's last block computes only the tokens that are read (with dropout the masks are drawn anew)", True
    )
    batch_classes: bool = option(
        "objectives that look at a batch alone encode the prompts of its classes alone (off where adapters have "
        "dropout)",
        True,
    )
    cuda_graphs: bool = option(
        "on CUDA, record a local step once and replay it (off where adapters have dropout)", True
    )


class VisionTower:
    """Pixels `(N, 3, H, W)` to stem output to image features `(N, embed_dim)`, not normalised."""

    def __init__(self, clip: FrozenClip, cut: int, speed: SpeedOptions = SpeedOptions()) -> None:
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
                x = _block_at(blocks[stage - 1], x, torch.zeros(len(x), 1, dtype=torch.int64, device=x.device), None)
            elif stage <= len(blocks):
                x = blocks[stage - 1](x)
            else:
                x = _project(self._visual._pool(x)[0], self._visual.proj)
        return x


class TextTower:
    """Prompts to stem output to text features `(K * P, embed_dim)`, not normalised."""

    def __init__(
        self, clip: FrozenClip, cut: int, speed: SpeedOptions = SpeedOptions(), *, has_dropout: bool = False
    ) -> None:
        self._clip, self._text, self.cut = clip, clip.text, cut
        self._speed, self._has_dropout = speed, has_dropout
        self._blocks = self._text.transformer.resblocks
        self._num_stages = 2 + len(self._blocks)
        self.is_frozen = cut == self._num_stages
        self.cut_prompts: list[str] = []
        self.num_tokens_of_cut: dict[tuple[str, str], int] = {}
        self.trains_blocks = cut <= len(self._blocks)
        # Only a causal tower that is read at the end-of-text token never looks at what stands behind it.
        self.is_cut_at_end = self._text.attn_mask is not None and clip.text_pool in ("argmax", "eos")

    def prompts(self, class_names: Sequence[str], templates: Sequence[str]) -> Prompts:
        """Tokenise every template for every class; cut and share what `speed` allows and the tower makes exact.

        Raises `UserError` if two classes have the same prompts, or if nothing of a class's name fits into one.
        """
        pairs = [(name, template) for name in class_names for template in templates]
        tokens = self._clip.tokenize([template.format(name) for name, template in pairs])
        full = [pair for pair, last in zip(pairs, tokens[:, -1].tolist(), strict=True) if last != 0]
        self.cut_prompts = self._cut_prompts(full)
        _check_distinct(tokens, class_names)
        ends = self._ends(tokens)
        if not (self.is_cut_at_end and self._speed.cut_prompts):
            return self._padded_prompts(tokens, ends, len(class_names))
        sequences = [row[: end + 1] for row, end in zip(tokens.tolist(), ends.tolist(), strict=True)]
        share = self._speed.share_prefixes and not self._has_dropout
        packing = pack(sequences, self._clip.architecture.text.width) if share else one_by_one(sequences)
        return Prompts(
            tokens=torch.from_numpy(packing.tokens),
            positions=torch.from_numpy(packing.positions),
            hidden=torch.from_numpy(~packing.visible),
            ends=torch.from_numpy(packing.ends),
            parents=torch.from_numpy(packing.parents).flatten() if share else None,
            num_classes=len(class_names),
        )

    def _cut_prompts(self, full: Sequence[tuple[str, str]]) -> list[str]:
        """A line about those of the prompts (class name, template) that fill the context and are cut off, if any are.

        Raises `UserError` if nothing is left of a class's name.
        """
        longest = self._clip.architecture.context_length
        cut: dict[tuple[str, str], int] = {}
        for name, template in full:
            number = self._clip.num_tokens(template.format(name))
            # The start and the end of a text are among its tokens, and both keep their places.
            if number > longest and self._clip.num_tokens(template.partition("{}")[0]) >= longest:
                raise UserError(
                    f"prompts.templates: nothing of class {name!r} is left in {template!r}: the model reads {longest} "
                    "tokens; shorten what precedes {}"
                )
            if number > longest:
                cut[name, template] = number
        self.num_tokens_of_cut = cut
        if not cut:
            return []
        (name, _), number = max(cut.items(), key=lambda item: item[1])
        return [
            f"the model reads {longest} tokens of a prompt: {len(cut)} prompts of {len({name for name, _ in cut})} "
            f"classes are cut off, the longest is of class {name!r}, {number} tokens; shorten prompts.class_names or "
            "prompts.templates"
        ]

    def _padded_prompts(self, tokens: Tensor, ends: Tensor, num_classes: int) -> Prompts:
        """The prompts as OpenCLIP takes them: one by one, at full length, under the tower's own mask."""
        number, length = tokens.shape
        mask = self._text.attn_mask
        return Prompts(
            tokens=tokens,
            positions=torch.arange(length).expand(number, length),
            hidden=None if mask is None else mask[:length, :length].isneginf().cpu().unsqueeze(0),
            ends=torch.arange(number) * length + ends,
            parents=None,
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
        """The part that no adapter changes, for all prompts: `(G, M, ...)`, `(G, R, width)` if only the head is behind
        it, or `(P, embed_dim)` if it is everything."""
        layout, tokens = prompts.layout.to(self._clip.device), prompts.tokens.to(self._clip.device)
        size = max(1, STEM_TOKENS // tokens.shape[1])
        stages = range(min(self.cut, self._num_stages - 1))
        with self._clip.autocast():
            parts = [
                self._run(tokens[start : start + size], layout.sequences(start, start + size), stages)
                for start in range(0, len(tokens), size)
            ]
            return self._run(torch.cat(parts), layout, range(len(stages), self.cut))

    def suffix(
        self, stem: Tensor, layout: Layout, adapt: Callable[[Tensor, Tensor], Tensor] = lambda x, positions: x
    ) -> Tensor:
        """The rest, from the stem's output to the features of the layout's K clients, `(K * P, embed_dim)`.

        `adapt` changes tokens between stem and suffix.
        """
        if self.trains_blocks and layout.slots is not None:
            stem = stem.flatten(0, 1)[layout.slots]
        elif layout.num_clients > 1:  # what is left takes the rows that are read
            stem = stem.repeat(layout.num_clients, *(1,) * (stem.dim() - 1))
        with self._clip.autocast():
            if self.trains_blocks:
                stem = adapt(stem, layout.positions)
            return self._run(stem, layout, range(self.cut, self._num_stages))

    def release_stem(self) -> None:
        """Take the stem's weights out of memory, once nothing will run through it any more."""
        if self.cut > 0:
            self._text.token_embedding = self._text.positional_embedding = None
        for block in range(min(self.cut - 1, len(self._blocks))):
            self._blocks[block] = nn.Identity()

    def _run(self, x: Tensor, layout: Layout, stages: range) -> Tensor:
        text, mask = self._text, layout.mask
        for stage in stages:
            if stage == 0:
                x = text.token_embedding(x) + text.positional_embedding[layout.positions]
            elif stage < len(self._blocks):
                x = self._blocks[stage - 1](x, attn_mask=mask)
            elif stage == len(self._blocks):
                if self._speed.trim_last_block:
                    x = _block_at(self._blocks[stage - 1], x, layout.reads, mask)
                else:
                    x = _at(self._blocks[stage - 1](x, attn_mask=mask), layout.reads)
            else:
                x = _project(text.ln_final(x.flatten(0, 1)[layout.ends]), text.text_projection)
        return x


def _at(x: Tensor, reads: Tensor) -> Tensor:
    """The slots `reads` `(N, R)` of `x` `(N, M, d)`: `(N, R, d)`."""
    return x.gather(1, reads.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _block_at(block: Any, x: Tensor, reads: Tensor, mask: Tensor | None) -> Tensor:
    """`block(x)` at the slots `reads` alone: only keys and values are computed for the others."""
    if mask is not None:
        mask = mask.expand(len(x), -1, -1, -1)
        mask = mask.gather(2, reads[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
    normed = block.ln_1(x)
    attended = block.attn(_at(normed, reads), normed, normed, need_weights=False, attn_mask=mask)[0]
    x = _at(x, reads) + block.ls_1(attended)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


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
        self.clip, self.adapter, self.speed = clip, adapter, speed
        self.class_names, self.templates = tuple(class_names), tuple(templates)
        self.device = clip.device
        if clip.precision == "bf16" and not adapter.is_large:  # large ones start from the weights themselves
            clip.keep_matrices_in_bf16()
        self.vision = VisionTower(clip, adapter.trained_from["vision"], speed)
        self.text = TextTower(clip, adapter.trained_from["text"], speed, has_dropout=adapter.has_dropout)
        self.prompts = self.text.prompts(class_names, templates)
        self._text_stem = self.text.stem(self.prompts)
        self._selects = speed.batch_classes and not adapter.has_dropout and self.text.trains_blocks
        # For all classes, each for more clients than the one before. None is dropped: recorded steps point into them.
        self._layouts = [self.prompts.for_clients(1).to(self.device)]
        self._frozen_features = self._encode_classes(self._layouts[0]) if self.text.is_frozen else None
        self._unadapted: Tensor | None = None

    def image_features(self, stem: Tensor, num_clients: int) -> Tensor:
        """Unit image features `(K, B, embed_dim)` from stem outputs `(K * B, ...)`, client-major."""
        features = self.vision.suffix(self.adapter.adapt_patches(stem)).to(self.clip.dtype)
        return F.normalize(self.adapter.adapt_images(features.unflatten(0, (num_clients, -1))), dim=-1)

    def class_features(self, num_clients: int, classes: Tensor | None = None) -> Tensor:
        """Unit text features, `(K, C, embed_dim)`: of all classes, or of each client's own `classes` `(K, C)`.

        An ensemble's mean is normalised once more.
        """
        if self._frozen_features is not None:
            return self.adapter.adapt_classes(self._frozen_features.expand(num_clients, -1, -1))
        if classes is not None:
            return self._encode_classes(self.prompts.of_classes(classes).to(self.device))
        if num_clients > self._layouts[-1].num_clients:
            self._layouts.append(self.prompts.for_clients(num_clients).to(self.device))
        return self._encode_classes(self._layouts[-1].first(num_clients))

    @torch.no_grad()
    def frozen_class_features(self) -> Tensor:
        """The classes' unit features `(C, embed_dim)` without an adapter, computed once. None may be bound then."""
        if self._unadapted is None:
            self._unadapted = self.class_features(1)[0]
        return self._unadapted

    def _encode_classes(self, layout: Layout) -> Tensor:
        features = self.text.suffix(self._text_stem, layout, self.adapter.adapt_tokens).to(self.clip.dtype)
        features = F.normalize(features, dim=-1)
        num_templates = len(self.prompts.ends) // self.prompts.num_classes
        ensembles = features.unflatten(0, (layout.num_clients, -1, num_templates))
        return F.normalize(ensembles.mean(dim=2), dim=-1)

    def select_classes(self, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return what to encode if only the classes among `labels` `(K, B)` (on the CPU) matter.

        Returns the classes `(K, C)`, rows with fewer filled up with one of their own, and the labels `(K, B)` as places
        among them; None if it is to be all classes, because that costs no more or is wanted.
        """
        if not self._selects:
            return None
        present = torch.zeros(len(labels), self.prompts.num_classes, dtype=torch.bool).scatter_(1, labels, True)
        most = int(present.sum(dim=1).max())
        if most == self.prompts.num_classes:
            return None
        classes = (~present).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        classes = torch.where(present.gather(1, classes), classes, classes[:, :1])
        return classes, (present.cumsum(dim=1) - 1).gather(1, labels)

    def initial_adapter(self, rng: Rng) -> State:
        """The adapter that the server starts from."""
        with torch.no_grad():
            return self.adapter.initial_state(rng, self.class_features(1)[0])

    def release_stems(self) -> None:
        """Take what is frozen in front of the adapters out of memory; from now on only features go in."""
        self.vision.release_stem()
        self.text.release_stem()

    def logit_scale(self) -> Tensor:
        """The factor of the cosine similarities, a scalar."""
        scale: Tensor = self.clip.model.logit_scale  # type: ignore[assignment]
        return scale.to(self.clip.dtype).exp().reshape(())
