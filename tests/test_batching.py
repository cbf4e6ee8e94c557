"""Every client sees each of its examples once an epoch, whoever shares the block with it."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from flora.client.local_training import LocalTraining
from flora.client.sampling import LocalExamples
from flora.core.rng import Rng
from flora.engine.blocks import Block, block_bytes, longest_first, make_block
from flora.engine.dealing import parts_of
from flora.engine.tasks import ClientTask, TrainingSetup

sizes_strategy = st.lists(st.integers(1, 23), min_size=1, max_size=7)


def blocks_of(sizes: list[int], *, per_block: int, batch_size: int, epochs: int = 1, steps: int | None = None):  # type: ignore[no-untyped-def]
    ends = np.cumsum(sizes)
    examples = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    cohort = [10 + client for client in range(len(sizes))]
    local = LocalTraining(batch_size=batch_size, epochs=epochs, steps=steps)
    owned = dict(zip(cohort, examples, strict=True))
    return made(tasks_of(owned, local, min(batch_size, max(sizes))), per_block), owned


def made(tasks: list[ClientTask], per_block: int) -> list[Block]:
    return [
        make_block(part, [examples_of(task) for task in part]) for part in parts_of(longest_first(tasks), per_block)
    ]


def examples_of(task: ClientTask) -> LocalExamples:
    return LocalExamples(task.examples, np.zeros(len(task.examples), np.int64))


def tasks_of(owned: dict[int, np.ndarray], local: LocalTraining, width: int) -> list[ClientTask]:
    setup = TrainingSetup(1, local, 0.1, (), width)
    return [ClientTask(client, {}, own, Rng(3).child("client", client), setup) for client, own in owned.items()]


@given(sizes=sizes_strategy, per_block=st.integers(1, 4), batch_size=st.integers(1, 9), epochs=st.integers(1, 3))
def test_an_epoch_visits_each_example_once(sizes: list[int], per_block: int, batch_size: int, epochs: int) -> None:
    blocks, examples = blocks_of(sizes, per_block=per_block, batch_size=batch_size, epochs=epochs)
    assert sorted(client for block in blocks for client in block.clients) == sorted(examples)
    for block in blocks:
        assert list(block.num_steps) == sorted(block.num_steps, reverse=True)
        for place, client in enumerate(block.clients):
            own = examples[client]
            mask = block.example_mask[:, place]
            seen = block.indices[:, place][mask].numpy()
            for epoch in range(epochs):
                part = seen[epoch * len(own) : (epoch + 1) * len(own)]
                assert sorted(part) == list(own)
            assert len(seen) == epochs * len(own)
            assert mask.sum(dim=1).count_nonzero() == block.num_steps[place]
            taken = block.indices[: block.num_steps[place], place]
            assert np.isin(taken.numpy(), own).all()  # padding repeats the client's own examples


@given(sizes=sizes_strategy, batch_size=st.integers(1, 9))
def test_a_clients_batches_do_not_depend_on_the_block(sizes: list[int], batch_size: int) -> None:
    together, _ = blocks_of(sizes, per_block=7, batch_size=batch_size)
    alone, _ = blocks_of(sizes, per_block=1, batch_size=batch_size)
    for single in alone:
        place = together[0].clients.index(single.clients[0])
        steps = single.num_steps[0]
        assert torch.equal(together[0].indices[:steps, place], single.indices[:, 0])
        assert torch.equal(together[0].example_mask[:steps, place], single.example_mask[:, 0])


@given(sizes=sizes_strategy, per_block=st.integers(1, 7))
def test_segments_cover_exactly_the_steps_that_clients_take(sizes: list[int], per_block: int) -> None:
    for block in blocks_of(sizes, per_block=per_block, batch_size=4)[0]:
        active = [sum(step < own for own in block.num_steps) for step in range(block.num_steps[0])]
        covered = [(num_active, step) for num_active, steps in block.segments() for step in steps]
        assert covered == [(num_active, step) for step, num_active in enumerate(active)]


def test_steps_in_place_of_epochs() -> None:
    (block,), examples = blocks_of([3, 10], per_block=2, batch_size=4, steps=5)
    assert block.num_steps == (5, 5)
    for place, client in enumerate(block.clients):
        counts = np.bincount(block.indices[:, place][block.example_mask[:, place]].numpy(), minlength=13)
        own = counts[examples[client]]
        assert own.max() - own.min() <= 1  # a new epoch begins only when the last one is through


def test_the_bytes_of_a_blocks_batches_are_counted_before_they_are_made() -> None:
    examples = [np.arange(size) for size in (13, 4, 9, 1, 6)]
    tasks = tasks_of(dict(enumerate(examples)), LocalTraining(batch_size=4, epochs=2), 4)
    for block in (block for per_block in (1, 2, 5) for block in made(tasks, per_block)):
        assert block_bytes(block.tasks) == block.indices.nbytes + block.example_mask.nbytes
