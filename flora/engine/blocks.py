"""Put tasks together into blocks: up to K clients that share their steps, with every batch laid out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flora.data.batching import client_batches
from flora.engine.tasks import ClientTask, TrainingSetup


@dataclass(frozen=True, eq=False)
class Block:
    """The steps of K clients, those with the most steps first, so that whoever is still active stands in front.

    `num_steps` `(K,)` never rises. `indices` `(S, K, B)` int64 are training examples, `example_mask` `(S, K, B)` is
    True for real ones; padding repeats a real example and is never counted.
    """

    tasks: tuple[ClientTask, ...]
    num_steps: tuple[int, ...]
    indices: Tensor
    example_mask: Tensor

    @property
    def setup(self) -> TrainingSetup:
        """What the tasks have in common."""
        return self.tasks[0].setup

    @property
    def clients(self) -> tuple[int, ...]:
        """The clients' ids, in the order of their rows."""
        return tuple(task.client for task in self.tasks)

    def segments(self) -> Iterator[tuple[int, range]]:
        """The runs of steps with the same active clients: (how many of them, the steps)."""
        start = 0
        for num_active in range(len(self.tasks), 0, -1):
            stop = self.num_steps[num_active - 1]
            if stop > start:
                yield num_active, range(start, stop)
                start = stop

    def part(self, start: int, stop: int) -> Block:
        """The clients from `start` to `stop` as a block of their own."""
        longest = self.num_steps[start]
        return Block(
            tasks=self.tasks[start:stop],
            num_steps=self.num_steps[start:stop],
            indices=self.indices[:longest, start:stop],
            example_mask=self.example_mask[:longest, start:stop],
        )


def block_bytes(tasks: Sequence[ClientTask], clients_per_block: int) -> int:
    """Return how many bytes the batches take of the blocks that `make_blocks` makes."""
    width = tasks[0].setup.width
    longest_first = sorted((task.num_steps for task in tasks), reverse=True)
    blocks = (longest_first[start : start + clients_per_block] for start in range(0, len(tasks), clients_per_block))
    return (torch.int64.itemsize + torch.bool.itemsize) * width * sum(block[0] * len(block) for block in blocks)


def make_blocks(tasks: Sequence[ClientTask], clients_per_block: int) -> Iterator[Block]:
    """Cut tasks of one setup into blocks of at most `clients_per_block`, those with similar numbers of steps together.

    A client's batches come from its task's `rng` alone: the block that it lands in changes nothing.
    """
    order = sorted(tasks, key=lambda task: (-task.num_steps, task.client))
    for start in range(0, len(order), clients_per_block):
        part = order[start : start + clients_per_block]
        shape = part[0].num_steps, len(part), part[0].setup.width
        indices, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
        for column, task in enumerate(part):
            steps = slice(0, task.num_steps)
            indices[steps, column], mask[steps, column] = client_batches(
                task.examples,
                task.rng,
                batch_size=task.setup.local.batch_size,
                width=task.setup.width,
                num_steps=task.num_steps,
            )
        yield Block(
            tasks=tuple(part),
            num_steps=tuple(task.num_steps for task in part),
            indices=torch.from_numpy(indices),
            example_mask=torch.from_numpy(mask),
        )
