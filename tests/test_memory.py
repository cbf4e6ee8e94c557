"""Memory that a process has freed is used again."""

from __future__ import annotations

import ctypes
import resource
import sys

import pytest
import torch

from flora.core.memory import keep_freed_memory


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc can be told to"
)
def test_a_large_tensor_takes_the_pages_of_one_that_was_freed() -> None:
    keep_freed_memory()

    def num_faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(10 * 2**20)  # 40 MB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # The machine may take pages back at any moment, so one try of many is enough.
    assert min(num_faults() for _ in range(20)) < 100
