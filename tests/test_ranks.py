"""Clients of different ranks: what each trains is what it would train if all had its rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LOCAL, SIZES, TOLERANCE, adapt, assert_states_close, federation, train, variant

from flora.client.local_training import LocalTraining
from flora.client.optimizers import AdamW, Sgd
from flora.clip.adapters.lora import Lora
from flora.communication.options import payload_bytes
from flora.communication.ranks import Drawn
from flora.config.parse import config_to_dict, parse_config
from flora.config.rules import check_experiment
from flora.core.errors import UserError
from flora.core.low_rank import aggregation_error, layers, rank_first, rank_padded
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.states import ServerState
from flora.federated.federation import Federation
from flora.federated.round import RoundResult, run_round
from flora.server.screening import Screening
from flora.server.strategies.base import Strategy
from flora.server.strategies.products import FlexLora, HetLora
from flora.server.strategies.residuals import FloraStacking
from flora.simulate import simulate

RANKS = np.array([4, 1, 2, 4, 3])


def parts_of(model: str, strategy: Strategy, local: LocalTraining = LOCAL, per_block: int = 1) -> Federation:
    adapted = adapt(model, Lora(rank=4, alpha=8))
    return federation(adapted, local, per_block=per_block, strategy=strategy, ranks=RANKS)


def rounds(parts: Federation, number: int) -> tuple[ServerState, list[RoundResult]]:
    state, results = parts.initial_state(parts.engine.model.initial_adapter(Rng(1))), []
    for _ in range(number):
        state, result = run_round(parts, state)
        results.append(result)
    return state, results


def test_cut_and_padded_by_hand() -> None:
    state = {"x.lora_A": torch.ones(3, 2), "x.lora_B": torch.ones(4, 3), "head": torch.ones(5)}
    assert {name: tuple(tensor.shape) for name, tensor in rank_first(state, 2).items()} == {
        "x.lora_A": (2, 2), "x.lora_B": (4, 2), "head": (5,)}  # fmt: skip
    padded = rank_padded(state, 1)
    assert padded["x.lora_A"].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert padded["x.lora_B"].tolist() == [[1, 0, 0]] * 4
    assert state["x.lora_A"].all() and state["x.lora_B"].all()


@pytest.mark.parametrize("optimizer", [Sgd(momentum=0.9, weight_decay=0.1), AdamW()])
def test_a_client_of_lower_rank_trains_as_if_all_had_its_rank(tiny_model: str, optimizer: Any) -> None:
    local = dataclasses.replace(LOCAL, learning_rate=0.01, optimizer=optimizer, epochs=2)
    parts = parts_of(tiny_model, HetLora(), local, per_block=5)
    start = parts.engine.model.initial_adapter(Rng(1))
    rng = Rng(3)
    received = {client: parts.received(start, client) for client in range(5)}
    ends = {client: result.adapter for client, result in train(parts, received, round=1, rng=rng).items()}
    for client, rank in enumerate(RANKS.tolist()):
        narrow = adapt(tiny_model, Lora(rank=rank, alpha=2 * rank))  # the same scaling, 2
        alone = federation(narrow, local)
        (result,) = train(alone, {client: rank_first(start, rank)}, round=1, rng=rng).values()
        assert_states_close(rank_first(ends[client], rank), result.adapter)
        assert all(torch.equal(ends[client][name], rank_padded(ends[client], rank)[name]) for name in start)


def test_hetlora_is_the_zero_padded_mean(tiny_model: str) -> None:
    parts = parts_of(tiny_model, HetLora())
    start = parts.engine.model.initial_adapter(Rng(1))
    state, (result,) = rounds(parts, 1)
    received = {client: parts.received(start, client) for client in range(5)}
    mean = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    rng = parts.rng.child("round", 1)
    sent = 0
    for client, result_alone in train(parts, received, round=1, rng=rng).items():
        own = result_alone.adapter
        sent += payload_bytes(rank_first(own, int(RANKS[client])))
        for name in mean:
            mean[name] += SIZES[client] / sum(SIZES) * own[name]
    assert_states_close(state.adapter, mean)
    assert result.uplink_bytes == result.downlink_bytes == sent < 5 * payload_bytes(start)


@pytest.mark.parametrize("strategy", [HetLora(), FlexLora(), FloraStacking()])
def test_clients_per_block_change_nothing(tiny_model: str, strategy: Strategy) -> None:
    local = dataclasses.replace(LOCAL, learning_rate=0.01)
    found = [rounds(parts_of(tiny_model, strategy, local, number), 2)[0].adapter for number in (1, 2, 5)]
    for other in found[1:]:
        for layer in layers(other):  # singular vectors may change their sign, products don't
            for kind in ("lora", "residual") if f"{layer}.residual_A" in other else ("lora",):
                left, right = (each[f"{layer}.{kind}_B"] @ each[f"{layer}.{kind}_A"] for each in (found[0], other))
                torch.testing.assert_close(left, right, atol=TOLERANCE, rtol=0)


def test_flexlora_sends_each_client_the_best_of_its_rank(tiny_model: str) -> None:
    parts = parts_of(tiny_model, FlexLora())
    state, (result,) = rounds(parts, 1)
    whole = state.adapter["text.0.q.lora_B"] @ state.adapter["text.0.q.lora_A"]
    u, values, v = torch.linalg.svd(whole)
    for client, rank in enumerate(RANKS.tolist()):
        own = parts.received(state.adapter, client)
        nearest = u[:, :rank] @ values[:rank].diag() @ v[:rank]
        torch.testing.assert_close(own["text.0.q.lora_B"] @ own["text.0.q.lora_A"], nearest, atol=TOLERANCE, rtol=0)
    assert result.aggregation_error is not None


def test_stacking_takes_ranks_exactly(tiny_model: str) -> None:
    _, results = rounds(parts_of(tiny_model, FloraStacking()), 2)
    assert all(result.aggregation_error is not None and result.aggregation_error < TOLERANCE for result in results)


def test_equal_clients_of_full_rank_have_no_error() -> None:
    client = {"x.lora_A": torch.randn(2, 3), "x.lora_B": torch.randn(4, 2)}
    assert aggregation_error([client] * 3, [1, 2, 3], client) == pytest.approx(0, abs=TOLERANCE)


def test_drawn_ranks() -> None:
    ranks = Drawn(values=(2, 4, 8), shares=(1.0, 0.0, 3.0)).draw(4000, Rng(0))
    assert set(ranks.tolist()) == {2, 8}
    assert np.mean(ranks == 8) == pytest.approx(0.75, abs=0.03)
    assert set(Drawn(values=(3,)).draw(5, Rng(0)).tolist()) == {3}
    with pytest.raises(OptionError, match=r"shares: expected 2 numbers, one for each value, got 1"):
        Drawn(values=(1, 2), shares=(1.0,))
    with pytest.raises(OptionError, match=r"shares: expected numbers of at least 0, not all of them 0"):
        Drawn(values=(1, 2), shares=(0.0, 0.0))
    with pytest.raises(OptionError, match=r"shares: expected numbers of at least 0, not all of them 0"):
        Drawn(values=(1, 2), shares=(1e308, 1e308))
    assert Drawn(values=(2, 8), shares=(1.0, 0.0)).highest == 2
    with pytest.raises(OptionError, match=r"values: expected at least one rank"):
        Drawn(values=())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": {"strategy": "fedavg"}, "clients": {"number": 2, "ranks": [1, 2]}},
         "clients.ranks: fedavg has no rule for factors of different sizes: expected server.strategy hetlora, "
         "flexlora or flora_stacking"),
        ({"clients": {"number": 2, "ranks": [1, 3]}}, "clients.ranks: expected at most adapter.rank, 2, got 3"),
        ({"clients": {"number": 3, "ranks": [1, 2]}},
         "clients.ranks: expected 3 numbers, one for each client, got 2"),
        ({"clients": {"number": 2, "ranks": [0, 2]}}, "clients.ranks: expected a number at least 1, got [0, 2]"),
        ({"clients": {"number": 2, "ranks": {"name": "drawn", "values": [1, 9]}}},
         "clients.ranks: expected at most adapter.rank, 2, got 9"),
        ({"clients": {"number": 2, "ranks": 3}}, "clients.ranks: expected a list or a mapping, got 3"),
        ({"clients": {"number": 2, "ranks": [1, 2]}, "server": {"strategy": "fedavg"}, "adapter": "linear_head"},
         "clients.ranks: expected adapter lora, got linear_head"),
        ({"clients": {"number": 2, "ranks": [1, 2]}, "local": {"correction": "feddyn"}},
         "local.correction: expected none or fedprox, because clients have ranks of their own"),
        ({"clients": {"number": 2, "ranks": [1, 2]}, "server": {"strategy": "hetlora", "aggregator": "median"}},
         "clients.ranks: expected server.aggregator mean and server.optimizer sgd with its defaults"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_one_line(raw_config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_experiment(parse_config({**raw_config, "server": {"strategy": "hetlora"}, **changes}))
    assert str(caught.value) == message


def test_ranks_from_a_config(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "server": {"strategy": "hetlora"}}
    config = parse_config({**raw, "clients": {"number": 4, "ranks": {"name": "drawn", "values": [1, 2]}}, "seed": 1})
    assert parse_config(config_to_dict(config), is_complete=True) == config
    result = simulate(config)
    header, *rows = (result.directory / "clients.csv").read_text().splitlines()
    place = header.split(",").index("rank")
    assert {row.split(",")[place] for row in rows} == {"1", "2"}
    listed = simulate(parse_config({**raw, "name": "listed", "clients": {"number": 4, "ranks": [2, 2, 2, 2]}}))
    plain = simulate(parse_config({**raw_config, "name": "plain"}))
    assert all(torch.equal(listed.adapter[name], plain.adapter[name]) for name in plain.adapter)


def test_screening_looks_at_what_a_client_did(tiny_model: str) -> None:
    """What a client of a lower rank lacks is no part of its update: at a small rate it would be most of it."""
    local = dataclasses.replace(LOCAL, learning_rate=1e-3)
    parts = variant(parts_of(tiny_model, FlexLora(), local), screening=Screening(max_norm_ratio=20.0))
    for result in rounds(parts, 2)[1]:
        assert not result.rejected_clients


def test_ranks_that_nobody_in_the_cohort_has_stay_alive(tiny_model: str) -> None:
    parts = variant(parts_of(tiny_model, HetLora()), ranks=np.array([1, 2, 1, 2, 1]))
    start = parts.engine.model.initial_adapter(Rng(1))
    state, _ = rounds(parts, 2)
    for layer in layers(start):
        rows, first = state.adapter[f"{layer}.lora_A"], start[f"{layer}.lora_A"]
        assert torch.equal(rows[2:], first[2:]) and not torch.equal(rows[:2], first[:2])
        assert rows[1].norm() < first[1].norm()  # three clients of five count as zeros there
