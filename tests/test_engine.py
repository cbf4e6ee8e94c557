"""The engine: tasks of several setups, blocks that don't fit, and what is evaluated in blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from helpers import LOCAL, SIZES, adapt, assert_states_close, federation, start, variant

from flora.clip.adapters.lora import Lora
from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.engine.tasks import ClientTask
from flora.federated.federation import Federation


def parts_of(model: str, per_block: int = 5) -> Federation:
    return federation(adapt(model, Lora(rank=2)), LOCAL, per_block=per_block)


def tasks_of(parts: Federation, round: int, rate: float) -> list[ClientTask]:
    adapter = start(parts.engine.model).adapter
    local = dataclasses.replace(LOCAL, learning_rate=rate)
    setup = parts.setup(round, parts.roles.trained(adapter, round), local)
    return [parts.task(client, adapter, setup, Rng(3)) for client in range(len(SIZES))]


def test_tasks_of_two_setups_train_as_if_each_were_alone(tiny_model: str) -> None:
    parts = parts_of(tiny_model)
    one, two = tasks_of(parts, 1, 0.1), tasks_of(parts, 2, 0.02)
    mixed = [task for pair in zip(one, two, strict=True) for task in pair]
    steps: list[tuple[int, int]] = []
    watched = variant(parts, hooks=dataclasses.replace(parts.engine.hooks, after_step=lambda *pair: steps.append(pair)))
    together = list(watched.engine.train(mixed))
    apart = [*parts.engine.train(one), *parts.engine.train(two)]
    assert [result.client for result in together] == [result.client for result in apart]
    for left, right in zip(together, apart, strict=True):
        assert all(torch.equal(left.adapter[name], tensor) for name, tensor in right.adapter.items())
    assert steps[-1] == (sum(task.num_steps for task in mixed),) * 2


def test_no_tasks_are_no_results(tiny_model: str) -> None:
    assert list(parts_of(tiny_model).engine.train([])) == []


def test_results_do_not_depend_on_how_tasks_are_ordered_or_cut(tiny_model: str) -> None:
    found = []
    for per_block, step in ((5, 1), (2, -1), (1, 1)):
        parts = parts_of(tiny_model, per_block)
        results = parts.engine.train(tasks_of(parts, 1, 0.05)[::step])
        found.append({result.client: result for result in results})
    for other in found[1:]:
        for client, result in found[0].items():
            assert_states_close(result.adapter, other[client].adapter)
            assert result.num_steps == other[client].num_steps


def test_what_is_evaluated_in_blocks_is_cut_where_memory_runs_out(tiny_model: str) -> None:
    lines: list[str] = []
    engine = variant(parts_of(tiny_model), log=lines.append).engine
    sizes: list[int] = []

    def squares(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("simulated")
        return [item**2 for item in items]

    assert [each for part in engine.in_blocks(range(7), squares) for each in part] == [n**2 for n in range(7)]
    assert sizes == [5, 3, 2, 2, 2, 1] and engine.clients_per_block == 2 and len(lines) == 2
    assert list(engine.in_blocks([], squares)) == []


def test_one_that_does_not_fit_alone_is_one_line(tiny_model: str) -> None:
    engine = parts_of(tiny_model).engine

    def fails(items: Sequence[int]) -> None:
        raise MemoryError

    with pytest.raises(UserError) as caught:
        list(engine.in_blocks(range(2), fails))
    assert str(caught.value) == "out of memory with one client in a step; lower evaluation.batch_size"


def test_what_else_goes_wrong_in_a_block_is_not_taken_for_memory(tiny_model: str) -> None:
    def fails(items: Sequence[int]) -> None:
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        list(parts_of(tiny_model).engine.in_blocks(range(2), fails))
