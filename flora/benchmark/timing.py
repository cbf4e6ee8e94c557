"""Time what runs on a CPU or a GPU. Part of `flora.benchmark`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
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


def median_seconds(function: Callable[[], object], device: str, seconds: float) -> float:
    """The median time of a call after the first, of as many as fit into `seconds`, but three at least."""
    timed(function, device)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(timed(function, device))
    return statistics.median(times)


def matrix_rate(width: int, mlp_width: int, device: str, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second in the largest product of a tower, on a thousand tokens and more.

    The best of two sizes: that of a CPU's caches, and one that fills a GPU.
    """
    rates = []
    for num_tokens in (1024, 8192):
        left = torch.randn(num_tokens, width, device=device).to(dtype)
        right = torch.randn(width, mlp_width, device=device).to(dtype)
        product = partial(torch.mm, left, right)
        timed(product, device)
        times = [timed(product, device) for _ in range(20)]
        rates.append(2 * num_tokens * width * mlp_width / statistics.median(times))
    return max(rates)
