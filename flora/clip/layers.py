"""Low-rank adapters for K clients at once (LoRA, arXiv:2106.09685), beside frozen weights that are never written.

Everything here folds clients into the batch, client-major: an input of `(K * N, ..., d)` holds the N inputs of
client 0, then those of client 1, and so on. Only `LowRank` knows K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gelu(nn.GELU):
    """GELU, written over what a matrix product has just made where no gradient needs that: the same bits."""

    def forward(self, x: Tensor) -> Tensor:
        """`(...)` to `(...)`."""
        return super().forward(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


class Dropout:
    """Dropout masks from each client's own generator, so that they don't depend on who shares the block."""

    def __init__(self, fraction: float, generators: Sequence[torch.Generator]) -> None:
        self.fraction = fraction
        self.generators = generators

    def apply(self, x: Tensor) -> Tensor:
        """`x` `(K, M, d)` with the given fraction of numbers zeroed and the others scaled by 1 / (1 - fraction)."""
        shape = x.shape[1:]
        draws = torch.stack([torch.rand(shape, generator=generator) for generator in self.generators])
        return x * ((draws >= self.fraction) / (1 - self.fraction)).to(device=x.device, dtype=x.dtype)


class LowRank(nn.Module):
    """The term `scaling * B A x` beside one frozen matrix: equation 3 of arXiv:2106.09685, for K clients.

    `lora_A` is `(K, r, d_in)`, `lora_B` `(K, d_out, r)`. Both are plain tensors, put here by `attach` and taken away
    by `detach`; without them the layer adds nothing. They are not parameters: the model's state dict stays OpenCLIP's.
    `residual` is another such pair, `(R, d_in)` and `(d_out, R)`, which all clients share and dropout leaves alone.
    """

    lora_A: Tensor | None
    lora_B: Tensor | None
    residual: tuple[Tensor, Tensor] | None

    def __init__(self, d_in: int, d_out: int, scaling: float) -> None:
        super().__init__()
        self.d_in, self.d_out, self.scaling = d_in, d_out, scaling
        self.dropout: Dropout | None = None
        self.detach()

    def attach(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        dropout: Dropout | None = None,
        residual: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Use factors `(K, r, d_in)` and `(K, d_out, r)` from now on, a residual `(R, d_in)`, `(d_out, R)` too."""
        self.lora_A, self.lora_B, self.dropout, self.residual = lora_A, lora_B, dropout, residual

    def detach(self) -> None:
        """Add nothing from now on."""
        self.lora_A, self.lora_B, self.dropout, self.residual = None, None, None, None

    def forward(self, x: Tensor, frozen: Tensor) -> Tensor:
        """`frozen + scaling * B A x`; `x` is `(K * N, ..., d_in)`, `frozen` and the result `(K * N, ..., d_out)`."""
        if self.lora_A is None or self.lora_B is None:
            return frozen
        if self.residual is not None:
            residual_A, residual_B = self.residual
            frozen = frozen + F.linear(F.linear(x, residual_A) * self.scaling, residual_B)
        rows = x.reshape(self.lora_A.shape[0], -1, self.d_in)
        if self.dropout is not None:
            rows = self.dropout.apply(rows)
        low = torch.bmm(rows, self.lora_A.transpose(1, 2)) * self.scaling
        return frozen + torch.bmm(low, self.lora_B.transpose(1, 2)).view(frozen.shape)


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank term. It shares the layer's parameters and their names."""

    def __init__(self, linear: nn.Linear, low_rank: LowRank) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.low_rank = low_rank

    def forward(self, x: Tensor) -> Tensor:
        """`(K * N, ..., d_in)` to `(K * N, ..., d_out)`."""
        return self.low_rank(x, F.linear(x, self.weight, self.bias))


class LoraAttention(nn.Module):
    """A frozen `nn.MultiheadAttention` with low-rank terms on any of q, k, v and out.

    It shares the frozen module's parameters under their own names (`in_proj_weight`, `in_proj_bias`, `out_proj.*`),
    so checkpoints load before and after the replacement. Self-attention, batch first, of all tokens or of some of them;
    the mask may be one for each sequence, `(K * N, 1, R, L)`.
    """

    def __init__(self, attention: nn.MultiheadAttention | LoraAttention, low_rank: dict[str, LowRank]) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.in_proj_weight: Tensor = attention.in_proj_weight
        self.in_proj_bias: Tensor | None = attention.in_proj_bias
        self.out_proj: nn.Linear = attention.out_proj
        self.low_rank = nn.ModuleDict(low_rank)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Attention of `query` `(K * N, R, D)` to `key` `(K * N, L, D)`, with which `value` is the same tensor.

        Returns `(K * N, R, D)` and None.
        """
        return self.attend(query, key, attn_mask)[0], None

    def attend(self, query: Tensor, key: Tensor, attn_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attention as `forward` computes it, `(K * N, R, D)`, and the heads' keys `(K * N, H, L, D / H)`."""
        if query is key:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            width = query.shape[-1]
            bias = self.in_proj_bias
            biases = (None, None) if bias is None else (bias[:width], bias[width:])
            keys_and_values = F.linear(key, self.in_proj_weight[width:], biases[1])
            projected = (F.linear(query, self.in_proj_weight[:width], biases[0]), *keys_and_values.chunk(2, dim=-1))
        q, k, v = (
            self._add(target, x, part).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for target, x, part in zip("qkv", (query, key, key), projected, strict=True)
        )
        mask = None if attn_mask is None else attn_mask.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self._add("out", mixed, F.linear(mixed, self.out_proj.weight, self.out_proj.bias)), k

    def _add(self, target: str, x: Tensor, frozen: Tensor) -> Tensor:
        return self.low_rank[target](x, frozen) if target in self.low_rank else frozen
