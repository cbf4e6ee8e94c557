"""Time what runs on a CPU or a GPU. Part of `flora.benchmark`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(function: Callable[[], Any], device: str) -> float:
    """Run the function once; return how many seconds it took until the device had done all of it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started
