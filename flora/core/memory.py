"""How much memory there is, how much was used, and which errors say that it ran out."""

from __future__ import annotations

import ctypes
import functools
import gc
import resource
import sys
from pathlib import Path

import torch

# How PyTorch's CPU allocator, C++, CUDA and cuBLAS say that memory has run out, where the error's type doesn't.
OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


# The settings of glibc's `mallopt`, by their numbers in malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# Bytes of freed memory that a process keeps at the end of its heap.
KEPT_BYTES = 2**30


@functools.cache
def keep_freed_memory() -> None:
    """Have this process use memory again that it has freed, where it would give it back and ask for it anew.

    glibc gives back each freed tensor of more than 32 MB, and the system hands out zeros page by page, which is slow
    where clients have gradients of millions of numbers at every step. The first few tensors of a size are new all the
    same, until one that was freed leaves room for the next and its alignment. Without glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def available_memory_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device; 4 GiB where the system doesn't tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30
    return max(min(free, _container_bytes()), 0)


def _container_bytes() -> int:
    """Return what a container's limit (cgroup v2) leaves; a very large number without one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        reclaimable = int(statistics["inactive_file"])  # cached files, which the kernel gives up when asked
        return 2**62 if limit == "max" else int(limit) - int(used) + reclaimable
    except (OSError, ValueError, KeyError):
        return 2**62


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the device or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def release_cached_memory(device: torch.device) -> None:
    """Give back what a step that failed has left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: of the CUDA device, or the resident set of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
