"""Which tokens of an image the vision tower goes on with: all, or fewer after similar ones are merged or others pooled.

A token that stands for several has a size, the number of tokens that went into it; attention counts it as often.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora.clip.layers import LoraAttention
from flora.clip.towers.blocks import project
from flora.core.counts import part_of
from flora.core.errors import UserError
from flora.core.registry import Component, OptionError, name_of, option, register
from flora.core.tree import state_digest


@dataclass(frozen=True, eq=False)
class Grouping:
    """Which of M tokens become one: token m of image n goes into token `groups[n, m]` of `number`; `(N, M)` int64."""

    groups: Tensor
    number: int


@dataclass(frozen=True)
class TokenReduction(Component):
    """Which tokens of an image the vision tower goes on with."""

    reads_classes: ClassVar[bool] = False
    """Whether it compares patches with the text features of the run's classes."""

    @property
    def is_idle(self) -> bool:
        """Whether all tokens stay as they are."""
        return False

    def check_fits(self, num_layers: int) -> None:
        """Raise `OptionError` where the options don't fit a vision tower of `num_layers` blocks."""

    def first_block(self, num_layers: int) -> int:
        """Return the number of the first block that reduces the tokens, counted from 1."""
        return 1

    def inside_block(self, keys: Tensor) -> Grouping | None:
        """Group tokens between a block's attention and its MLP, by the keys `(N, M, d)`; None: all stay."""
        return None

    def after_block(self, patches: Callable[[], Tensor], classes: Tensor | None) -> Grouping | None:
        """Group tokens behind the first block, by what `patches()` `(N, M - 1, embed_dim)` says of each patch.

        `classes` `(C, embed_dim)` are unit text features, if `reads_classes`. None: all tokens stay.
        """
        return None


@register("none")
@dataclass(frozen=True)
class AllTokens(TokenReduction):
    """All of them, as the model was trained."""

    @property
    def is_idle(self) -> bool:
        return True


@register("merge")
@dataclass(frozen=True)
class Merge(TokenReduction):
    """In each block the most similar patches are merged (token merging, arXiv:2210.09461; arXiv:2310.03291).

    Between attention and MLP. Every second patch looks for the most similar of the others, by the cosine of the
    attention's keys, averaged over the heads; the `per_layer` most similar
    pairs become their means, weighted by size. The class token stays alone. Attention is proportional (equation 1):
    the logarithm of a token's size is added to its logits.

    Differs from the second paper: that one merges what goes into a language model, and trains with it.
    """

    per_layer: int = option(
        "patches that each block merges into others, at most half of those there are", 8, at_least=0
    )

    @property
    def is_idle(self) -> bool:
        return self.per_layer == 0

    def inside_block(self, keys: Tensor) -> Grouping | None:
        number = min(self.per_layer, (keys.shape[1] - 1) // 2)
        return match(keys, number) if number else None


@register("text_relevance")
@dataclass(frozen=True)
class TextRelevance(TokenReduction):
    """Behind one block the patches most like any class's text stay; the others become one (after arXiv:2305.19924).

    A patch's relevance is the highest cosine of its features (by the tower's final norm and projection) with the frozen
    text features of the classes, of the templates alone. The other patches become their mean, weighted by size;
    attention is proportional from then on, as with `merge`.

    Differs from the paper: there a network is trained that makes the tokens out of image and text, again in each layer
    that joins the two. CLIP's towers never meet before their outputs, and are frozen: so the choice is made once, by
    the output space that they share, and nothing is trained for it.
    """

    reads_classes = True
    keep: float = option("share of the patches that stay, rounded up", 0.5, above=0, at_most=1)
    after: int | None = option(
        "the block behind which the others are pooled; none: half of the blocks", None, at_least=1
    )

    @property
    def is_idle(self) -> bool:
        return self.keep == 1

    def check_fits(self, num_layers: int) -> None:
        if self.is_idle:
            return
        if num_layers < 2:
            raise OptionError(
                "after", "expected a vision tower of two blocks or more: behind the last nothing is saved"
            )
        if self.after is not None and self.after >= num_layers:
            reason = f"because the vision tower has {num_layers} blocks"
            raise OptionError("after", f"expected at most {num_layers - 1}, {reason}, got {self.after}")

    def first_block(self, num_layers: int) -> int:
        return num_layers // 2 if self.after is None else self.after

    def after_block(self, patches: Callable[[], Tensor], classes: Tensor | None) -> Grouping | None:
        if classes is None:
            raise ValueError("text_relevance needs the text features of the classes: see `with_classes`")
        features = patches()
        number = features.shape[1]
        kept = max(math.ceil(part_of(self.keep, number)), 1)
        return choose(F.normalize(features, dim=-1), classes, kept) if kept < number else None


@torch.no_grad()
def match(keys: Tensor, number: int) -> Grouping:
    """Group the `number` most similar pairs of patches, by keys `(N, M, d)`, the class token's first.

    Of the patches 1, 2, 3, ... the even ones look for partners among the odd ones, as in the paper's own code; what is
    left of them precedes the odd ones. Of what is equally similar, the first is taken.
    """
    with torch.autocast(keys.device.type, enabled=False):
        unit = F.normalize(_exact(keys[:, 1:]), dim=-1)
        similarity, partner = (unit[:, 1::2] @ unit[:, ::2].transpose(1, 2)).max(dim=-1)
    order = similarity.argsort(dim=-1, descending=True, stable=True)
    is_merged = torch.zeros_like(partner, dtype=torch.bool).scatter_(1, order[:, :number], True)
    first_partner = 1 + is_merged.shape[1] - number
    groups = torch.zeros(keys.shape[:2], dtype=torch.int64, device=keys.device)
    groups[:, 1::2] = torch.arange(first_partner, keys.shape[1] - number, device=keys.device)
    groups[:, 2::2] = torch.where(is_merged, first_partner + partner, (~is_merged).cumsum(dim=1))
    return Grouping(groups, keys.shape[1] - number)


@torch.no_grad()
def choose(patches: Tensor, classes: Tensor, kept: int) -> Grouping:
    """Group all but the `kept` patches that are most like a class, by unit features `(N, P, E)` and `(C, E)`.

    Those that stay keep their order; the group of the others is the last.
    """
    with torch.autocast(patches.device.type, enabled=False):
        patches = _exact(patches)
        relevance = (patches @ classes.to(patches.dtype).T).amax(dim=-1)
    order = relevance.argsort(dim=-1, descending=True, stable=True)
    stays = torch.zeros_like(relevance, dtype=torch.bool).scatter_(1, order[:, :kept], True)
    groups = torch.where(stays, stays.cumsum(dim=1), kept + 1)
    return Grouping(F.pad(groups, (1, 0)), kept + 2)


def merge(x: Tensor, sizes: Tensor, grouping: Grouping) -> tuple[Tensor, Tensor]:
    """The groups' means weighted by size, `(N, M', D)`, and their sizes `(N, M')`, from `(N, M, D)` and `(N, M)`.

    A product with a dense matrix `(N, M', M)`: the same bits at each call on CUDA, and differentiable. A token that is
    alone in its group stays as it is, bit for bit.
    """
    numbers = torch.arange(grouping.number, device=x.device).unsqueeze(1)
    members = torch.where(grouping.groups.unsqueeze(1) == numbers, sizes.unsqueeze(1), 0.0)
    merged = members.sum(dim=-1)
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm((members / merged.unsqueeze(-1)).to(x.dtype), x), merged


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def ones(x: Tensor) -> Tensor:
    """Sizes `(N, M)` of tokens `x` `(N, M, D)` none of which stands for others."""
    return torch.ones(x.shape[:2], dtype=_exact(x[:0]).dtype, device=x.device)


def pack_sizes(x: Tensor, sizes: Tensor, num_patches: int) -> Tensor:
    """Put sizes `(N, M)` behind the width of `x` `(N, M, D)`: `(N, M, D + 1)`, of the same type, exactly.

    bf16 has all whole numbers up to 256; where there are more patches it takes two columns, `size // 256` first.
    """
    columns = sizes.unsqueeze(-1)
    if _num_columns(x, num_patches) == 2:
        columns = torch.cat([columns // 256, columns % 256], dim=-1)
    return torch.cat([x, columns.to(x.dtype)], dim=-1)


def unpack_sizes(packed: Tensor, num_patches: int) -> tuple[Tensor, Tensor]:
    """The tokens and sizes that `pack_sizes` put together."""
    width = packed.shape[-1] - _num_columns(packed, num_patches)
    columns = _exact(packed[..., width:])
    sizes = columns[..., 0] if columns.shape[-1] == 1 else columns[..., 0] * 256 + columns[..., 1]
    return packed[..., :width], sizes


def _num_columns(x: Tensor, num_patches: int) -> int:
    return 2 if x.dtype == torch.bfloat16 and num_patches > 256 else 1


class Reducer:
    """Runs the blocks of a vision tower so that fewer and fewer tokens go through them.

    The tower's attention has to be ours (`LoraAttention`). `classes` `(C, embed_dim)` are unit text features, for a
    reduction that reads them. Raises `OptionError` where the reduction doesn't fit the tower.
    """

    def __init__(self, visual: Any, reduction: TokenReduction, classes: Tensor | None = None) -> None:
        num_layers = len(visual.transformer.resblocks)
        reduction.check_fits(num_layers)
        if reduction.reads_classes and not reduction.is_idle and classes is None:
            raise ValueError(f"{name_of(reduction)} needs the text features of the classes: see `with_classes`")
        self._visual, self._reduction, self._classes = visual, reduction, classes
        self.first = reduction.first_block(num_layers)

    def key(self) -> dict[str, Any]:
        """The options and a digest of the text features, as JSON types."""
        classes = {} if self._classes is None else {"classes": state_digest({"classes": self._classes})}
        return {"name": name_of(self._reduction), **asdict(self._reduction), **classes}

    def block(self, number: int, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run block `number`, counted from 1, on tokens `(N, M, D)`; return what is left of them.

        `sizes` `(N, M)` is None as long as all are 1.
        """
        block = self._visual.transformer.resblocks[number - 1]
        if sizes is None and number < self.first:
            return block(x), None
        normed = block.ln_1(x)
        attended, keys = block.attn.attend(normed, normed, size_mask(sizes))
        x = x + block.ls_1(attended)
        x, sizes = _grouped(x, sizes, self._reduction.inside_block(keys.mean(dim=1)))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
        if number == self.first:
            x, sizes = _grouped(x, sizes, self._reduction.after_block(lambda: self._patch_features(x), self._classes))
        return x, sizes

    @torch.no_grad()
    def _patch_features(self, x: Tensor) -> Tensor:
        return project(self._visual.ln_post(x[:, 1:]), self._visual.proj)


def _grouped(x: Tensor, sizes: Tensor | None, grouping: Grouping | None) -> tuple[Tensor, Tensor | None]:
    return (x, sizes) if grouping is None else merge(x, ones(x) if sizes is None else sizes, grouping)


def size_mask(sizes: Tensor | None) -> Tensor | None:
    """What proportional attention adds to its logits, `(N, 1, 1, M)`: the logarithms of the sizes `(N, M)`."""
    return None if sizes is None else sizes.log()[:, None, None, :]


def pool(visual: Any, x: Tensor, sizes: Tensor | None) -> Tensor:
    """The tokens `(N, M, D)` as one `(N, D)`, as the tower pools them; a mean counts each patch by its size."""
    if sizes is None or visual.pool_type != "avg":
        pooled: Tensor = visual._pool(x)[0]
        return pooled
    weights = (sizes[:, 1:] / sizes[:, 1:].sum(dim=1, keepdim=True)).unsqueeze(-1).to(x.dtype)
    if visual.final_ln_after_pool:
        pooled = visual.ln_post((x[:, 1:] * weights).sum(dim=1))
    else:
        pooled = (visual.ln_post(x)[:, 1:] * weights).sum(dim=1)
    return pooled


def reduce_tokens(model: Any, reduction: TokenReduction, classes: Tensor | None = None) -> Any:
    """Make a plain OpenCLIP model encode images with fewer tokens, as a run with `backbone.tokens` does; return it.

    For weights that `flora export` wrote, or any others. No weight changes; `model.visual.forward` and the attention's
    class do, so the names in the state dict stay. `classes` `(C, embed_dim)` are the unit text features of all classes
    of the run, which `text_relevance` compares patches with: those of the model before it was adapted. A reduction
    takes the place of an earlier one; `AllTokens()` takes it away. Raises `UserError` if the model's vision tower isn't
    a ViT of OpenCLIP's own that gives one vector an image, `OptionError` if the reduction doesn't fit it.
    """
    visual = model.visual
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", ())
    kinds = (nn.MultiheadAttention, LoraAttention)
    is_known = len(blocks) > 0 and all(isinstance(getattr(block, "attn", None), kinds) for block in blocks)
    if not is_known or visual.output_tokens or visual.pool_type not in ("tok", "avg") or visual.attn_pool is not None:
        raise UserError(f"a vision tower of class {type(visual).__name__} has no tokens that can be reduced")
    reducer = Reducer(visual, reduction, classes)
    vars(visual).pop("forward", None)
    if reduction.is_idle:
        return model
    for block in blocks:
        block.attn = LoraAttention(block.attn, {})

    def forward(pixels: Tensor) -> Tensor:
        x, sizes = visual._embeds(pixels), None
        for number in range(1, len(blocks) + 1):
            x, sizes = reducer.block(number, x, sizes)
        return project(pool(visual, x, sizes), visual.proj)

    visual.forward = forward
    return model
