"""Arithmetic on state dicts: flat mappings from a tensor's name to the tensor."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]
StateLike = Mapping[str, Tensor]

# Numbers that are put side by side for the sake of fewer operations: copies of more would take too much memory.
MAX_TOGETHER = 2**20


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


def subtract(left: StateLike, right: StateLike) -> State:
    """`left - right`, name by name."""
    return {name: tensor - right[name] for name, tensor in left.items()}


def scale(state: StateLike, factor: float) -> State:
    """`factor * state`, name by name."""
    return {name: tensor * factor for name, tensor in state.items()}


def norm(state: StateLike) -> float:
    """The Euclidean norm over all tensors, in double precision: finite for all finite numbers of single precision."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in state.values()))


def weighted_mean(states: Iterable[StateLike], weights: Sequence[float]) -> State:
    """The mean of states of equal shapes, weighted, summed in the order given (in double precision).

    Raises ValueError if the weights are not all non-negative with a positive sum.
    """
    total = float(sum(weights))
    if not total > 0 or any(weight < 0 for weight in weights):
        raise ValueError("a weighted mean needs non-negative weights with a positive sum")
    like: StateLike = {}
    groups: list[list[str]] = []
    sums: list[Tensor] = []
    for state, weight in zip(states, weights, strict=True):
        if not sums:
            like, groups = state, _groups(state)
        terms = [flatten(select(state, names)).double().mul_(weight / total) for names in groups]
        sums = [known.add_(term) for known, term in zip(sums, terms, strict=True)] if sums else terms
    mean: State = {}
    for names, vector in zip(groups, sums, strict=True):
        mean |= unflatten(vector, select(like, names))
    return {name: tensor.to(like[name].dtype, copy=True) for name, tensor in mean.items()}


def _groups(state: StateLike) -> list[list[str]]:
    """The names, in their order, in groups of at most `MAX_TOGETHER` numbers, or of one tensor."""
    groups: list[list[str]] = []
    size = 0
    for name, tensor in state.items():
        size += tensor.numel()
        if not groups or size > MAX_TOGETHER:
            groups.append([])
            size = tensor.numel()
        groups[-1].append(name)
    return groups


def stack(states: Sequence[StateLike]) -> State:
    """States of equal shapes `(...)` as one state with a leading axis `(K, ...)`."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def unstack(stacked: StateLike) -> list[State]:
    """The inverse of `stack`: a list of K states, views into the stack."""
    size = next(iter(stacked.values())).shape[0]
    return [{name: tensor[index] for name, tensor in stacked.items()} for index in range(size)]


def add_prefix(prefix: str, state: StateLike) -> State:
    """Return the state with `prefix` in front of its names."""
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def strip_prefix(prefix: str, state: StateLike) -> State:
    """The tensors whose names begin with `prefix`, which is taken away."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def select(state: StateLike, names: Iterable[str]) -> State:
    """The tensors called `names`, in their order."""
    return {name: state[name] for name in names}


def flatten(state: StateLike) -> Tensor:
    """All numbers of a state in one vector, in the order of its names."""
    return torch.cat([tensor.flatten() for tensor in state.values()])


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
    if tensor.dtype != like.dtype or tensor.dim() != like.dim():
        return False
    return all(theirs in (0, own) for own, theirs in zip(tensor.shape, like.shape, strict=True))


def in_types_of(like: StateLike, state: StateLike) -> State:
    """The state's tensors in the types that those of the same names have in `like`."""
    return {name: tensor.to(like[name].dtype) for name, tensor in state.items()}


def count(state: StateLike) -> int:
    """Return how many numbers the state holds."""
    return sum(tensor.numel() for tensor in state.values())


def is_finite(state: StateLike) -> bool:
    """Whether no number in the state is NaN or infinite."""
    # The extremes of numbers among which one is NaN are NaN; they need one pass and no copy.
    extremes = [each for tensor in state.values() if tensor.numel() for each in torch.aminmax(tensor)]
    return not extremes or bool(torch.isfinite(torch.stack(extremes)).all())
