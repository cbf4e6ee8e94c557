"""Asynchronous rounds: which updates arrive when, how old they are, and what the server makes of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LOCAL, SIZES, TOLERANCE, adapt, federation, rounds, train, variant

from flora.clip.adapters.lora import Lora
from flora.communication.network import Preset, Profiles
from flora.communication.sampling import Uniform
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.states import ClientUpdate
from flora.federated.buffered import Buffered
from flora.federated.federation import Federation
from flora.federated.synchronous import Synchronous
from flora.server.strategies.averaging import FedAvg
from flora.simulate import resume, simulate

SMALL = dataclasses.replace(LOCAL, learning_rate=0.02, epochs=1)


def parts_of(
    model: str, buffer: int, *, at_work: int | None = None, speeds: list[float] | None = None,
    dropout: list[float] | None = None, weighting: str = "uniform", per_block: int = 1, steps: int = 2,
) -> Federation:  # fmt: skip
    """Five clients, each of two steps of a second on a machine of speed 1; bytes and latency take no time."""
    adapted = adapt(model, Lora(rank=2))
    local = dataclasses.replace(SMALL, steps=steps)
    return variant(
        federation(adapted, local, per_block=per_block),
        strategy=FedAvg(weighting=weighting),
        schedule=Buffered(buffer=buffer),
        sampler=Uniform(number=at_work),
        network=Preset(step_seconds=1.0),
        profiles=Profiles(
            download_mbps=np.full(5, 1e12),
            upload_mbps=np.full(5, 1e12),
            latency_seconds=np.zeros(5),
            compute_speed=np.array(speeds or [1.0] * 5),
            availability=np.ones(5),
            dropout=np.array(dropout or [0.0] * 5),
            time_zone_hours=np.zeros(5),
        ),
    )


def test_a_buffer_of_all_clients_is_fedavg_bit_for_bit(tiny_model: str) -> None:
    parts = parts_of(tiny_model, 5, speeds=[1.0, 0.5, 2.0, 0.1, 1.0], weighting="examples")
    found, results = rounds(parts, 3)
    plain, others = rounds(variant(parts, schedule=Synchronous()), 3)
    for one, other in zip(found, plain, strict=True):
        assert all(torch.equal(one.adapter[name], other.adapter[name]) for name in one.adapter)
    for result, other in zip(results, others, strict=True):
        assert result.mean_staleness == 0 and result.simulated_seconds == other.simulated_seconds
        assert (result.uplink_bytes, result.downlink_bytes) == (other.uplink_bytes, other.downlink_bytes)


def test_who_arrives_when_by_hand(tiny_model: str) -> None:
    """All five are at work; client 0 takes 1 s, the others 2, 2.5, 20 and 40."""
    order: list[tuple[int, int]] = []

    def watch(round: int, update: ClientUpdate) -> ClientUpdate:
        order.append((round, update.client))
        return update

    speeds = [2.0, 1.0, 0.8, 0.1, 0.05]
    parts = variant(parts_of(tiny_model, 2, speeds=speeds), hooks=Hooks(update=watch))
    states, results = rounds(parts, 4)
    # Whoever has delivered is asked again when the server has stepped, since no one else is free before.
    # Round 1: 0 and 1 at 1 and 2 s. Round 2, from 2 s: 2 at 2.5, 0 again at 3; round 3, from 3 s: 1 (asked at 2) at 4,
    # 0 (asked at 3) at 4. Round 4, from 4 s: 0 at 5, 2 (asked at 3) at 5.5.
    assert order == [(1, 0), (1, 1), (2, 0), (2, 2), (3, 0), (3, 1), (4, 0), (4, 2)]
    assert [result.simulated_seconds for result in results] == pytest.approx([2.0, 1.0, 1.0, 1.5])
    assert [result.mean_staleness for result in results] == [0.0, 0.5, 0.5, 0.5]
    assert states[-1].clock == pytest.approx(5.5)
    on_their_way = {client for client, each in states[-1].clients.items() if each.in_flight and each.in_flight.update}
    assert on_their_way == {1, 3, 4}


def test_an_old_update_counts_less_and_began_where_it_was_asked(tiny_model: str) -> None:
    parts = parts_of(tiny_model, 2, speeds=[2.0, 1.0, 0.8, 0.1, 0.05])
    states, _ = rounds(parts, 2)
    # Round 2 has client 2's update of round 1, a round old, and client 0's of round 2.
    ends = {}
    for client, round in ((2, 1), (0, 2)):
        start = states[round - 1].adapter
        rng = parts.rng.child("round", round)
        result = train(parts, {client: start}, round=round, rng=rng)[client]
        ends[client] = tree.subtract(result.adapter, start)
    mean = tree.weighted_mean([ends[0], tree.scale(ends[2], 2**-0.5)], [1, 1])
    expected = tree.add(states[1].adapter, mean)
    for name, tensor in states[2].adapter.items():
        torch.testing.assert_close(tensor, expected[name], atol=TOLERANCE, rtol=0)


def test_who_drops_out_is_replaced(tiny_model: str) -> None:
    parts = parts_of(tiny_model, 2, at_work=2, dropout=[1.0, 0.0, 0.0, 0.0, 0.0])
    _, results = rounds(parts, 6)
    assert sum(result.num_dropped for result in results) > 0
    assert all(result.num_clients == 2 for result in results)
    assert all(result.simulated_seconds is not None and result.simulated_seconds > 0 for result in results)


def test_one_who_drops_out_holds_nobody_up(tiny_model: str) -> None:
    """It may be asked again at once, so that a buffer of all clients fills up."""
    _, results = rounds(parts_of(tiny_model, 5, dropout=[0.5, 0.0, 0.0, 0.0, 0.0]), 6)
    assert sum(result.num_dropped for result in results) > 0
    for result in results:
        assert result.num_clients == 5
        assert result.simulated_seconds == pytest.approx(2.0 * (1 + result.num_dropped))
        asked = 5 + result.num_dropped
        assert result.downlink_bytes * 5 == result.uplink_bytes * asked


def test_a_server_that_nobody_answers_goes_on(tiny_model: str) -> None:
    parts = parts_of(tiny_model, 2, dropout=[1.0] * 5)
    parts = variant(parts, network=Preset(step_seconds=1.0, day_curve=(1.0, *[0.0] * 23)))
    states, results = rounds(parts, 1)
    assert results[0].num_clients == 0 and results[0].num_dropped >= 5 and results[0].train_loss is None
    assert all(torch.equal(states[0].adapter[name], states[1].adapter[name]) for name in states[0].adapter)


def test_a_buffer_that_hardly_ever_fills_ends_in_one_line(tiny_model: str) -> None:
    parts = parts_of(tiny_model, 2, dropout=[0.0, *[1.0] * 4])
    with pytest.raises(UserError) as caught:
        rounds(parts, 1)
    assert str(caught.value) == (
        "round 1: 10,000 clients in a row dropped out, and the buffer has 1 of 2 updates: lower server.schedule.buffer "
        "or network.dropout"
    )


def test_a_buffer_larger_than_the_clients_that_can_deliver_is_refused(
    raw_config: dict[str, Any], tmp_path: Path
) -> None:
    profiles = tmp_path / "profiles.csv"
    profiles.write_text("dropout,availability\n0,1\n1,1\n0.5,0\n0,0.1\n")
    raw = {**raw_buffered(raw_config), "clients": {"number": 4}, "network": {"name": "csv", "path": str(profiles)}}
    check_experiment(parse_config(raw))
    raw["server"] = {"schedule": {"name": "buffered", "buffer": 3}}
    with pytest.raises(UserError) as caught:
        check_experiment(parse_config(raw))
    assert str(caught.value) == (
        "server.schedule.buffer: expected at most 2, the clients that can ever deliver (the others have a "
        "network.dropout of 1 or an availability of 0), got 3"
    )


def test_an_update_that_is_left_out_is_not_waited_for_again(tiny_model: str) -> None:
    def spoil(round: int, update: ClientUpdate) -> ClientUpdate:
        broken = {name: tensor * float("nan") for name, tensor in update.delta.items()}
        return dataclasses.replace(update, delta=broken) if update.client == 2 else update

    parts = variant(parts_of(tiny_model, 2, speeds=[2.0, 1.0, 0.8, 0.1, 0.05]), hooks=Hooks(update=spoil))
    states, results = rounds(parts, 3)
    assert [[rejection.client for rejection in result.rejected_clients] for result in results] == [[], [2], []]
    clock = states[2].clock
    assert all(each.in_flight.arrival_seconds >= clock for each in states[2].clients.values() if each.in_flight)


def test_clients_per_block_change_nothing(tiny_model: str) -> None:
    found = [
        rounds(parts_of(tiny_model, 2, speeds=[2.0, 1.0, 0.8, 0.1, 0.05], per_block=number), 3)[0][-1]
        for number in (1, 5)
    ]
    for name, tensor in found[0].adapter.items():
        torch.testing.assert_close(tensor, found[1].adapter[name], atol=TOLERANCE, rtol=0)
    assert len(SIZES) == 5


def raw_buffered(raw_config: dict[str, Any]) -> dict[str, Any]:
    return {
        **raw_config,
        "rounds": 6,
        "clients": {"number": 8, "cohort": {"name": "uniform", "number": 5}},
        "network": {"name": "drawn", "spread": 1.0, "step_seconds": 1.0, "dropout": 0.2, "availability": 0.8},
        "server": {
            "strategy": {"name": "fedavg", "weighting": "uniform"},
            "schedule": {"name": "buffered", "buffer": 2},
        },
        "communication": {"upload": {"name": "top_k", "fraction": 0.3}},
    }


def test_a_run_goes_on_with_what_is_on_its_way(raw_config: dict[str, Any]) -> None:
    raw = raw_buffered(raw_config)
    whole = simulate(parse_config({**raw, "name": "whole"}))
    assert any(record.mean_staleness for record in whole.records)
    first = simulate(parse_config({**raw, "name": "parts", "rounds": 3}))
    rest = resume(first.directory, ["rounds=6"])
    assert "warning" not in (rest.directory / "log.txt").read_text()
    assert all(torch.equal(whole.adapter[name], rest.adapter[name]) for name in whole.adapter)
    keep = ("simulated_seconds", "mean_staleness", "uplink_bytes", "downlink_bytes", "num_dropped", "accuracy")
    for one, other in zip(whole.records, rest.records, strict=True):
        assert [getattr(one, name) for name in keep] == [getattr(other, name) for name in keep]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": None}, "network: missing: a buffered schedule needs to know who is how fast"),
        ({"server": {"schedule": "buffered", "stragglers": {"over_selection": 2}}},
         "server.stragglers: expected the defaults: a buffered schedule waits for its buffer alone"),
        ({"local": {"optimizer_state": "kept"}},
         "server.schedule: buffered can't be used where clients remember what belongs to their last update: expected "
         "no error feedback, local.optimizer_state fresh, local.correction none or fedprox"),
        ({"server": {"schedule": {"name": "buffered", "buffer": 9}}},
         "server.schedule.buffer: expected at most 8, the clients there are, got 9"),
        ({"personal": "ditto"}, "server.schedule: buffered can't be used with adapters of the clients' own"),
        ({"server": {"schedule": "buffered", "strategy": "rolora"}},
         "server.schedule: expected synchronous, because rolora trains other tensors from round to round than an "
         "update of an earlier round has"),
        ({"server": {"schedule": "buffered", "strategy": "flora_stacking"}},
         "server.schedule: expected synchronous, because flora_stacking gives A and B another basis each round"),
        ({"server": {"schedule": "buffered", "strategy": "lora_fair"}},
         "server.schedule: expected synchronous, because lora_fair needs the products B A of clients that began from "
         "the same adapter"),
        ({"server": {"schedule": "buffered", "strategy": "plora"}},
         "server.schedule: buffered can't be used with adapters of the clients' own"),
        ({"server": {"strategy": "fedbuff"}},
         "server.strategy.name: 'fedbuff' is not known; it is a schedule now: server.schedule={name: buffered, "
         "buffer: 10}, with strategy.weighting=uniform"),
        ({"server": {"schedule": {"name": "buffered", "buffer": 0}}},
         "server.schedule.buffer: expected a number at least 1, got 0"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_one_line(raw_config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_experiment(parse_config({**raw_buffered(raw_config), **changes}))
    assert str(caught.value) == message
