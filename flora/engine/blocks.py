"""Put tasks together into blocks: up to K clients that share their steps, with every batch laid out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flora.client.sampling import LocalExamples
from flora.data.batching import BatchSizes
from flora.engine.tasks import ClientTask, TrainingSetup


@dataclass(frozen=True, eq=False)
class Block:
    """The steps of K clients, those with the most steps first, so that whoever is still active stands in front.

    `num_steps` `(K,)` never rises. `indices` `(S, K, B)` int64 are training examples, `example_mask` `(S, K, B)` is
    True for real ones; padding repeats a real example and is never counted. `extra` is what else steps need, by the
    name that it has in a step's batch, `(S, K, ...)`: `weights` `(S, K, B)`, where examples count differently; of
    images without labels which they are, how they were labelled, and two masks. `reports` are clients' counts of these.
    """

    tasks: tuple[ClientTask, ...]
    num_steps: tuple[int, ...]
    indices: Tensor
    example_mask: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    reports: tuple[Mapping[str, int], ...] = ()

    @property
    def setup(self) -> TrainingSetup:
        """The first task's setup: the others have the same `step_key`."""
        return self.tasks[0].setup

    def by_setup(self) -> list[tuple[TrainingSetup, list[int]]]:
        """The setups of the tasks, one for each run, with the rows of its clients in ascending order."""
        rows: dict[TrainingSetup, list[int]] = {}
        for row, task in enumerate(self.tasks):
            rows.setdefault(task.setup, []).append(row)
        return list(rows.items())

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


def block_bytes(tasks: Sequence[ClientTask]) -> int:
    """Return how many bytes the batches of a block of `tasks` take."""
    setup = tasks[0].setup
    place_bytes = torch.int64.itemsize + torch.bool.itemsize
    step_bytes = setup.width * (place_bytes + (8 if setup.local.sampling.weighs else 0))
    if setup.local.active_self_training is not None:
        step_bytes += setup.unlabelled_width * 2 * place_bytes
    return step_bytes * max(task.num_steps for task in tasks) * len(tasks)


def longest_first(tasks: Sequence[ClientTask]) -> list[ClientTask]:
    """The tasks in the order in which they are cut into blocks: those with similar numbers of steps together."""
    return sorted(tasks, key=lambda task: (-task.num_steps, task.client))


def make_block(tasks: Sequence[ClientTask], examples: Sequence[LocalExamples]) -> Block:
    """Lay out the batches of tasks of one `step_key`, those with the most steps first.

    `examples` are the tasks'. A client's batches come from its task's `rng` alone, whatever block it is in.
    """
    drawn = [_drawn(task, each) for task, each in zip(tasks, examples, strict=True)]
    tensors = {name: _laid_out([each[name] for each in drawn]) for name in drawn[0]}
    return Block(
        tasks=tuple(tasks),
        num_steps=tuple(task.num_steps for task in tasks),
        indices=tensors.pop("indices"),
        example_mask=tensors.pop("example_mask"),
        extra=tensors,
        reports=tuple({} if each.without_label is None else each.without_label.report for each in examples),
    )


def _drawn(task: ClientTask, examples: LocalExamples) -> dict[str, np.ndarray]:
    """What a client sees at each of its steps, by name, `(S, ...)`."""
    local = task.setup.local
    sizes = BatchSizes(local.batch_size, task.setup.width, task.num_steps)
    draws = local.drawing.draw(examples, sizes, task.rng)
    drawn = {"indices": draws.places, "example_mask": draws.mask}
    if draws.weights is not None:
        drawn["weights"] = draws.weights
    if examples.without_label is not None:
        width = task.setup.unlabelled_width
        drawn |= examples.without_label.draw(BatchSizes(width, width, task.num_steps), task.rng)
    return drawn


def _laid_out(arrays: Sequence[np.ndarray]) -> Tensor:
    """Clients' steps `(S_k, B_k)`, the longest first, side by side: `(S, K, B)`, zero where a client has no more."""
    width = max(array.shape[1] for array in arrays)
    steps = np.zeros((len(arrays[0]), len(arrays), width), dtype=arrays[0].dtype)
    for column, array in enumerate(arrays):
        steps[: len(array), column, : array.shape[1]] = array
    return torch.from_numpy(steps)
