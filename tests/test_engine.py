"""The engine: tasks of several setups, blocks that don't fit, and what is evaluated in blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import LOCAL, SIZES, TOLERANCE, adapt, assert_states_close, federation, random_adapters, variant

from flora.client.corrections import FedDyn, FedProx, Scaffold
from flora.client.objectives import MultiPositive
from flora.client.optimizers import AdamW, Sgd
from flora.clip.adapters.lora import Lora
from flora.core import tree
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.rng import Rng
from flora.core.states import ClientState
from flora.engine.tasks import ClientTask
from flora.federated.federation import Federation


def parts_of(model: str, per_block: int = 5) -> Federation:
    return federation(adapt(model, Lora(rank=2)), LOCAL, per_block=per_block)


def tasks_of(parts: Federation, round: int, rate: float, seed: int = 3, **changes: Any) -> list[ClientTask]:
    """All clients' tasks from a random adapter, as of a round of one of several runs."""
    local = dataclasses.replace(LOCAL, learning_rate=rate, **changes)
    adapter = {name: each[seed] for name, each in random_adapters(parts.engine.model, 10).items()}
    setup = parts.setup(round, parts.roles.trained(adapter, round), local)
    vector = tree.vector_like(adapter)
    remembered = local.correction.memory(torch.full_like(vector, 0.01 * seed))
    server = {name: torch.full_like(each, 0.02 * seed) for name, each in remembered.items()}
    setup = dataclasses.replace(setup, server_correction=server)
    return [
        dataclasses.replace(
            parts.task(client, adapter, setup, Rng(seed)),
            state=ClientState(correction={name: torch.full_like(each, 0.01) for name, each in remembered.items()}),
        )
        for client in range(len(SIZES))
    ]


RUNS: dict[str, list[dict[str, Any]]] = {
    "rates": [{"rate": 0.1}, {"rate": 0.02, "seed": 4}],
    "momentum": [{"rate": rate, "optimizer": Sgd(momentum=0.9, nesterov=True)} for rate in (0.1, 0.03)],
    "adamw": [{"rate": rate, "optimizer": AdamW(weight_decay=0.1)} for rate in (0.01, 0.003)],
    "steps": [{"rate": 0.1, "steps": 2}, {"rate": 0.1, "epochs": 3}],
    "scaffold": [{"rate": 0.1, "correction": Scaffold()}, {"rate": 0.02, "correction": Scaffold(), "seed": 5}],
    "corrections": [
        {"rate": 0.1, "correction": FedProx(0.5)},
        {"rate": 0.1, "correction": FedProx(0.1), "seed": 4},
        {"rate": 0.05, "correction": FedDyn(0.3)},
        {"rate": 0.05},
    ],
}


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_tasks_of_several_runs_share_steps_and_train_as_if_each_were_alone(
    tiny_model: str, runs: list[dict[str, Any]]
) -> None:
    parts = parts_of(tiny_model, per_block=8)
    tasks = [tasks_of(parts, round, **run) for round, run in enumerate(runs, 1)]
    steps: list[tuple[int, int]] = []
    blocks: list[int] = []
    hooks = Hooks(
        after_step=lambda *pair: steps.append(pair), before_block=lambda round, clients: blocks.append(len(clients))
    )
    numbered = [
        dataclasses.replace(task, client=task.client + 10 * run) for run, each in enumerate(tasks) for task in each
    ]
    together = {result.client: result for result in variant(parts, hooks=hooks).engine.train(numbered)}
    assert sorted(blocks) == sorted([8] * (len(numbered) // 8) + [len(numbered) % 8] * bool(len(numbered) % 8))
    assert steps[-1] == (sum(task.num_steps for task in numbered),) * 2
    for run, each in enumerate(tasks):
        for alone in parts.engine.train(each):
            result = together[alone.client + 10 * run]
            assert_states_close(result.adapter, alone.adapter)
            assert_states_close(result.state.correction, alone.state.correction)
            assert_states_close(result.sent_correction, alone.sent_correction)
            assert (result.num_steps, result.loss) == (alone.num_steps, pytest.approx(alone.loss, abs=TOLERANCE))


def test_clients_of_other_losses_or_residuals_get_steps_of_their_own(tiny_model: str) -> None:
    parts = parts_of(tiny_model)
    first, other = tasks_of(parts, 1, 0.1), tasks_of(parts, 1, 0.1, objective=MultiPositive())
    assert first[0].step_key != other[0].step_key
    with_residual = [
        [dataclasses.replace(task, adapter={**task.adapter, "x.residual_A": torch.zeros(1, 2)}) for task in run]
        for run in (first, tasks_of(parts, 1, 0.1))
    ]
    assert with_residual[0][0].step_key == with_residual[0][1].step_key != with_residual[1][0].step_key


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
