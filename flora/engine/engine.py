"""The engine: tasks in, results out. It alone knows of blocks, of memory that runs out, and of the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from flora.client.sampling import LocalExamples
from flora.client.self_training import PseudoLabels
from flora.clip.towers.towers import AdaptedClip
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.memory import available_memory_bytes, keep_freed_memory, release_cached_memory
from flora.core.processes import ALONE, Processes
from flora.core.tree import StateLike
from flora.engine.blocks import Block, block_bytes, longest_first, make_block
from flora.engine.capacity import client_bytes
from flora.engine.dealing import RESULTS, Travel, Work, compute_all, parts_of
from flora.engine.frozen import FrozenImages
from flora.engine.losses import example_losses, pseudo_labels
from flora.engine.tasks import ClientResult, ClientTask, TrainingSetup
from flora.engine.training import train_block
from flora.features.features import Features

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class Engine:
    """Trains clients and evaluates their adapters, up to `clients_per_block` of them in one step.

    That number is lowered when a block doesn't fit into memory; results depend on it to rounding only. `features` are
    those of all training images. Where a run has several `processes`, each trains some of the blocks, and all of them
    hand on all results. `memory_bytes` is how much memory what the frozen model makes of images may take, None being
    half of what is free.
    """

    model: AdaptedClip
    features: Features
    clients_per_block: int
    hooks: Hooks = field(default_factory=Hooks)
    log: Callable[[str], object] = lambda line: None
    processes: Processes = ALONE
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        self._frozen_images = FrozenImages(self.model, self.features, self.memory_bytes)

    def with_targets(self, targets: StateLike) -> Engine:
        """The same engine with other `targets` of its examples, whose images are the same."""
        other = replace(self, features=replace(self.features, targets=targets))
        other._frozen_images = self._frozen_images
        return other

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """Train every task's client and hand on its result, block by block: in no particular order.

        Tasks share steps with those of the same `step_key`, whatever run they are of. Raises `UserError` if one client
        alone doesn't fit into memory.
        """
        keep_freed_memory()
        total = sum(task.num_steps for task in tasks)
        taken = handed_on = 0

        def advance(number: int) -> None:
            nonlocal taken
            taken += number
            self.hooks.after_step(taken, total)

        def train_some(some: Sequence[ClientTask]) -> list[ClientResult]:
            nonlocal taken
            before = taken
            try:
                return self._train_block(some, advance)
            except Exception:
                taken = before
                raise

        by_key: dict[Hashable, list[ClientTask]] = {}
        for task in tasks:
            by_key.setdefault(task.step_key, []).append(task)
        for alike in by_key.values():
            work = Work(
                train_some,
                advice=partial(self._training_advice, alike[0].setup),
                travel=RESULTS,
                cost=lambda some: sum(task.num_steps for task in some),
            )
            for results in self._in_turn(longest_first(alike), work):
                handed_on += sum(result.num_steps for result in results)
                if taken < handed_on:  # other processes took these steps
                    advance(handed_on - taken)
                yield from results

    @property
    def num_runs(self) -> int:
        """How many runs' clients share its steps."""
        return 1

    def seconds(self) -> float:
        """A clock for what this run's work takes."""
        return time.perf_counter()

    def aside(self, function: Callable[[], object]) -> None:
        """Do something that mostly waits for a disk, while other runs go on that train together with this one."""
        function()

    def mean_losses(self, tasks: Sequence[ClientTask]) -> np.ndarray:
        """The mean cross-entropy of each task's examples with the adapter that it starts from, `(K,)`."""
        losses = example_losses(self.model, self.features, tasks, batch_size=tasks[0].setup.local.batch_size)
        return np.array([each.mean() for each in losses])

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
        travel: Travel[Result] | None = None,
    ) -> Iterator[Result]:
        """Compute items, some clients or their adapters, up to `clients_per_block` at a time; yield the results.

        With `travel` they are dealt out among the processes. Raises `UserError` if one item alone doesn't fit into
        memory; it says that `setting` is to be lowered.
        """
        return self._in_turn(items, Work(compute, advice=lambda: f"; lower {setting}", travel=travel))

    def _in_turn(self, items: Sequence[Item], work: Work[Item, Result]) -> Iterator[Result]:
        """Yield the results of the items' parts in their order; parts that don't fit into memory are cut again.

        One process hands each result on before it goes on; several exchange what they have when all is done.
        """
        waiting = parts_of(items, self.clients_per_block)
        while waiting:
            number = len(waiting) if self.processes.size > 1 and work.travel is not None else 1
            some, waiting = waiting[:number], waiting[number:]
            done = compute_all(self.processes, some, work)
            failed = [part for part, results in zip(some, done, strict=True) if not results]
            for results in done:
                yield from results
            del done
            if failed:
                self._lower(max(map(len, failed)), work.advice)
                rest = [item for part in (*failed, *waiting) for item in part]
                waiting = parts_of(rest, self.clients_per_block)

    def _laid_out(self, tasks: Sequence[ClientTask]) -> Block:
        """A block, with every batch laid out. Raises `UserError` if these don't fit into memory."""
        needed, free = block_bytes(tasks), available_memory_bytes(torch.device("cpu"))
        if needed > free:
            raise UserError(
                f"out of memory: a client takes up to {max(task.num_steps for task in tasks):,} steps in a round, and "
                f"the batches of {len(tasks)} clients need {needed / 1e9:.1f} GB where {free / 1e9:.1f} GB are free; "
                "lower local.epochs or local.steps (personal.epochs, after the last round)"
            )
        local, labels = tasks[0].setup.local, self.features.labels.numpy()
        losses: Sequence[np.ndarray | None] = [None] * len(tasks)
        without_label: Sequence[PseudoLabels | None] = [None] * len(tasks)
        if local.sampling.needs_losses:
            losses = example_losses(self.model, self.features, tasks, batch_size=local.batch_size)
        if local.active_self_training is not None:
            without_label = pseudo_labels(self.model, self.features, tasks)

        examples = [
            LocalExamples(task.examples, labels[task.examples], own_losses, labelled)
            for task, own_losses, labelled in zip(tasks, losses, without_label, strict=True)
        ]
        return make_block(tasks, examples)

    def _train_block(self, tasks: Sequence[ClientTask], advance: Callable[[int], object]) -> list[ClientResult]:
        self.hooks.before_block(tasks[0].setup.round, tuple(task.client for task in tasks))
        return train_block(self.model, self.features, self._laid_out(tasks), self._frozen_images, advance)

    def _training_advice(self, setup: TrainingSetup) -> str:
        need = client_bytes(self.model, batch_size=setup.local.images_per_step)
        free = available_memory_bytes(self.model.device)
        about = f"which needs about {need / 1e9:.1f} GB where {free / 1e9:.1f} GB are free"
        return f", {about}; lower local.batch_size or the number of prompts"

    def _lower(self, number: int, advice: Callable[[], str]) -> None:
        """Have blocks of at most half of `number` clients. Raises `UserError` with `advice` where that is none."""
        release_cached_memory(self.model.device)
        if number == 1:
            raise UserError(f"out of memory with one client in a step{advice()}")
        size = min(self.clients_per_block, -(-number // 2))
        if size < self.clients_per_block:
            self.clients_per_block = size
            self.log(f"out of memory: from now on {size} clients in one step, with the same results up to rounding")
