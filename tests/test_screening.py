"""A client whose update can't be used is left out, named, and harms nobody; memory that runs out costs time alone."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TOLERANCE

from flora.config.parse import parse_config
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.records import Rejection
from flora.core.registry import OptionError
from flora.core.states import ClientUpdate, ServerState
from flora.engine import engine
from flora.server.screening import Screening, screen
from flora.simulate import RunResult, resume, simulate

ADAPTER = {"a": torch.zeros(2)}


def update(client: int, *values: float, **changes: Any) -> ClientUpdate:
    made = ClientUpdate(client, 10, {"a": torch.tensor(values)}, loss=1.0, num_steps=3)
    return dataclasses.replace(made, **changes)


GOOD = [update(1, 3.0, 4.0), update(2, 0.0, 5.0), update(3, 6.0, 8.0)]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (update(0, math.nan, 0.0), "not finite"),
        (update(0, math.inf, 0.0), "not finite"),
        (update(0, 1.0, 0.0, loss=math.nan), "not finite"),
        (update(0, 1.0, 0.0, failed_step=2), "not finite"),
        (update(0, 1.0, 0.0, extra={"control": torch.tensor([math.inf])}), "not finite"),
        (update(0, 1.0), "wrong names, shapes or types"),
        (update(0, 1.0, 2.0, delta={"b": torch.zeros(2)}), "wrong names, shapes or types"),
        (update(0, 1.0, 2.0, delta={"a": torch.zeros(2, dtype=torch.int64)}), "wrong names, shapes or types"),
        (update(0, 1.0, 2.0, delta={}), "wrong names, shapes or types"),
    ],
)
@pytest.mark.parametrize("policy", ["skip", "abort", "clip"])
def test_what_can_never_be_averaged(bad: ClientUpdate, reason: str, policy: str) -> None:
    accepted, rejections = screen([bad, *GOOD], ADAPTER, Screening(policy=policy, max_norm_ratio=100))
    assert accepted == GOOD
    assert rejections == [Rejection(0, bad.failed_step, reason)]


def test_the_bound_by_hand() -> None:
    large = update(0, 1e30, 0.0)
    # Norms 1e30, 5, 5 and 10: the median is 7.5.
    accepted, rejections = screen([large, *GOOD], ADAPTER, Screening(max_norm_ratio=2))
    assert accepted == GOOD
    assert rejections == [Rejection(0, None, "norm 1e+30, the cohort's median is 7.5")]
    accepted, rejections = screen([large, *GOOD], ADAPTER, Screening(policy="clip", max_norm_ratio=2))
    assert not rejections
    assert accepted[0].delta["a"].tolist() == pytest.approx([15.0, 0.0])
    assert accepted[1:] == GOOD
    assert screen([large, *GOOD], ADAPTER, Screening()) == ([large, *GOOD], [])
    still = [dataclasses.replace(each, delta={"a": torch.zeros(2)}) for each in GOOD]
    assert screen([large, *still], ADAPTER, Screening(max_norm_ratio=2)) == ([large, *still], [])  # the median is 0
    with pytest.raises(OptionError, match="policy clip needs one"):
        Screening(policy="clip")
    nobody_knows = [large, GOOD[0]]
    assert screen(nobody_knows, ADAPTER, Screening(max_norm_ratio=2)) == (nobody_knows, [])


def run(raw: dict[str, Any], hooks: Hooks, **screening: Any) -> RunResult:
    return simulate(parse_config({**raw, "server": {"screening": screening}}), numbered=True, hooks=hooks)


def replaced(client: int, delta: dict[str, torch.Tensor] | float) -> Hooks:
    """Hooks with which a client sends something else in round 1."""

    def change(round: int, update: ClientUpdate) -> ClientUpdate:
        if (round, update.client) != (1, client):
            return update
        if isinstance(delta, dict):
            return dataclasses.replace(update, delta=delta)
        return dataclasses.replace(update, delta={name: each * 0 + delta for name, each in update.delta.items()})

    return Hooks(update=change)


@pytest.mark.parametrize("value", [math.nan, math.inf, {}, {"a": torch.zeros(3)}], ids=["nan", "inf", "none", "shape"])
def test_a_bad_client_is_left_out_and_named(raw_config: dict[str, Any], value: Any) -> None:
    result = run(raw_config, replaced(2, value))
    first, second = result.records[1:]
    assert [rejection.client for rejection in first.rejected_clients] == [2]
    assert second.rejected_clients == ()
    assert first.num_clients == 4
    assert result.summary.num_rejected == 1
    line = json.loads((result.directory / "rounds.jsonl").read_text().splitlines()[1])
    assert line["rejected_clients"][0]["client"] == 2
    assert "round 1: client 2 is left out: " in (result.directory / "log.txt").read_text()
    assert all(torch.isfinite(tensor).all() for tensor in result.adapter.values())
    said = (
        r" diverged .* at learning rate 0\.01; lower local\." if isinstance(value, float) else "'s update can't be used"
    )
    with pytest.raises(UserError, match=rf"^round 1: client 2{said}"):
        run(raw_config, replaced(2, value), policy="abort")


def test_the_average_is_that_of_the_others(raw_config: dict[str, Any]) -> None:
    """Leaving a client out is the same as its weight being zero: the sum of the others is that of the hook's view."""
    raw_config["backbone"]["precision"] = "fp64"
    seen: dict[int, ClientUpdate] = {}

    def remember(round: int, update: ClientUpdate) -> ClientUpdate:
        if round == 1:
            seen[update.client] = update
        return dataclasses.replace(update, loss=math.nan) if update.client == 0 else update

    result = simulate(parse_config({**raw_config, "rounds": 1}), numbered=True, hooks=Hooks(update=remember))
    start = simulate(parse_config({**raw_config, "rounds": 0}), numbered=True).adapter
    others = [seen[client] for client in (1, 2, 3)]
    total = sum(update.num_examples for update in others)
    for name, tensor in result.adapter.items():
        mean = sum(update.num_examples / total * update.delta[name] for update in others)
        torch.testing.assert_close(tensor, start[name] + mean, atol=TOLERANCE, rtol=0)


def test_one_exploding_client_under_a_bound(raw_config: dict[str, Any]) -> None:
    skipped = run(raw_config, replaced(1, 1e30), max_norm_ratio=10.0)
    assert [rejection.client for rejection in skipped.records[1].rejected_clients] == [1]
    clipped = run(raw_config, replaced(1, 1e30), policy="clip", max_norm_ratio=10.0)
    assert clipped.records[1].rejected_clients == ()
    assert all(torch.isfinite(tensor).all() for tensor in clipped.adapter.values())


def test_a_cohort_that_is_rejected_whole_changes_nothing(raw_config: dict[str, Any]) -> None:
    def spoil(round: int, update: ClientUpdate) -> ClientUpdate:
        return dataclasses.replace(update, loss=math.nan) if round == 2 else update

    raw_config["rounds"] = 2
    spoiled = simulate(parse_config(raw_config), numbered=True, hooks=Hooks(update=spoil))
    one = simulate(parse_config({**raw_config, "rounds": 1}), numbered=True)
    assert all(torch.equal(spoiled.adapter[name], one.adapter[name]) for name in one.adapter)
    record = spoiled.records[2]
    assert record.train_loss is None
    assert len(record.rejected_clients) == record.num_clients == 4
    assert record.accuracy == spoiled.records[1].accuracy


def test_a_run_that_diverges_ends_and_keeps_what_was_before(raw_config: dict[str, Any], tmp_path: Any) -> None:
    def spoil(round: int, update: ClientUpdate) -> ClientUpdate:
        return dataclasses.replace(update, failed_step=1) if round > 2 else update

    raw_config["rounds"] = 9
    with pytest.raises(UserError, match=r"^round 3: client 0 diverged at step 1 \(not finite\) at learning rate 0\.01"):
        simulate(parse_config(raw_config), hooks=Hooks(update=spoil))
    directory = tmp_path / "runs" / "test"
    rounds = [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]
    assert [record["round"] for record in rounds] == [0, 1, 2, 3, 4, 5]
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["round-0004", "round-0005"]
    assert "to go on" not in (directory / "log.txt").read_text()  # it would come to the same
    with pytest.raises(UserError, match=r"^round 3: client 0 diverged .*no update could be used in 3 rounds in a row"):
        resume(directory)


def test_a_learning_rate_that_is_too_high_names_the_step(raw_config: dict[str, Any]) -> None:
    raw_config["local"] = {"learning_rate": 1e30, "batch_size": 4, "optimizer": "sgd", "epochs": 3}
    raw_config["server"] = {"screening": {"policy": "abort"}}
    with pytest.raises(
        UserError, match=r"^round 1: client \d diverged at step \d+ \(not finite\) at learning rate 1e\+30"
    ):
        simulate(parse_config(raw_config))


def test_a_rejected_client_keeps_its_earlier_optimiser_state(raw_config: dict[str, Any], tmp_path: Any) -> None:
    from flora.runs.checkpoints import CheckpointFolder

    raw_config["local"]["optimizer_state"] = "kept"

    def spoil(round: int, update: ClientUpdate) -> ClientUpdate:
        fails = update.client == 0 or (round, update.client) == (2, 1)
        return dataclasses.replace(update, loss=math.nan) if fails else update

    result = simulate(parse_config(raw_config), hooks=Hooks(update=spoil))
    folder = CheckpointFolder(result.directory / "checkpoints")
    like = ServerState(0, result.adapter)
    kept = parse_config(raw_config).local.client_state(result.adapter)
    first, second = (folder.load(round, like=like, client_like=kept).state.clients for round in (1, 2))
    assert first.keys() == second.keys() == {1, 2, 3}
    assert torch.equal(first[1].optimizer["mean"], second[1].optimizer["mean"])
    assert not torch.equal(first[2].optimizer["mean"], second[2].optimizer["mean"])


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    RuntimeError("std::bad_alloc"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_a_block_that_does_not_fit_is_halved(raw_config: dict[str, Any], error: Exception) -> None:
    raw_config["backbone"]["precision"] = "fp64"
    raw_config["clients"] = {"number": 6}
    raw_config["adapter"]["dropout"] = 0.2
    sizes: list[int] = []

    def full(round: int, clients: tuple[int, ...]) -> None:
        sizes.append(len(clients))
        if len(clients) > 2:
            raise error

    whole = simulate(parse_config(raw_config), numbered=True)
    halved = simulate(parse_config(raw_config), numbered=True, hooks=Hooks(before_block=full))
    # Half of them is too many, too; in the second round all blocks have two clients from the start.
    assert sizes == [6, 3, 2, 2, 2, 2, 2, 2]
    for name, tensor in whole.adapter.items():
        torch.testing.assert_close(halved.adapter[name], tensor, atol=TOLERANCE, rtol=0)
    lines = (halved.directory / "log.txt").read_text().splitlines()
    said = [line.partition(" ")[2] for line in lines if "out of memory" in line]
    assert said == [
        f"out of memory: from now on {n} clients in one step, with the same results up to rounding" for n in (3, 2)
    ]
    # Where it is resumed, blocks are as small from the start: the sums are the same to the last bit.
    with pytest.raises(Stop):
        simulate(parse_config(raw_config), numbered=True, hooks=stopping_after(full, 8))
    directory = halved.directory.with_name("test-3")
    sizes.clear()
    again = resume(directory)
    assert all(torch.equal(again.adapter[name], tensor) for name, tensor in halved.adapter.items())


class Stop(Exception):
    """What a hook ends a run with."""


def stopping_after(full: Any, number: int) -> Hooks:
    """Hooks that run out of memory as `full` does, and end the run at block `number`."""
    blocks = 0

    def before_block(round: int, clients: tuple[int, ...]) -> None:
        nonlocal blocks
        blocks += 1
        if blocks == number:
            raise Stop
        full(round, clients)

    return Hooks(before_block=before_block)


def test_one_client_that_does_not_fit_is_an_error_with_an_estimate(raw_config: dict[str, Any]) -> None:
    def full(round: int, clients: tuple[int, ...]) -> None:
        raise MemoryError

    with pytest.raises(
        UserError, match=r"out of memory with one client in a step, which needs about 0\.0 GB where .* GB"
    ):
        simulate(parse_config(raw_config), hooks=Hooks(before_block=full))


def test_batches_that_do_not_fit_are_refused_before_they_are_made(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "available_memory_bytes", lambda device: 10**9)
    raw_config["partition"], raw_config["local"]["steps"] = "iid", 10_000_000
    with pytest.raises(UserError) as caught:
        simulate(parse_config(raw_config))
    # 4 clients, 8 examples a step, 8 bytes for the index of each and one for whether it is real.
    assert str(caught.value) == (
        "out of memory: a client takes up to 10,000,000 steps in a round, and the batches of 4 clients need 2.9 GB "
        "where 1.0 GB are free; lower local.epochs or local.steps (personal.epochs, after the last round)"
    )


def test_other_errors_are_not_taken_for_memory(raw_config: dict[str, Any]) -> None:
    def fail(round: int, clients: tuple[int, ...]) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        simulate(parse_config(raw_config), hooks=Hooks(before_block=fail))


def test_a_client_alone_that_diverges_stays_where_it_was(raw_config: dict[str, Any]) -> None:
    raw_config["local"] = {"learning_rate": 1e30, "batch_size": 4, "optimizer": "sgd", "epochs": 3}
    raw_config["evaluation"] = {"num_local_only": 2}
    result = simulate(parse_config(raw_config))
    assert result.summary.local_only_accuracy_mean == result.summary.zero_shot_accuracy
    assert np.isfinite(result.summary.last_accuracy)
