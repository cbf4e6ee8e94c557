"""How many bytes travel: the length of the safetensors file that would really be sent."""

from __future__ import annotations

from functools import lru_cache

import safetensors.torch
import torch

from flora.tree import StateLike


def payload_bytes(state: StateLike) -> int:
    """The length in bytes of `state` as safetensors, header included."""
    return _payload_bytes(tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()))


@lru_cache(maxsize=64)
def _payload_bytes(layout: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> int:
    # The length depends on names, types and shapes alone.
    return len(safetensors.torch.save({name: torch.zeros(shape, dtype=dtype) for name, dtype, shape in layout}))
