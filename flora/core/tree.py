"""Arithmetic on state dicts: flat mappings from a tensor's name to the tensor."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

State = dict[str, Tensor]
StateLike = Mapping[str, Tensor]

# Numbers that are copied at once, in double precision: copies of many more would leave a CPU's caches. With fewer there
# are more calls, and PyTorch computes with 2**15 or fewer in one thread alone.
MAX_TOGETHER = 2**17


@dataclass(frozen=True)
class Layout:
    """Names and shapes of tensors whose numbers stand one after the other, in this order."""

    shapes: tuple[tuple[str, torch.Size], ...]

    @classmethod
    def of(cls, state: StateLike) -> Layout:
        """The layout that the numbers of `flatten(state)` have."""
        if isinstance(state, FlatState):
            return state.layout
        return cls(tuple((name, tensor.shape) for name, tensor in state.items()))

    @cached_property
    def places(self) -> Mapping[str, tuple[int, int, torch.Size]]:
        """By name: the first place of a tensor, the one behind its last, and its shape."""
        places, start = {}, 0
        for name, shape in self.shapes:
            places[name] = start, start + shape.numel(), shape
            start += shape.numel()
        return places

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return sum(shape.numel() for _, shape in self.shapes)

    def split(self, matrix: Tensor) -> State:
        """The rows of a matrix `(K, P)` as tensors `(K, ...)`: views into it."""
        parts = matrix.split([shape.numel() for _, shape in self.shapes], dim=1)
        number = len(matrix)
        return {name: part.view(number, *shape) for (name, shape), part in zip(self.shapes, parts, strict=True)}

    def rows(self, matrix: Tensor) -> list[FlatState]:
        """The rows of a matrix `(K, P)` as K states: views into it."""
        return [FlatState(row, self) for row in matrix]


class FlatState(Mapping[str, Tensor]):
    """A state whose numbers are one vector `(P,)`. Its tensors are views into it, made when they are read.

    What is done with all numbers is one operation, however many tensors there are.
    """

    def __init__(self, vector: Tensor, layout: Layout) -> None:
        self.vector, self.layout = vector, layout

    def __getitem__(self, name: str) -> Tensor:
        start, stop, shape = self.layout.places[name]
        return self.vector[start:stop].view(shape)

    def __contains__(self, name: object) -> bool:
        return name in self.layout.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.places)

    def __len__(self) -> int:
        return len(self.layout.places)


class Moved(Mapping[str, Tensor]):
    """`start + delta`, where `delta` may lack some tensors. They are made when they are read: mostly nobody does."""

    def __init__(self, start: StateLike, delta: StateLike) -> None:
        self.start, self.delta = start, delta

    def __getitem__(self, name: str) -> Tensor:
        return self.start[name] + self.delta[name] if name in self.delta else self.start[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.start)

    def __len__(self) -> int:
        return len(self.start)


def state_digest(state: StateLike) -> str:
    """The SHA-256 of a state's names and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def add(left: StateLike, right: StateLike, scale: float = 1.0) -> State:
    """`left + scale * right`, name by name."""
    return {name: tensor + scale * right[name] for name, tensor in left.items()}


@overload
def subtract(left: FlatState, right: StateLike) -> FlatState: ...
@overload
def subtract(left: State, right: StateLike) -> State: ...
def subtract(left: StateLike, right: StateLike) -> StateLike:
    """`left - right`, name by name."""
    if isinstance(left, FlatState):
        return FlatState(left.vector - flatten(right, left.layout), left.layout)
    return {name: tensor - right[name] for name, tensor in left.items()}


@overload
def scale(state: State, factor: float) -> State: ...
@overload
def scale(state: StateLike, factor: float) -> StateLike: ...
def scale(state: StateLike, factor: float) -> StateLike:
    """`factor * state`, name by name."""
    if isinstance(state, FlatState):
        return FlatState(state.vector * factor, state.layout)
    return {name: tensor * factor for name, tensor in state.items()}


def norm(state: StateLike) -> float:
    """The Euclidean norm over all tensors, in double precision: finite for all finite numbers of single precision."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in flatten(state).split(MAX_TOGETHER)))


def weighted_mean(states: Iterable[StateLike], weights: Sequence[float]) -> State:
    """The mean of states of equal shapes, weighted, summed in the order given (in double precision).

    Raises ValueError if the weights are not all non-negative with a positive sum.
    """
    total = float(sum(weights))
    if not total > 0 or any(weight < 0 for weight in weights):
        raise ValueError("a weighted mean needs non-negative weights with a positive sum")
    like: StateLike = {}
    layout: Layout | None = None
    sums = torch.zeros(0, dtype=torch.float64)
    for state, weight in zip(states, weights, strict=True):
        if layout is None:
            like, layout = state, Layout.of(state)
            sums = torch.zeros(layout.size, dtype=torch.float64)
        for known, part in zip(sums.split(MAX_TOGETHER), flatten(state, layout).split(MAX_TOGETHER), strict=True):
            known.add_(part, alpha=weight / total)
    mean = unflatten(sums, like)
    return {name: tensor.to(like[name].dtype, copy=True) for name, tensor in mean.items()}


def _parts(state: StateLike) -> Iterable[Tensor]:
    """All numbers of a state, in as few tensors as they are in."""
    return [state.vector] if isinstance(state, FlatState) else state.values()


def stack(states: Sequence[StateLike]) -> State:
    """States of equal shapes `(...)` as one state with a leading axis `(K, ...)`."""
    first = states[0]
    if isinstance(first, FlatState):
        return first.layout.split(torch.stack([flatten(state, first.layout) for state in states]))
    return {name: torch.stack([state[name] for state in states]) for name in first}


def moves_of(states: Sequence[StateLike], name: str) -> tuple[Tensor, list[Tensor]]:
    """A tensor near one of K states, where all of them start if they do, and how far each state's is from it."""
    first = states[0]
    if isinstance(first, Moved):
        deltas = [each.delta for each in states if isinstance(each, Moved) and each.start is first.start]
        if len(deltas) == len(states) and name in first.delta:
            return first.start[name], [delta[name] for delta in deltas]
    return first[name], [state[name] - first[name] for state in states]


def unstack(tensors: StateLike) -> list[FlatState]:
    """The inverse of `stack`: a list of K states, views into one copy."""
    layout = Layout(tuple((name, tensor.shape[1:]) for name, tensor in tensors.items()))
    return layout.rows(torch.cat([tensor.reshape(len(tensor), -1) for tensor in tensors.values()], dim=1))


def add_prefix(prefix: str, state: StateLike) -> State:
    """Return the state with `prefix` in front of its names."""
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def strip_prefix(prefix: str, state: StateLike) -> State:
    """The tensors whose names begin with `prefix`, which is taken away."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def select(state: StateLike, names: Iterable[str]) -> State:
    """The tensors called `names`, in their order."""
    return {name: state[name] for name in names}


def flatten(state: StateLike, layout: Layout | None = None) -> Tensor:
    """All numbers of a state in one vector, in the order of its names, or of a layout's: not to be written into.

    Those of a flat state are its own.
    """
    if isinstance(state, FlatState) and layout in (None, state.layout):
        return state.vector
    parts = [state[name].flatten() for name in (state if layout is None else layout.places)]
    return torch.cat(parts) if parts else torch.empty(0)


def flat(state: StateLike) -> FlatState:
    """The state as a flat one, whose numbers are one vector. Its tensors are of one type."""
    return state if isinstance(state, FlatState) else FlatState(flatten(state), Layout.of(state))


def vector_like(state: StateLike) -> Tensor:
    """A vector of the size and type of `flatten(state)`, on the CPU, whose numbers mean nothing."""
    dtypes = {tensor.dtype for tensor in state.values()}
    return torch.empty(count(state), dtype=functools.reduce(torch.promote_types, dtypes, torch.float32))


def unflatten(vector: Tensor, like: StateLike) -> State:
    """The inverse of `flatten`, with names and shapes as `like` has them."""
    parts = vector.split([tensor.numel() for tensor in like.values()])
    return {name: part.view(tensor.shape) for part, (name, tensor) in zip(parts, like.items(), strict=True)}


def expand(state: StateLike, size: int) -> State:
    """Return the state repeated for K clients, without a copy: shapes `(...)` become `(K, ...)`."""
    return {name: tensor.unsqueeze(0).expand(size, *tensor.shape) for name, tensor in state.items()}


def fits(tensor: Tensor, like: Tensor) -> bool:
    """Whether a tensor has the type and the shape of another, in which a size of 0 stands for any."""
    if tensor.dtype != like.dtype or tensor.shape == like.shape:
        return tensor.dtype == like.dtype
    if tensor.dim() != like.dim():
        return False
    return all(theirs in (0, own) for own, theirs in zip(tensor.shape, like.shape, strict=True))


def kinds(state: StateLike) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and the type of each tensor."""
    if isinstance(state, FlatState):
        return {name: (shape, state.vector.dtype) for name, shape in state.layout.shapes}
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


def in_types_of(like: StateLike, state: StateLike) -> State:
    """The state's tensors in the types that those of the same names have in `like`."""
    return {name: tensor.to(like[name].dtype) for name, tensor in state.items()}


def count(state: StateLike) -> int:
    """Return how many numbers the state holds."""
    return sum(part.numel() for part in _parts(state))


def is_finite(state: StateLike) -> bool:
    """Whether no number in the state is NaN or infinite."""
    # A sum of squares is finite only if they all are, and takes one pass; else they may just be large.
    if isinstance(state, FlatState) and math.isfinite(float(state.vector @ state.vector)):
        return True
    # The extremes of numbers among which one is NaN are NaN; they need one pass and no copy.
    extremes = [each for part in _parts(state) if part.numel() for each in torch.aminmax(part)]
    return not extremes or bool(torch.isfinite(torch.stack(extremes)).all())
