"""How much memory there is, how much has been used, and how many clients fit into one step."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import torch

from flora.clip.towers import AdaptedClip

MAX_CLIENTS_PER_BLOCK = 32
# How PyTorch's CPU allocator, C++, CUDA and cuBLAS say that memory has run out, where the error's type doesn't.
OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# Tokens times width of a step's residual stream beyond which a CPU gets slower a client, not faster, because what one
# operation writes is no longer in the caches when the next one reads it (ViT-B/16, 100 classes, two cores: 470 ms a
# client with one at once, 375 ms with 6, 490 ms with 12).
MAX_STREAM_ON_CPU = 1_000_000
# An estimate of the numbers that autograd keeps for each token of a block, in units of the width: the residual
# stream, two norms, q, k, v, the attention's output, and the MLP's inner layer, four widths before and after GELU.
ACTIVATIONS_PER_TOKEN = 20


def choose_clients_per_block(model: AdaptedClip, *, batch_size: int) -> int:
    """How many clients may share a step: their activations fit into a quarter of the memory that is free."""
    fits = available_memory_bytes(model.device) // 4 // client_bytes(model, batch_size=batch_size)
    if fits >= clients_at_once(model, batch_size=batch_size):
        fits = MAX_CLIENTS_PER_BLOCK
    # A power of two, so that a little more or less free memory seldom changes the sums' last bits.
    return 2 ** (int(min(max(fits, 1), MAX_CLIENTS_PER_BLOCK)).bit_length() - 1)


def client_bytes(model: AdaptedClip, *, batch_size: int) -> int:
    """About what one client's step keeps until its gradient is computed."""
    num_models = 1 if model.adapter.mutual is None else 2
    size = model.clip.dtype.itemsize
    return size * ACTIVATIONS_PER_TOKEN * num_models * max(1, sum(_trained_streams(model, batch_size)))


def clients_at_once(model: AdaptedClip, *, batch_size: int) -> int:
    """How many clients of a step go through the model together: on a CPU as many as its caches are good for."""
    if model.device.type != "cpu":
        return 2**30
    return max(MAX_STREAM_ON_CPU // max(_trained_streams(model, batch_size), default=1), 1)


def _trained_streams(model: AdaptedClip, batch_size: int) -> list[int]:
    """Tokens times width of one client's step, for each trained block."""
    architecture = model.clip.architecture
    prompts = model.prompts.tokens
    tokens = {"text": prompts.shape[0] * prompts.shape[1], "vision": batch_size * model.vision.num_tokens}
    streams = []
    for tower, first_stage in model.adapter.trained_from.items():
        shape = architecture.tower(tower)
        num_trained = max(shape.num_layers + 1 - max(first_stage, 1), 0)
        streams += [tokens[tower] * shape.width] * num_trained
    return streams


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
    """What a container's limit (cgroup v2) leaves; a very large number without one."""
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
