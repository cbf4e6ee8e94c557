"""Which examples each client sees at each of its steps, for a block of K clients at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flora.core.rng import Rng


@dataclass(frozen=True, eq=False)
class ClientBlock:
    """The steps of K clients, those with the most steps first, so that whoever is still active stands in front.

    `clients` are their ids; `num_steps` `(K,)` never rises. `indices` `(S, K, B)` int64 are training examples,
    `example_mask` `(S, K, B)` is True for real ones; padding repeats a real example and is never counted.
    """

    clients: tuple[int, ...]
    num_steps: tuple[int, ...]
    indices: Tensor
    example_mask: Tensor

    def segments(self) -> Iterator[tuple[int, range]]:
        """The runs of steps with the same active clients: (how many of them, the steps)."""
        start = 0
        for num_active in range(len(self.clients), 0, -1):
            stop = self.num_steps[num_active - 1]
            if stop > start:
                yield num_active, range(start, stop)
                start = stop

    def part(self, start: int, stop: int) -> ClientBlock:
        """The clients from `start` to `stop` as a block of their own."""
        longest = self.num_steps[start]
        return ClientBlock(
            clients=self.clients[start:stop],
            num_steps=self.num_steps[start:stop],
            indices=self.indices[:longest, start:stop],
            example_mask=self.example_mask[:longest, start:stop],
        )


def count_steps(num_examples: int, *, batch_size: int, epochs: int, steps: int | None) -> int:
    """How many steps a client of `num_examples` takes: `steps` if given, else whole epochs, the last batch short."""
    return steps if steps is not None else epochs * math.ceil(num_examples / batch_size)


def batch_bytes(num_steps: Sequence[int], *, width: int, clients_per_block: int) -> int:
    """How many bytes the blocks take that `client_blocks` makes of clients with so many steps."""
    longest_first = sorted(num_steps, reverse=True)
    blocks = (longest_first[start : start + clients_per_block] for start in range(0, len(num_steps), clients_per_block))
    return (torch.int64.itemsize + torch.bool.itemsize) * width * sum(block[0] * len(block) for block in blocks)


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


def client_blocks(
    cohort: Sequence[int],
    examples: Sequence[np.ndarray],
    rng: Rng,
    *,
    batch_size: int,
    width: int,
    epochs: int,
    steps: int | None,
    clients_per_block: int,
) -> Iterator[ClientBlock]:
    """Cut a cohort into blocks of at most `clients_per_block`, clients with similar numbers of steps together.

    `examples[i]` are the training examples of client `cohort[i]`, whose batches come from `rng.child("client", id)`
    alone: the block it lands in changes nothing.
    """
    options = {"batch_size": batch_size, "epochs": epochs, "steps": steps}
    num_steps = [count_steps(len(own), **options) for own in examples]  # type: ignore[arg-type]
    order = sorted(range(len(cohort)), key=lambda place: (-num_steps[place], cohort[place]))
    for start in range(0, len(order), clients_per_block):
        places = order[start : start + clients_per_block]
        longest = num_steps[places[0]]
        indices = np.zeros((longest, len(places), width), dtype=np.int64)
        mask = np.zeros((longest, len(places), width), dtype=bool)
        for column, place in enumerate(places):
            own = slice(0, num_steps[place])
            indices[own, column], mask[own, column] = client_batches(
                examples[place],
                rng.child("client", int(cohort[place])),
                batch_size=batch_size,
                width=width,
                num_steps=num_steps[place],
            )
        yield ClientBlock(
            clients=tuple(int(cohort[place]) for place in places),
            num_steps=tuple(num_steps[place] for place in places),
            indices=torch.from_numpy(indices),
            example_mask=torch.from_numpy(mask),
        )
