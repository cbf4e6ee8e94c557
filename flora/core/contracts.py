"""Check what components return, and name the setting, the component and the fault where it is wrong.

A tensor of the wrong shape would be broadcast, a missing one ignored, an index below zero counted from the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from flora.core import tree
from flora.core.errors import UserError
from flora.core.registry import name_of
from flora.core.tree import State, StateLike


def refuse(setting: str, component: Any, fault: str) -> NoReturn:
    """Raise `UserError`: the component chosen by `setting` returned `fault`."""
    raise UserError(f"{setting}: {called(component)} returned {fault}")


def called(component: Any) -> str:
    """The name of the component, or of its class if that is not registered."""
    try:
        return name_of(component)
    except (KeyError, StopIteration):
        return type(component).__name__


def checked_state(setting: str, component: Any, value: Any, like: StateLike) -> State:
    """Return `value` in the order of `like`, whose names, types and shapes it must have; a size of 0 stands for any."""
    if not isinstance(value, Mapping):
        refuse(setting, component, f"{_kind(value)}, expected tensors by name")
    missing = [name for name in like if name not in value]
    if missing:
        refuse(setting, component, f"no tensor {missing[0]!r}")
    unknown = [name for name in value if name not in like]
    if unknown:
        refuse(setting, component, f"a tensor {unknown[0]!r} that nobody knows")
    for name, expected in like.items():
        if not isinstance(value[name], Tensor) or not tree.fits(value[name], expected):
            refuse(setting, component, f"{name!r} as {_kind(value[name])}, expected {_kind(expected)}")
    return {name: value[name] for name in like}


def checked_tensor(setting: str, component: Any, value: Any, shape: Sequence[int]) -> Tensor:
    """Return `value`, which must be a tensor of that shape."""
    if not isinstance(value, Tensor) or value.shape != torch.Size(shape):
        refuse(setting, component, f"{_kind(value)}, expected shape {tuple(shape)}")
    return value


def checked_weights(setting: str, component: Any, values: Sequence[float], number: int) -> list[float]:
    """Return `values`, which must be `number` finite weights of at least 0 with a sum above 0."""
    weights = [float(weight) for weight in values]
    if len(weights) != number:
        refuse(setting, component, f"{len(weights)} weights for {number} clients")
    wrong = [weight for weight in weights if not 0 <= weight < math.inf]
    if wrong or not sum(weights) > 0:
        refuse(setting, component, f"a weight of {wrong[0]:g}" if wrong else "weights that are all 0")
    return weights


def checked_ids(
    setting: str, component: Any, values: Any, below: int, *, what: str = "clients", number: int | None = None
) -> np.ndarray:
    """Return `values` sorted, int64: `number` distinct ids (None: any number) from 0 to `below` - 1, called `what`."""
    ids = np.asarray(values)
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and len(ids)):
        refuse(setting, component, f"{what} as {_kind(ids)}, expected whole numbers in one row")
    if number is not None and len(ids) != number:
        refuse(setting, component, f"{len(ids)} {what}, expected {number}")
    ids = np.sort(ids.astype(np.int64, copy=False))
    if len(ids) and (ids[0] < 0 or ids[-1] >= below):
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        refuse(setting, component, f"{wrong} among the {what}, expected 0 to {below - 1}")
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        refuse(setting, component, f"{twice[0]} twice among the {what}")
    return ids


def checked_parts(setting: str, component: Any, parts: Any, number: int, num_examples: int) -> list[np.ndarray]:
    """Return the examples of each of `number` clients, sorted: distinct ids from 0 to `num_examples` - 1.

    Two clients may share an example.
    """
    if len(parts) != number:
        refuse(setting, component, f"{len(parts)} parts for {number} clients")
    if _are_sorted_ids(parts, num_examples):
        return list(parts)
    return [
        checked_ids(setting, component, part, num_examples, what=f"examples of client {client}")
        for client, part in enumerate(parts)
    ]


def _are_sorted_ids(parts: Sequence[Any], below: int) -> bool:
    """Whether each part is as `checked_ids` returns it: looked at all together, for a million clients' sake."""
    if not all(isinstance(part, np.ndarray) and part.ndim == 1 and part.dtype == np.int64 for part in parts):
        return False
    sizes, flat = np.array([len(part) for part in parts]), np.concatenate([np.empty(0, np.int64), *parts])
    rises = np.diff(flat, prepend=-1) > 0
    firsts = (np.cumsum(sizes) - sizes)[sizes > 0]
    rises[firsts] = True
    return bool(rises.all()) and (not len(flat) or bool(flat.min() >= 0 and flat.max() < below))


def checked_column(setting: str, component: Any, values: Any, number: int, *, what: str) -> np.ndarray:
    """Return `values`, which must be `(number,)` finite numbers called `what`, one for each client."""
    column = np.asarray(values)
    if column.shape != (number,) or column.dtype.kind not in "iuf":
        refuse(setting, component, f"{what} as {_kind(column)}, expected a number for each of {number} clients")
    if not np.isfinite(column).all():
        refuse(setting, component, f"{what} that are not finite")
    return column


def _kind(value: Any) -> str:
    """Return what something is, in a few words: the type and shape of what has these."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"a {type(value).__name__}"
