"""How many clients go through the model in one step, by the memory and the caches at hand."""

from __future__ import annotations

import torch

from flora.clip.towers.towers import AdaptedClip
from flora.core.memory import available_memory_bytes

MAX_CLIENTS_PER_BLOCK = 32
# Tokens times width of a step's residual stream beyond which a CPU gets slower a client, not faster, because what one
# operation writes is no longer in the caches when the next one reads it (ViT-B/16, 100 classes, two cores: 470 ms a
# client with one at once, 375 ms with 6, 490 ms with 12).
MAX_STREAM_ON_CPU = 1_000_000
# An estimate of the numbers that autograd keeps for each token of a block, in units of the width: the residual
# stream, two norms, q, k, v, the attention's output, and the MLP's inner layer, four widths before and after GELU.
ACTIVATIONS_PER_TOKEN = 20
# Copies that are held of an example's own gradient: its adapter, the gradient by way of texts and of images, their sum.
COPIES_OF_GRADIENT = 4
# Bytes that the examples of a step may take at once where each has a gradient of its own: a number, not a share of what
# is free, so that their sums have the same last bits at every time and in every process. On CUDA a part of all memory.
MAX_EXAMPLE_BYTES_ON_CPU, CUDA_PARTS = 2**30, 4


def choose_clients_per_block(model: AdaptedClip, *, batch_size: int) -> int:
    """Return how many clients may share a step: their activations fit into a quarter of the memory that is free."""
    fits = available_memory_bytes(model.device) // 4 // client_bytes(model, batch_size=batch_size)
    if fits >= clients_at_once(model, batch_size=batch_size):
        fits = MAX_CLIENTS_PER_BLOCK
    # A power of two, so that a little more or less free memory seldom changes the sums' last bits.
    return 2 ** (int(min(max(fits, 1), MAX_CLIENTS_PER_BLOCK)).bit_length() - 1)


def client_bytes(model: AdaptedClip, *, batch_size: int) -> int:
    """About what one client's step keeps until its gradient is computed."""
    size = model.clip.dtype.itemsize
    return size * ACTIVATIONS_PER_TOKEN * model.adapter.num_models * max(1, sum(_trained_streams(model, batch_size)))


def clients_at_once(model: AdaptedClip, *, batch_size: int) -> int:
    """Return how many clients of a step go through the model together: on a CPU as many as its caches are good for."""
    if model.device.type != "cpu":
        return 2**30
    return max(MAX_STREAM_ON_CPU // max(_trained_streams(model, batch_size), default=1), 1)


def examples_at_once(model: AdaptedClip, *, num_trained: int) -> int:
    """Return how many examples, each with a gradient of `num_trained` numbers, go through the model together."""
    if model.adapter.max_clients_per_block is not None:
        return model.adapter.max_clients_per_block
    if model.device.type == "cpu":
        most_bytes = MAX_EXAMPLE_BYTES_ON_CPU
    else:
        most_bytes = torch.cuda.get_device_properties(model.device).total_memory // CUDA_PARTS
    gradient_bytes = model.clip.dtype.itemsize * COPIES_OF_GRADIENT * num_trained
    example_bytes = client_bytes(model, batch_size=1) + gradient_bytes
    return max(min(clients_at_once(model, batch_size=1), most_bytes // example_bytes), 1)


def _trained_streams(model: AdaptedClip, batch_size: int) -> list[int]:
    """Tokens times width of one client's step, for each trained block."""
    architecture = model.clip.architecture
    prompts = model.prompts.tokens
    tokens = {"text": prompts.shape[0] * prompts.shape[1], "vision": batch_size * model.vision.num_tokens}
    streams = []
    if model.adapter.comparison.by_image:
        tokens["text"] *= batch_size
    for tower, first_stage in model.adapter.trained_from.items():
        shape = architecture.tower(tower)
        num_trained = max(shape.num_layers + 1 - max(first_stage, 1), 0)
        streams += [tokens[tower] * shape.width] * num_trained
    return streams
