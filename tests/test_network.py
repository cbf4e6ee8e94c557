"""A simulated network: who can be asked, who delivers in time, and how long that takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flora.communication.network import (
    PRESETS,
    ClientLoad,
    CohortOutcome,
    CsvNetwork,
    DrawnNetwork,
    Network,
    Preset,
    Profiles,
    StragglerPolicy,
    cohort_outcome,
    durations,
)
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core.errors import UserError
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.evaluation.summary import duration
from flora.simulate import resume, simulate

ALL = [*(Preset(kind=kind) for kind in PRESETS), DrawnNetwork()]


def profiles(**columns: list[float]) -> Profiles:
    """Four clients of 8 megabits a second and nothing that delays or loses them, but for what is given."""
    usual = {"download_mbps": 8.0, "upload_mbps": 8.0, "latency_seconds": 0.0, "compute_speed": 1.0,
             "availability": 1.0, "dropout": 0.0, "time_zone_hours": 0.0}  # fmt: skip
    return Profiles(**{name: np.array(columns.get(name, [value] * 4)) for name, value in usual.items()})


def ids(found: CohortOutcome) -> tuple[list[int], list[int], list[int]]:
    """Who delivers in time, who too late, who is lost."""
    return found.clients.tolist(), found.late.tolist(), found.dropped.tolist()


def sent(network: Network, own: Profiles, stragglers: StragglerPolicy, **changes: Any) -> CohortOutcome:
    """Four clients, of 1, 2, 3 and 4 steps of a second, a megabyte down and two up: 4, 5, 6 and 7 seconds."""
    asked = np.arange(4)
    values: dict[str, Any] = {"takes": durations(network, own, asked, LOAD), "num_needed": 4, "rng": Rng(0)}
    return cohort_outcome(stragglers, asked, dropout=own.dropout, **{**values, **changes})


SECOND = Preset(step_seconds=1.0)
LOAD = ClientLoad(lambda client: client + 1, lambda client: 10**6, lambda client: 2 * 10**6)


def test_durations_by_hand() -> None:
    own = profiles(latency_seconds=[0.0, 0.5, 0.0, 0.0], compute_speed=[1.0, 1.0, 2.0, 1.0], upload_mbps=[8, 8, 8, 16])
    found = durations(SECOND, own, np.arange(4), LOAD)
    assert found.tolist() == pytest.approx([1 + 1 + 2, 1 + 1 + 2 + 2, 1 + 1.5 + 2, 1 + 4 + 1])


def test_the_server_waits_for_all_without_a_deadline() -> None:
    found = sent(SECOND, profiles(), StragglerPolicy())
    assert (found.clients.tolist(), found.late.tolist(), found.dropped.tolist(), found.seconds) == (
        [0, 1, 2, 3],
        [],
        [],
        7,
    )


def test_a_deadline_leaves_stragglers_behind() -> None:
    found = sent(SECOND, profiles(), StragglerPolicy(deadline_seconds=5.5))
    assert (found.clients.tolist(), found.late.tolist(), found.seconds) == ([0, 1], [2, 3], 5.5)
    found = sent(SECOND, profiles(), StragglerPolicy(deadline_seconds=1.0))
    assert (found.clients.tolist(), found.late.tolist(), found.seconds) == ([], [0, 1, 2, 3], 1.0)


def test_the_first_count_where_more_are_asked_than_needed() -> None:
    found = sent(SECOND, profiles(), StragglerPolicy(over_selection=2.0), num_needed=2)
    assert (found.clients.tolist(), found.late.tolist(), found.seconds) == ([0, 1], [2, 3], 5.0)


def test_who_drops_out_delivers_nothing() -> None:
    found = sent(SECOND, profiles(dropout=[0.0, 1.0, 0.0, 1.0]), StragglerPolicy())
    assert (found.clients.tolist(), found.late.tolist(), found.dropped.tolist(), found.seconds) == (
        [0, 2],
        [],
        [1, 3],
        6,
    )
    nobody = sent(SECOND, profiles(dropout=[1.0] * 4), StragglerPolicy())
    assert (nobody.clients.tolist(), sorted(nobody.dropped), nobody.seconds) == ([], [0, 1, 2, 3], 7)
    assert sorted(nobody.asked) == [0, 1, 2, 3]


def test_the_day_curve_and_time_zones() -> None:
    curve = tuple(1.0 if hour < 12 else 0.0 for hour in range(24))
    network, own = Preset(day_curve=curve), profiles(time_zone_hours=[0.0, 6.0, 13.0, -1.0])
    for hour, expected in ((0.5, [0, 1]), (7, [0, 3]), (12.5, [2, 3]), (24.5, [0, 1]), (23.5, [1])):
        assert network.available(own, hour * 3600, Rng(0)).tolist() == expected
    assert len(network.available(profiles(availability=[0.0] * 4), 0, Rng(0))) == 0
    chances = [len(Preset().available(profiles(availability=[0.25] * 4), 0, Rng(0).child(draw))) for draw in range(500)]
    assert np.mean(chances) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("network", ALL, ids=str)
def test_profiles_are_sensible(network: Network) -> None:
    own = network.profiles(50, Rng(0))
    for name, column in dataclasses.asdict(own).items():
        assert column.shape == (50,) and np.isfinite(column).all(), name
        assert (column > 0).all() or name in ("dropout", "time_zone_hours")
    again = network.profiles(50, Rng(0))
    assert np.array_equal(own.upload_mbps, again.upload_mbps)


def test_drawn_rates_are_log_normal() -> None:
    rates = DrawnNetwork(upload_mbps=5.0, spread=0.8).profiles(4000, Rng(0)).upload_mbps
    assert np.median(rates) == pytest.approx(5.0, rel=0.05)
    assert np.log(rates).std() == pytest.approx(0.8, rel=0.05)
    assert np.unique(DrawnNetwork(spread=0.0).profiles(9, Rng(0)).upload_mbps).tolist() == [20.0]


def test_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "clients.csv"
    path.write_text("upload_mbps,dropout\n1.5,0\n2,0.5\n")
    own = CsvNetwork(path=str(path)).profiles(2, Rng(0))
    assert (own.upload_mbps.tolist(), own.dropout.tolist(), own.download_mbps.tolist()) == (
        [1.5, 2],
        [0, 0.5],
        [100, 100],
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("upload\n1\n1\n", "expected columns of client, download_mbps, upload_mbps, latency_seconds, compute_speed, "
                           "availability, dropout, time_zone_hours, each once, got 'upload'"),
        ("dropout,dropout\n0,0\n0,0\n", "each once, got 'dropout'"),
        ("", "got none"),
        ("upload_mbps\n1\n", "expected 2 rows, one a client, got 1"),
        ("upload_mbps\n1\n0\n", "line 3: upload_mbps: expected a number from 1e-06 to 1e+06, got '0'"),
        ("upload_mbps\n\nfast\n1\n", "line 3: upload_mbps: expected a number from 1e-06 to 1e+06, got 'fast'"),
        ("upload_mbps\n1,5\n2\n", "line 2: more cells than the head has"),
        ("dropout\n0\n1.5\n", "line 3: dropout: expected a number from 0 to 1, got '1.5'"),
        ("dropout,availability\n0,1\n0\n", "line 3: fewer cells than the head has"),
        ("latency_seconds\n0\ninf\n", "line 3: latency_seconds: expected a number from 0 to 1e+06, got 'inf'"),
        (None, "No such file or directory"),
        (b"\xff\xfe", "not a CSV file"),
    ],
)  # fmt: skip
def test_a_csv_file_that_is_wrong_is_one_line(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "clients.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        CsvNetwork(path=str(path)).profiles(2, Rng(0))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("network.path: ")


# Whole runs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clients": {"number": 4, "cohort": {"name": "uniform", "number": 2}}},
        {"clients": {"number": 4, "cohort": {"name": "by_size", "fraction": 0.5}}},
        {"server": {"strategy": "fedsa_lora"}, "personal": "none"},
        {"personal": "ditto"},
    ],
)
def test_with_everybody_there_the_run_is_as_without_bit_for_bit(
    raw_config: dict[str, Any], changes: dict[str, Any]
) -> None:
    raw = {**raw_config, "rounds": 3, **changes}
    without = simulate(parse_config({**raw, "name": "without"}))
    found = simulate(parse_config({**raw, "name": "with", "network": {"name": "drawn", "spread": 1.0}}))
    assert all(torch.equal(without.adapter[name], found.adapter[name]) for name in without.adapter)
    for one, other in zip(without.records, found.records, strict=True):
        assert (one.accuracy, one.uplink_bytes, one.downlink_bytes) == (
            other.accuracy, other.uplink_bytes, other.downlink_bytes)  # fmt: skip
    assert without.summary.simulated_seconds is None and without.records[1].simulated_seconds is None
    assert found.summary.simulated_seconds is not None and found.summary.simulated_seconds > 0


def test_the_clock_by_hand(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "network": {"name": "preset", "kind": "3g", "step_seconds": 2.0}}
    raw["network"] |= {"kind": "broadband"}
    result = simulate(parse_config(raw))
    clients = json.loads((result.directory / "partition.json").read_text())["clients"]
    steps = max(-(-client["num_train"] // 8) for client in clients)
    one = result.records[1]
    per_client = one.uplink_bytes / 4 * 8e-6
    assert one.simulated_seconds == pytest.approx(2 * 0.02 + per_client / 100 + 2.0 * steps + per_client / 20)
    assert result.summary.simulated_seconds == pytest.approx(2 * one.simulated_seconds)
    reached = result.summary.seconds_to_accuracy
    assert reached is not None and all(seconds > 0 for seconds in reached.values())
    assert "simulated time" in (result.directory / "log.txt").read_text()


def test_losses_are_counted_and_break_nothing(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "rounds": 8, "clients": {"number": 8},
           "network": {"name": "drawn", "spread": 1.0, "availability": 0.7, "dropout": 0.3, "step_seconds": 1.0},
           "server": {"stragglers": {"deadline_seconds": 4.0}}}  # fmt: skip
    result = simulate(parse_config({**raw, "name": "whole"}))
    assert result.summary.num_dropped > 0 and result.summary.num_late > 0
    for record in result.records[1:]:
        assert record.simulated_seconds is not None and record.simulated_seconds <= 600
        asked = record.num_clients + record.num_dropped + record.num_late
        assert asked <= 8
        assert record.cohort is not None and len(set(record.cohort)) == record.num_clients
        down, up = record.downlink_bytes, record.uplink_bytes
        assert down % max(asked, 1) == 0 and up * asked == down * (record.num_clients + record.num_late)
    first = simulate(parse_config({**raw, "name": "parts", "rounds": 3}))
    rest = resume(first.directory, ["rounds=8"])
    assert all(torch.equal(result.adapter[name], rest.adapter[name]) for name in result.adapter)
    assert rest.summary.simulated_seconds == result.summary.simulated_seconds


@pytest.mark.parametrize("lost", [{"dropout": 0.999999}, {"availability": 1e-9}])
def test_a_round_without_survivors_leaves_the_adapter_as_it_was(
    raw_config: dict[str, Any], lost: dict[str, float]
) -> None:
    raw = {**raw_config, "rounds": 4, "network": {"name": "drawn", **lost, "wait_seconds": 50.0}}
    result = simulate(parse_config(raw))
    assert result.summary.total_uplink_bytes == 0
    assert not any(tensor.any() for name, tensor in result.adapter.items() if name.endswith("lora_B"))
    log = (result.directory / "log.txt").read_text()
    asked = 4 if "dropout" in lost else 0
    assert log.count(f"nobody delivered ({asked} asked, {asked} dropped out, 0 too late): the adapter stays") == 4
    if "availability" in lost:
        assert [record.simulated_seconds for record in result.records[1:]] == [50.0] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": {"stragglers": {"deadline_seconds": 3}}},
         "server.stragglers: expected a network: without one all clients deliver at once"),
        ({"network": {"name": "preset", "kind": "5g"}},
         "network.kind: expected one of fibre, broadband, 4g, 3g, phones, got '5g'"),
        ({"network": {"name": "preset", "day_curve": [1.0]}},
         "network.day_curve: expected 24 numbers, one an hour, got 1"),
        ({"network": "csv"}, "network.path: missing: the CSV file, with a head"),
        ({"network": {"name": "drawn", "dropout": 1.0}},
         "network.dropout: expected a number at least 0 and below 1, got 1.0"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_one_line(raw_config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, OptionError)) as caught:
        check_experiment(parse_config({**raw_config, **changes}))
    assert str(caught.value) == message


def test_durations_as_words() -> None:
    assert [duration(seconds) for seconds in (0.25, 59, 90, 7200, 180_000)] == [
        "0.2 s", "59.0 s", "1.5 min", "2.0 h", "2.1 days"]  # fmt: skip


def test_a_run_goes_on_over_the_network_that_it_began_with(raw_config: dict[str, Any], tmp_path: Path) -> None:
    path, moved = tmp_path / "clients.csv", tmp_path / "moved.csv"
    path.write_text("upload_mbps\n" + "1\n" * 4)
    moved.write_text(path.read_text())
    raw = {**raw_config, "network": {"name": "csv", "path": str(path)}}
    run = simulate(parse_config(raw)).directory
    path.write_text("upload_mbps\n" + "1\n" * 3 + "2\n")
    with pytest.raises(UserError, match="the network is not what this run began with"):
        resume(run, ["rounds=3"])
    assert resume(run, ["rounds=3", f"network.path={moved}"]).summary.rounds == 3


def test_the_cohorts_share_is_of_all_clients(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "clients": {"number": 12, "cohort": {"name": "uniform", "fraction": 0.25}}, "rounds": 8,
           "partition": "iid", "network": {"name": "drawn", "availability": 0.4}}  # fmt: skip
    found = [record.num_clients for record in simulate(parse_config(raw)).records[1:]]
    assert set(found) <= {0, 1, 2, 3} and found.count(3) >= 4
