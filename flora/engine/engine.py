"""The engine: tasks in, results out. It alone knows of blocks, of memory that runs out, and of the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import numpy as np
import torch

from flora.client.sampling import LocalExamples
from flora.client.self_training import PseudoLabels
from flora.clip.towers.towers import AdaptedClip
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.memory import available_memory_bytes, is_out_of_memory, release_cached_memory
from flora.core.tree import StateLike
from flora.engine.blocks import Block, block_bytes, make_blocks
from flora.engine.capacity import client_bytes
from flora.engine.losses import example_losses, pseudo_labels
from flora.engine.tasks import ClientResult, ClientTask
from flora.engine.training import train_block
from flora.features.features import Features

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class Engine:
    """Trains clients and evaluates their adapters, up to `clients_per_block` of them in one step.

    That number is lowered when a block doesn't fit into memory; results depend on it to rounding only. `features` are
    those of all training images.
    """

    model: AdaptedClip
    features: Features
    clients_per_block: int
    hooks: Hooks = field(default_factory=Hooks)
    log: Callable[[str], object] = lambda line: None

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """Train every task's client and hand on its result, block by block: in no particular order.

        Tasks share steps with those of the same `step_key`, whatever run they are of. Raises `UserError` if one client
        alone doesn't fit into memory.
        """
        total = sum(task.num_steps for task in tasks)
        taken = 0

        def advance(number: int) -> None:
            nonlocal taken
            taken += number
            self.hooks.after_step(taken, total)

        by_key: dict[Hashable, list[ClientTask]] = {}
        for task in tasks:
            by_key.setdefault(task.step_key, []).append(task)
        for alike in by_key.values():
            waiting = self._blocks(alike)
            while waiting:
                block, taken_before = waiting.pop(0), taken
                done = _unless_out_of_memory(self._train_block, block, advance)
                if not done:
                    waiting[:0], taken = self._smaller(block), taken_before
                for results in done:
                    yield from results

    @property
    def num_runs(self) -> int:
        """How many runs' clients share its steps."""
        return 1

    def seconds(self) -> float:
        """A clock for what this run's work takes."""
        return time.perf_counter()

    def evaluate(
        self,
        key: Hashable,
        adapters: StateLike | None,
        compute: Callable[[StateLike | None], Sequence[Result]],
    ) -> Sequence[Result]:
        """Return what `compute` makes of each of K adapters `(K, ...)`, None being the frozen model.

        What runs that train together compute under the same `key` is computed once for all of them.
        """
        return compute(adapters)

    def in_blocks(
        self,
        items: Sequence[Item],
        compute: Callable[[Sequence[Item]], Result],
        *,
        setting: str = "evaluation.batch_size",
    ) -> Iterator[Result]:
        """Compute items, some clients or their adapters, up to `clients_per_block` at a time; yield the results.

        Raises `UserError` if one item alone doesn't fit into memory; it says that `setting` is to be lowered.
        """
        start = 0
        while start < len(items):
            part = items[start : start + self.clients_per_block]
            done = _unless_out_of_memory(compute, part)
            if not done:
                self._lower(len(part), f"; lower {setting}")
                continue
            yield from done
            start += len(part)

    def _blocks(self, tasks: Sequence[ClientTask]) -> list[Block]:
        """The tasks in blocks, with every batch laid out. Raises `UserError` if these don't fit into memory."""
        needed, free = block_bytes(tasks, self.clients_per_block), available_memory_bytes(torch.device("cpu"))
        if needed > free:
            raise UserError(
                f"out of memory: a client takes up to {max(task.num_steps for task in tasks):,} steps in a round, and "
                f"the batches of the cohort need {needed / 1e9:.1f} GB where {free / 1e9:.1f} GB are free; lower "
                "local.epochs or local.steps (personal.epochs, after the last round)"
            )
        labels = self.features.labels.numpy()
        losses, without_label = self._losses(tasks), self._labelled(tasks)
        examples = [
            LocalExamples(task.examples, labels[task.examples], own_losses, labelled)
            for task, own_losses, labelled in zip(tasks, losses, without_label, strict=True)
        ]
        return list(make_blocks(tasks, self.clients_per_block, examples))

    def _labelled(self, tasks: Sequence[ClientTask]) -> Sequence[PseudoLabels | None]:
        """Each client's images without a label, labelled by the adapter that it starts from, if it learns from them."""
        if tasks[0].setup.local.active_self_training is None:
            return [None] * len(tasks)
        parts = self.in_blocks(
            tasks, lambda some: pseudo_labels(self.model, self.features, some), setting="local.batch_size"
        )
        return list(chain.from_iterable(parts))

    def _losses(self, tasks: Sequence[ClientTask]) -> Sequence[np.ndarray | None]:
        """The losses `(N,)` of each client's examples before it trains, if its sampling asks for them."""
        local = tasks[0].setup.local
        if not local.sampling.needs_losses:
            return [None] * len(tasks)
        parts = self.in_blocks(
            tasks,
            lambda some: example_losses(self.model, self.features, some, batch_size=local.batch_size),
            setting="local.batch_size",
        )
        return list(chain.from_iterable(parts))

    def _train_block(self, block: Block, advance: Callable[[int], object]) -> list[ClientResult]:
        self.hooks.before_block(block.setup.round, block.clients)
        return train_block(self.model, self.features, block, advance)

    def _smaller(self, block: Block) -> list[Block]:
        """A block that did not fit, in parts; from now on blocks are no larger than half of it."""
        number, batch_size = len(block.tasks), block.setup.local.images_per_step
        release_cached_memory(self.model.device)
        need = client_bytes(self.model, batch_size=batch_size)
        free = available_memory_bytes(self.model.device)
        about = f"which needs about {need / 1e9:.1f} GB where {free / 1e9:.1f} GB are free"
        self._lower(number, f", {about}; lower local.batch_size or the number of prompts")
        size = self.clients_per_block
        return [block.part(start, min(start + size, number)) for start in range(0, number, size)]

    def _lower(self, number: int, advice: str) -> None:
        """Have blocks of at most half of `number` clients. Raises `UserError` with `advice` where that is none."""
        release_cached_memory(self.model.device)
        if number == 1:
            raise UserError(f"out of memory with one client in a step{advice}")
        size = min(self.clients_per_block, -(-number // 2))
        if size < self.clients_per_block:
            self.clients_per_block = size
            self.log(f"out of memory: from now on {size} clients in one step, with the same results up to rounding")


def _unless_out_of_memory(function: Callable[..., Result], *arguments: object) -> list[Result]:
    """Return a function's result in a list, which is empty if memory ran out; its tensors are let go of by then."""
    try:
        return [function(*arguments)]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return []
