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


def checked_state(setting: str, component: Any, found: Any, like: StateLike) -> State:
    """Return `found` in the order of `like`, whose names, types and shapes it must have; a size of 0 stands for any."""
    if not isinstance(found, Mapping):
        refuse(setting, component, f"{_kind(found)}, expected tensors by name")
    missing = [name for name in like if name not in found]
    if missing:
        refuse(setting, component, f"no tensor {missing[0]!r}")
    unknown = [name for name in found if name not in like]
    if unknown:
        refuse(setting, component, f"a tensor {unknown[0]!r} that nobody knows")
    for name, expected in like.items():
        if not isinstance(found[name], Tensor) or not tree.fits(found[name], expected):
            refuse(setting, component, f"{name!r} as {_kind(found[name])}, expected {_kind(expected)}")
    return {name: found[name] for name in like}


def checked_tensor(setting: str, component: Any, found: Any, shape: Sequence[int]) -> Tensor:
    """Return `found`, which must be a tensor of that shape."""
    if not isinstance(found, Tensor) or found.shape != torch.Size(shape):
        refuse(setting, component, f"{_kind(found)}, expected shape {tuple(shape)}")
    return found


def checked_weights(setting: str, component: Any, found: Sequence[float], number: int) -> list[float]:
    """Return `found`, which must be `number` finite weights of at least 0 with a sum above 0."""
    weights = [float(weight) for weight in found]
    if len(weights) != number:
        refuse(setting, component, f"{len(weights)} weights for {number} clients")
    wrong = [weight for weight in weights if not 0 <= weight < math.inf]
    if wrong or not sum(weights) > 0:
        refuse(setting, component, f"a weight of {wrong[0]:g}" if wrong else "weights that are all 0")
    return weights


def checked_ids(
    setting: str, component: Any, found: Any, below: int, *, what: str = "clients", number: int | None = None
) -> np.ndarray:
    """Return `found` sorted, int64: `number` distinct ids (None: any number) from 0 to `below` - 1, called `what`."""
    ids = np.asarray(found)
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


def checked_parts(setting: str, component: Any, found: Any, number: int, num_examples: int) -> list[np.ndarray]:
    """Return the examples of each of `number` clients, sorted: distinct ids from 0 to `num_examples` - 1.

    Two clients may share an example.
    """
    if len(found) != number:
        refuse(setting, component, f"{len(found)} parts for {number} clients")
    if _are_sorted_ids(found, num_examples):
        return list(found)
    return [
        checked_ids(setting, component, part, num_examples, what=f"examples of client {client}")
        for client, part in enumerate(found)
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


def checked_column(setting: str, component: Any, found: Any, number: int, *, what: str) -> np.ndarray:
    """Return `found`, which must be `number` finite numbers called `what`, one for each client."""
    column = np.asarray(found)
    if column.shape != (number,) or column.dtype.kind not in "iuf":
        refuse(setting, component, f"{what} as {_kind(column)}, expected a number for each of {number} clients")
    if not np.isfinite(column).all():
        refuse(setting, component, f"{what} that are not finite")
    return column


def _kind(found: Any) -> str:
    """Return what something is, in a few words: the type and shape of what has these."""
    if isinstance(found, Tensor | np.ndarray):
        return f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"
    return f"a {type(found).__name__}"
