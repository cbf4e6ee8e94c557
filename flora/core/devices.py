"""Choose the device that a run computes on."""

from __future__ import annotations

import torch

from flora.core.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device called `name`: auto, cpu, cuda or cuda:N. Raises `UserError` if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices here" if torch.cuda.is_available() else "no CUDA device here"
        raise UserError(f"device: {name} was asked for, but there is {found}; expected auto or cpu")
    return torch.device(name)
