"""How many examples a client sees at each of its steps, and which where each epoch sees all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flora.core.rng import Rng


def count_steps(num_examples: int, *, batch_size: int, epochs: int, steps: int | None) -> int:
    """Count the steps of a client of `num_examples`: `steps` if given, else whole epochs, the last batch short."""
    return steps if steps is not None else epochs * math.ceil(num_examples / batch_size)


@dataclass(frozen=True)
class BatchSizes:
    """How large a client's batches are: `num_steps` of up to `batch_size` examples, laid out in `width` places."""

    batch_size: int
    width: int
    num_steps: int

    def mask(self, num_examples: int) -> np.ndarray:
        """True for the places that hold an example, `(num_steps, width)`: the last batch of an epoch may be short."""
        starts = np.arange(self.num_steps) % math.ceil(num_examples / self.batch_size) * self.batch_size
        sizes = np.minimum(num_examples - starts, self.batch_size)
        return np.arange(self.width) < sizes[:, None]


def client_batches(examples: np.ndarray, rng: Rng, sizes: BatchSizes) -> tuple[np.ndarray, np.ndarray]:
    """One client's batches: indices `(num_steps, width)` and the mask of the real ones.

    Each epoch is a new permutation from `rng`; a batch never spans two epochs. `width` >= any batch's real size.
    """
    indices = np.empty((sizes.num_steps, sizes.width), dtype=np.int64)
    mask = sizes.mask(len(examples))
    per_epoch = math.ceil(len(examples) / sizes.batch_size)
    order = examples
    for step in range(sizes.num_steps):
        epoch, batch = divmod(step, per_epoch)
        if batch == 0:
            order = rng.child("epoch", epoch).numpy().permutation(examples)
        chosen = order[batch * sizes.batch_size : (batch + 1) * sizes.batch_size]
        indices[step, : len(chosen)] = chosen
        indices[step, len(chosen) :] = chosen[0]
    return indices, mask
