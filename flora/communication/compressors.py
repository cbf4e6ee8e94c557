"""Compressors: pack tensors into bytes for the way between server and clients, and unpack them.

The receiver knows names and shapes, and the options. Numbers are little-endian.
"""

from __future__ import annotations

import math
import struct
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from flora.core import tree
from flora.core.counts import part_of
from flora.core.low_rank import factor_of
from flora.core.registry import Component, OptionError, option, register
from flora.core.rng import Rng
from flora.core.tree import State, StateLike


@dataclass(frozen=True)
class Compressor(Component):
    """How tensors are written for the way."""

    is_identity: ClassVar[bool] = False
    """Whether what is read is what was written."""
    is_for_deltas: ClassVar[bool] = False
    """Whether it leaves numbers out, which must not be weights."""

    @abstractmethod
    def encode(self, state: StateLike, rng: Rng) -> bytes:
        """The bytes that travel, of finite numbers: floats as fp32, in fp64 runs too. `rng` draws what is random."""

    @abstractmethod
    def decode(self, payload: bytes, like: StateLike) -> State:
        """Return what the receiver makes of them; `like` has the names, shapes and types that it works with."""


@register("none")
@dataclass(frozen=True)
class NoCompression(Compressor):
    """All numbers, as they are: the bytes of a safetensors file are counted."""

    is_identity = True

    def encode(self, state: StateLike, rng: Rng) -> bytes:
        return b"".join(_bytes_of(tensor) for tensor in state.values())

    def decode(self, payload: bytes, like: StateLike) -> State:
        reader = _Reader(payload)
        return {
            name: reader.floats(tensor.numel()).view(tensor.shape).to(tensor.dtype) for name, tensor in like.items()
        }


# Quantisers


@dataclass(frozen=True)
class Quantizer(Compressor):
    """Each number as a code of `bits` bits, times a scale in fp32. Zeros have a scale of zero, and stay zeros."""

    bits: int = option("bits a number: 1 to 8, or 32 for the numbers as they are", 8, at_least=1, at_most=32)
    scales: str = option(
        "a scale for each tensor, or for each rank: a row of A, a column of B, a row of any other matrix",
        "tensor",
        choices=("tensor", "rank"),
    )
    rounding: str = option(
        "to the nearest value, or at random to one of the two around a number, so that the mean is the number",
        "nearest",
        choices=("nearest", "stochastic"),
    )

    def check(self) -> None:
        if 8 < self.bits < 32:
            raise OptionError("bits", f"expected 1 to 8, or 32, got {self.bits}")

    @property
    def is_identity(self) -> bool:  # type: ignore[override]
        return self.bits == 32

    @abstractmethod
    def values(self) -> Tensor:
        """Return the number that each code stands for, `(2^bits,)`: rising from -1 to 1, in double precision."""

    def encode(self, state: StateLike, rng: Rng) -> bytes:
        if self.is_identity:
            return NoCompression().encode(state, rng)
        return b"".join(
            self._encode_rows(_rows(name, tensor, self.scales), rng.child(name)) for name, tensor in state.items()
        )

    def decode(self, payload: bytes, like: StateLike) -> State:
        if self.is_identity:
            return NoCompression().decode(payload, like)
        reader, values, decoded = _Reader(payload), self.values().float(), {}
        for name, tensor in like.items():
            rows = _rows(name, tensor, self.scales)
            scales = reader.floats(len(rows)).unsqueeze(1)
            codes = reader.codes(rows.numel(), self.bits).view(rows.shape)
            decoded[name] = _from_rows(name, values[codes] * scales, tensor).to(tensor.dtype)
        return decoded

    def _encode_rows(self, rows: Tensor, rng: Rng) -> bytes:
        """The scales of rows `(R, n)`, then their codes."""
        sizes = rows.double().abs()
        # A sign alone is nearest to the numbers at their mean size; to be right on average it needs the largest.
        is_sign = self.bits == 1 and self.rounding == "nearest"
        scales = (sizes.mean(dim=1) if is_sign else sizes.amax(dim=1)).float()
        # Rounded to fp32 the scale may be a little too small for the largest number.
        scaled = (rows.contiguous().double() / scales.double().clamp(min=1e-300).unsqueeze(1)).clamp(-1, 1)
        values = self.values()
        above = torch.bucketize(scaled, values).clamp(1, len(values) - 1)
        share = (scaled - values[above - 1]) / (values[above] - values[above - 1])
        threshold = torch.full_like(share, 0.5)
        if self.rounding == "stochastic":
            threshold = torch.rand(share.shape, generator=rng.torch(), dtype=share.dtype)
        codes = above - (share <= threshold).long()
        return _bytes_of(scales) + pack(codes.flatten(), self.bits)


@register("uniform")
@dataclass(frozen=True)
class UniformQuantizer(Quantizer):
    """2^bits - 1 equidistant values, zero in the middle; with one bit the sign (FedLPP, arXiv:2406.10976)."""

    def values(self) -> Tensor:
        return torch.linspace(-1, 1, max(2**self.bits - 1, 2), dtype=torch.float64)


@register("normal_float")
@dataclass(frozen=True)
class NormalFloat(Quantizer):
    """2^bits quantiles of a normal distribution, zero among them; with one bit the sign (QLoRA, arXiv:2305.14314)."""

    def values(self) -> Tensor:
        return _normal_float(self.bits)


@lru_cache(maxsize=8)
def _normal_float(bits: int) -> Tensor:
    """The code book: 2^(bits - 1) positive values, one fewer negative ones, and zero."""
    if bits == 1:
        return torch.tensor([-1.0, 1.0], dtype=torch.float64)
    half = 2 ** (bits - 1)
    # Halfway between the last quantiles that 2^bits and 2^bits - 1 equal shares of the distribution have.
    last = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    positive, negative = (
        torch.special.ndtri(torch.linspace(last, 0.5, number + 1, dtype=torch.float64))[:-1]
        for number in (half, half - 1)
    )
    values = torch.cat([-negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return values / values[-1]


# Masks


@dataclass(frozen=True)
class Mask(Compressor):
    """A share of the numbers, as they are; the others are read as zeros: for deltas, never for weights."""

    is_for_deltas = True
    fraction: float = option("share of the numbers that are sent, at least one of them", 0.1, above=0, at_most=1)


@register("top_k")
@dataclass(frozen=True)
class TopK(Mask):
    """The largest numbers (selective masking, arXiv:2003.09603, algorithm 4), and their places."""

    scope: str = option("the share of each tensor, or of all tensors together", "tensor", choices=("tensor", "global"))

    def groups(self, state: StateLike) -> list[Tensor]:
        """The state's numbers as vectors `(n,)`, of each of which the share is sent."""
        return [tree.flatten(state)] if self.scope == "global" else [tensor.flatten() for tensor in state.values()]

    def encode(self, state: StateLike, rng: Rng) -> bytes:
        parts = []
        for vector in self.groups(state):
            places = _largest(vector.abs(), _share(self.fraction, len(vector)))
            parts += [write_places(places, len(vector)), _bytes_of(vector[places])]
        return b"".join(parts)

    def decode(self, payload: bytes, like: StateLike) -> State:
        reader, vectors = _Reader(payload), []
        for vector in self.groups(like):
            places = reader.places(_share(self.fraction, len(vector)), len(vector))
            vectors.append(torch.zeros(len(vector)).index_copy(0, places, reader.floats(len(places))))
        return tree.in_types_of(like, tree.unflatten(torch.cat(vectors), like))


@register("random_mask")
@dataclass(frozen=True)
class RandomMask(Mask):
    """Numbers drawn at random (arXiv:2003.09603, algorithm 3). The seed that they are drawn with is sent: 8 bytes."""

    def encode(self, state: StateLike, rng: Rng) -> bytes:
        vector, seed = tree.flatten(state), rng.seed64()
        return struct.pack("<Q", seed) + _bytes_of(vector[self._places(len(vector), seed)])

    def decode(self, payload: bytes, like: StateLike) -> State:
        (seed,) = struct.unpack("<Q", payload[:8])
        places = self._places(tree.count(like), seed)
        values = _Reader(payload[8:]).floats(len(places))
        vector = torch.zeros(tree.count(like)).index_copy(0, places, values)
        return tree.in_types_of(like, tree.unflatten(vector, like))

    def _places(self, size: int, seed: int) -> Tensor:
        order = np.random.Generator(np.random.PCG64(seed)).permutation(size)
        return torch.from_numpy(np.sort(order[: _share(self.fraction, size)]))


@register("top_components")
@dataclass(frozen=True)
class TopComponents(Mask):
    """Of each layer the rank-one components of the largest norm, a row of A with its column of B; else rows."""

    def encode(self, state: StateLike, rng: Rng) -> bytes:
        parts = []
        for names in _units(state).values():
            rows = [_rows(name, state[name], "rank") for name in names]
            norms = torch.stack([each.double().square().sum(dim=1) for each in rows]).sum(dim=0)
            places = _largest(norms, _share(self.fraction, len(norms)))
            parts += [write_places(places, len(norms)), *(_bytes_of(each[places]) for each in rows)]
        return b"".join(parts)

    def decode(self, payload: bytes, like: StateLike) -> State:
        reader, decoded = _Reader(payload), {}
        for names in _units(like).values():
            rows = [torch.zeros_like(_rows(name, like[name], "rank")) for name in names]
            places = reader.places(_share(self.fraction, len(rows[0])), len(rows[0]))
            for name, each in zip(names, rows, strict=True):
                each[places] = reader.floats(len(places) * each.shape[1]).view(len(places), -1).to(each.dtype)
                decoded[name] = _from_rows(name, each, like[name])
        return {name: decoded[name] for name in like}


def _share(fraction: float, size: int) -> int:
    """Return how many of `size` numbers are sent."""
    return min(max(1, round(part_of(fraction, size))), size)


def _largest(sizes: Tensor, number: int) -> Tensor:
    """The places of the largest numbers, rising; of equal ones the first."""
    return sizes.argsort(descending=True, stable=True)[:number].sort().values


def _units(state: StateLike) -> Mapping[str, list[str]]:
    """The tensors whose rows belong together: the factors of a layer, any other tensor by itself."""
    units: dict[str, list[str]] = {}
    for name in state:
        units.setdefault(name.rpartition(".")[0] if factor_of(name) else name, []).append(name)
    return units


# Bytes


def pack(codes: Tensor, bits: int) -> bytes:
    """Codes `(N,)` below 2^bits, one after the other, the lowest bit first, filled up with zeros to a whole byte."""
    spread = (codes.numpy().astype(np.uint32)[:, None] >> np.arange(bits, dtype=np.uint32)) & 1
    return np.packbits(spread.astype(np.uint8), bitorder="little").tobytes()


def unpack(content: bytes, number: int, bits: int) -> Tensor:
    """The inverse of `pack`: codes `(number,)`, int64."""
    spread = np.unpackbits(np.frombuffer(content, dtype=np.uint8), count=number * bits, bitorder="little")
    powers = 1 << np.arange(bits, dtype=np.int64)
    return torch.from_numpy(spread.reshape(number, bits).astype(np.int64) @ powers)


def write_places(places: Tensor, size: int) -> bytes:
    """Which of `size` places are meant: as a bitmap or one after the other, whichever is shorter. None if all are."""
    if len(places) == size:
        return b""
    if _as_bitmap(len(places), size):
        return pack(torch.zeros(size, dtype=torch.int64).index_fill(0, places, 1), 1)
    return pack(places, _width(size))


def _as_bitmap(number: int, size: int) -> bool:
    return size <= number * _width(size)


def _width(size: int) -> int:
    """The bits that a place below `size` needs."""
    return max(1, math.ceil(math.log2(size)))


class _Reader:
    """Reads from the front of a payload what was written there."""

    def __init__(self, payload: bytes) -> None:
        self._payload, self._position = payload, 0

    def _take(self, num_bytes: int) -> bytes:
        self._position += num_bytes
        return self._payload[self._position - num_bytes : self._position]

    def floats(self, number: int) -> Tensor:
        return torch.from_numpy(np.frombuffer(self._take(4 * number), dtype="<f4").astype(np.float32))

    def codes(self, number: int, bits: int) -> Tensor:
        return unpack(self._take(-(-number * bits // 8)), number, bits)

    def places(self, number: int, size: int) -> Tensor:
        if number == size:
            return torch.arange(size)
        if _as_bitmap(number, size):
            return self.codes(size, 1).nonzero().flatten()
        return self.codes(number, _width(size))


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().astype("<f4").tobytes()


def _rows(name: str, tensor: Tensor, scales: str) -> Tensor:
    """A tensor as rows `(R, n)`: one, or one for each rank."""
    if scales == "tensor" or tensor.dim() < 2:
        return tensor.reshape(1, -1)
    return tensor.T if factor_of(name) == "lora_B" else tensor.flatten(1)


def _from_rows(name: str, rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`."""
    if factor_of(name) == "lora_B" and rows.shape == like.T.shape and len(rows) > 1:
        return rows.T.contiguous()
    return rows.reshape(like.shape)
