"""Which examples a client sees at each of its steps."""

from __future__ import annotations

import math

import numpy as np

from flora.core.rng import Rng


def count_steps(num_examples: int, *, batch_size: int, epochs: int, steps: int | None) -> int:
    """Count the steps of a client of `num_examples`: `steps` if given, else whole epochs, the last batch short."""
    return steps if steps is not None else epochs * math.ceil(num_examples / batch_size)


def client_batches(
    examples: np.ndarray, rng: Rng, *, batch_size: int, width: int, num_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """One client's batches: indices `(num_steps, width)` and the mask of the real ones.

    Each epoch is a new permutation from `rng`; a batch never spans two epochs. `width` >= any batch's real size.
    """
    indices = np.empty((num_steps, width), dtype=np.int64)
    mask = np.zeros((num_steps, width), dtype=bool)
    per_epoch = math.ceil(len(examples) / batch_size)
    order = examples
    for step in range(num_steps):
        epoch, batch = divmod(step, per_epoch)
        if batch == 0:
            order = rng.child("epoch", epoch).numpy().permutation(examples)
        chosen = order[batch * batch_size : (batch + 1) * batch_size]
        indices[step, : len(chosen)] = chosen
        indices[step, len(chosen) :] = chosen[0]
        mask[step, : len(chosen)] = True
    return indices, mask
