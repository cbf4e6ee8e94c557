"""Run a transformer block at some of its tokens alone, and project what a tower's head reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class AroundBlocks:
    """What an adapter does around the blocks of a tower, which are counted from 1.

    `before(number, x)` changes what a block gets, `(N, M, width)`. `after(number, given, x)` changes what it gives, `x`
    `(N, R, width)`, where `given` is what it got at the same tokens.
    """

    before: Callable[[int, Tensor], Tensor] | None = None
    after: Callable[[int, Tensor, Tensor], Tensor] | None = None


NOTHING = AroundBlocks()


def at(x: Tensor, reads: Tensor) -> Tensor:
    """The slots `reads` `(N, R)` of `x` `(N, M, d)`: `(N, R, d)`."""
    return x.gather(1, reads.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def block_at(block: Any, x: Tensor, reads: Tensor, mask: Tensor | None) -> Tensor:
    """`block(x)` at the slots `reads` alone: only keys and values are computed for the others."""
    if mask is not None:
        mask = mask.expand(len(x), -1, -1, -1)
        mask = mask.gather(2, reads[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
    normed = block.ln_1(x)
    attended = block.attn(at(normed, reads), normed, normed, need_weights=False, attn_mask=mask)[0]
    x = at(x, reads) + block.ls_1(attended)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def project(x: Tensor, projection: Tensor | nn.Linear | None) -> Tensor:
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection
