"""Choose the device that a run computes on."""

from __future__ import annotations

import torch

from flora.core.errors import UserError
from flora.core.processes import ALONE, Processes


def choose_device(name: str, processes: Processes = ALONE) -> torch.device:
    """The device called `name`: auto, cpu, cuda or cuda:N. Raises `UserError` if it is not there.

    Of several processes on a machine each has a CUDA device of its own, its current one, unless `name` says which.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.size > 1:
        name = f"cuda:{processes.local_rank}"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices here" if torch.cuda.is_available() else "no CUDA device here"
        raise UserError(f"device: {name} was asked for, but there is {found}; expected auto or cpu")
    device = torch.device(name)
    if kind == "cuda" and processes.size > 1:
        torch.cuda.set_device(device)
    return device
