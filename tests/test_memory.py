"""Memory that a process has freed is used again."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc can be told to"
)
def test_large_tensors_take_the_pages_of_those_that_were_freed() -> None:
    """In a process of its own, where nothing else is allocated meanwhile: after the first few, each of ten."""
    done = subprocess.run([sys.executable, "-c", TENSORS], capture_output=True, text=True, check=True)
    counts = [int(each) for each in done.stdout.split()]
    assert max(counts[-10:]) < 100


# Prints the page faults of each of forty tensors of 40 MB, each of which is freed before the next.
TENSORS = """
import resource
import torch
from flora.core.memory import keep_freed_memory

def num_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(*[num_faults() for _ in range(40)])
"""
