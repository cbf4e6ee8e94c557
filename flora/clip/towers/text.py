"""The text tower, cut at the first stage that the adapter changes, and the prompts that go through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora.clip.frozen import FrozenClip
from flora.clip.towers.blocks import NOTHING, AroundBlocks, at, block_at, project
from flora.clip.towers.layout import Layout, Prompts
from flora.clip.towers.packing import one_by_one, pack
from flora.clip.towers.speed import ALL_SPEED, SpeedOptions
from flora.core.errors import UserError

LearnedPlaces = Callable[[Tensor, int, int], Tensor | None]
"""Where vectors are learned in place of words: see `AttachedAdapter.learned_places`."""

# Text tokens at once where no gradient is wanted: at width 768 an MLP's inner layer then takes 200 MB.
MAX_TEXT_TOKENS = 2**14


class TextTower:
    """Prompts to stem output to text features `(K * P, embed_dim)`, not normalised."""

    def __init__(
        self, clip: FrozenClip, cut: int, speed: SpeedOptions = ALL_SPEED, *, has_dropout: bool = False
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

    def prompts(
        self,
        class_names: Sequence[str],
        templates: Sequence[str],
        descriptions: Mapping[str, Sequence[str]] = MappingProxyType({}),
        learned_places: LearnedPlaces = lambda ends, length, num_classes: None,
    ) -> Prompts:
        """Tokenise every template for every class; cut and share what `speed` allows and the tower makes exact.

        `descriptions` are more sentences of some classes, by name; `{}` in them stands for it, too. `learned_places`
        says where vectors are learned, as `AttachedAdapter` does. Raises `UserError` if two classes have the same
        prompts, or if nothing of a class's name fits into one.
        """
        of_class = [(*templates, *descriptions.get(name, ())) for name in class_names]
        pairs = [(name, template) for name, own in zip(class_names, of_class, strict=True) for template in own]
        tokens = self._clip.tokenize([template.format(name) for name, template in pairs])
        full = [pair for pair, last in zip(pairs, tokens[:, -1].tolist(), strict=True) if last != 0]
        self.cut_prompts = self._cut_prompts(full, descriptions)
        numbers = [len(own) for own in of_class]
        _check_distinct(tokens, class_names, numbers)
        learned = learned_places(self._ends(tokens), tokens.shape[1], len(class_names))
        prompts = self._packed_prompts(tokens, len(class_names), learned)
        return prompts if len(set(numbers)) == 1 else _with_places(prompts, numbers)

    def texts(self, sentences: Sequence[str]) -> Prompts:
        """Tokenise sentences, each for itself: what goes into no class's prompt."""
        return self._packed_prompts(self._clip.tokenize(sentences), len(sentences))

    def _packed_prompts(self, tokens: Tensor, num_classes: int, learned: Tensor | None = None) -> Prompts:
        """The prompts `(P, L)` as this tower takes them, with vectors that are `learned` `(P, L)` in some places."""
        ends = self._ends(tokens)
        if not (self.is_cut_at_end and self._speed.cut_prompts):
            return replace(self._padded_prompts(tokens, ends, num_classes), learned=learned)
        # A token and the vector in its place are one number, so that prompts with different vectors share nothing.
        size = int(tokens.max()) + 1
        numbered = tokens if learned is None else tokens + (learned + 1) * size
        sequences = [row[: end + 1] for row, end in zip(numbered.tolist(), ends.tolist(), strict=True)]
        share = self._speed.share_prefixes and not self._has_dropout
        packing = pack(sequences, self._clip.architecture.text.width) if share else one_by_one(sequences)
        packed = torch.from_numpy(packing.tokens)
        return Prompts(
            tokens=packed if learned is None else packed % size,
            learned=None if learned is None else packed // size - 1,
            positions=torch.from_numpy(packing.positions),
            hidden=torch.from_numpy(~packing.visible),
            ends=torch.from_numpy(packing.ends),
            parents=torch.from_numpy(packing.parents).flatten() if share else None,
            num_classes=num_classes,
        )

    def _cut_prompts(self, full: Sequence[tuple[str, str]], descriptions: Mapping[str, Sequence[str]]) -> list[str]:
        """A line about those of the prompts (class name, template) that fill the context and are cut off, if any are.

        Raises `UserError` if nothing is left of a class's name.
        """
        longest = self._clip.architecture.context_length
        cut: dict[tuple[str, str], int] = {}
        for name, template in full:
            number = self._clip.num_tokens(template.format(name))
            # The start and the end of a text are among its tokens, and both keep their places.
            before, has_name, _ = template.partition("{}")
            setting = "prompts.descriptions" if template in descriptions.get(name, ()) else "prompts.templates"
            if number > longest and has_name and self._clip.num_tokens(before) >= longest:
                raise UserError(
                    f"{setting}: nothing of class {name!r} is left in {template!r}: the model reads {longest} "
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
            f"prompts.templates{' or prompts.descriptions' if descriptions else ''}"
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
        size = max(1, MAX_TEXT_TOKENS // tokens.shape[1])
        stages = range(min(self.cut, self._num_stages - 1))
        with self._clip.autocast():
            parts = [
                self._run(tokens[start : start + size], layout.sequences(start, start + size), stages)
                for start in range(0, len(tokens), size)
            ]
            return self._run(torch.cat(parts), layout, range(len(stages), self.cut))

    def suffix(
        self,
        stem: Tensor,
        layout: Layout,
        adapt: Callable[[Tensor, Layout], Tensor] = lambda x, layout: x,
        around: AroundBlocks = NOTHING,
    ) -> Tensor:
        """The rest, from the stem's output to the features of the layout's K clients, `(K * P, embed_dim)`.

        `adapt` changes tokens between stem and suffix, `around` says what is done around the blocks behind.
        """
        if self.trains_blocks and layout.slots is not None:
            stem = stem.flatten(0, 1)[layout.slots]
        elif layout.num_clients > 1:  # what is left takes the rows that are read
            stem = stem.repeat(layout.num_clients, *(1,) * (stem.dim() - 1))
        with self._clip.autocast():
            if self.trains_blocks:
                stem = adapt(stem, layout)
            return self._run(stem, layout, range(self.cut, self._num_stages), around)

    def release_stem(self) -> None:
        """Take the stem's weights out of memory, once nothing will run through it any more."""
        if self.cut > 0:
            self._text.token_embedding = self._text.positional_embedding = None
        for block in range(min(self.cut - 1, len(self._blocks))):
            self._blocks[block] = nn.Identity()

    def _run(self, x: Tensor, layout: Layout, stages: range, around: AroundBlocks = NOTHING) -> Tensor:
        text = self._text
        for stage in stages:
            if stage == 0:
                x = text.token_embedding(x) + text.positional_embedding[layout.positions]
            elif stage <= len(self._blocks):
                x = self._block(stage, x, layout, around)
            else:
                x = project(text.ln_final(x.flatten(0, 1)[layout.ends]), text.text_projection)
        return x

    def _block(self, number: int, x: Tensor, layout: Layout, around: AroundBlocks) -> Tensor:
        """Run a block, counted from 1; the last one gives the slots that are read alone."""
        block, mask, is_last = self._blocks[number - 1], layout.mask, number == len(self._blocks)
        given = x if around.before is None else around.before(number, x)
        if not is_last:
            x = block(given, attn_mask=mask)
        elif self._speed.trim_last_block:
            x = block_at(block, given, layout.reads, mask)
        else:
            x = at(block(given, attn_mask=mask), layout.reads)
        if around.after is None:
            return x
        return around.after(number, at(given, layout.reads) if is_last else given, x)


def with_classes(clip: FrozenClip, groups: Sequence[Sequence[str]], templates: Sequence[str]) -> FrozenClip:
    """Return `clip` with the unit text features of the classes of all `groups`, if its reduction of tokens reads them.

    An ensemble's mean is normalised once more. No adapter may be bound. Raises `UserError` as `TextTower.prompts` does.
    """
    if clip.tokens.is_idle or not clip.tokens.reads_classes:
        return clip
    features = [frozen_features(clip, names, templates) for names in groups if names]
    return replace(clip, token_classes=torch.cat(features))


def frozen_features(clip: FrozenClip, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return the frozen model's unit text features of classes `(C, embed_dim)`, which are means over templates.

    No adapter may be bound. Raises `UserError` as `TextTower.prompts` does.
    """
    tower = TextTower(clip, 2 + clip.architecture.text.num_layers)
    prompts = F.normalize(tower.stem(tower.prompts(class_names, templates)).to(clip.dtype), dim=-1)
    return F.normalize(prompts.unflatten(0, (len(class_names), -1)).mean(dim=1), dim=-1)


def _with_places(prompts: Prompts, numbers: Sequence[int]) -> Prompts:
    """Give each class as many places as the class with most prompts has; those left over hold its first prompt again.

    `prompts` are as many of each class as `numbers` says. A prompt in two places is encoded once where prompts share
    sequences.
    """
    counts = torch.tensor(numbers)
    places = torch.arange(int(counts.max())).expand(len(counts), -1)
    chosen = torch.where(places < counts.unsqueeze(1), places, 0) + (counts.cumsum(0) - counts).unsqueeze(1)
    return replace(prompts, ends=prompts.ends[chosen.flatten()], num_of_class=counts)


def _check_distinct(tokens: Tensor, class_names: Sequence[str], numbers: Sequence[int]) -> None:
    """Raise `UserError` if two classes have the same prompts: nothing could tell them apart."""
    seen: dict[tuple[int, ...], str] = {}
    for name, rows in zip(class_names, tokens.split(list(numbers)), strict=True):
        other = seen.setdefault(tuple(rows.flatten().tolist()), name)
        if other is not name:
            reason = "case and what lies beyond the context length don't count"
            raise UserError(f"prompts: classes {other!r} and {name!r} have the same prompts ({reason})")
