"""Rounds and runs whose server reads the sum of the clients' updates alone."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import LOCAL, SIZES, TOLERANCE, adapt, assert_states_close, federation, rounds, train, variant
from hypothesis import given, settings
from hypothesis import strategies as st

from flora.clip.adapters.lora import Lora
from flora.communication.network import DrawnNetwork
from flora.communication.sampling import Uniform
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.registry import OptionError, name_of, register
from flora.core.rng import Rng
from flora.core.states import ClientUpdate
from flora.federated.federation import Federation
from flora.federated.summing import sum_format
from flora.privacy.accounting import Attendance as Takes
from flora.privacy.fixed_point import FixedPoint, Ring, Words
from flora.privacy.mechanisms import Central, Local, Privacy, Tree
from flora.privacy.rounds import PrivateRounds
from flora.privacy.secure_sums import PairwiseMasks, SecureSum
from flora.privacy.traffic import Attendance, SumOutcome, Traffic
from flora.server.optimizers import ServerSgd
from flora.server.strategies.averaging import FedAvg
from flora.server.strategies.factors import FedSaLora, FfaLora, RoLora
from flora.simulate import main, resume, simulate


@register("in_the_clear")
@dataclass(frozen=True)
class InTheClear(SecureSum):
    """The same words, added up without masks: what a secure sum is compared with."""

    def smallest_sum(self, num_asked: int) -> int:
        return 2

    def add_up(self, inputs: Mapping[int, Words], attendance: Attendance, ring: Ring, rng: Rng) -> SumOutcome:
        total = np.zeros(ring.num_words, ring.dtype)
        summed = sorted(client for client, number in attendance.num_phases.items() if number >= 3)
        for client in summed:
            total = ring.reduced(total + inputs[client])
        return SumOutcome(total, tuple(summed), Traffic(), 1)

    def client_traffic(self, num_clients: int, payload_bytes: int) -> Traffic:
        return Traffic()


def parts_of(model: str, secure_sum: SecureSum | None, *, rank: int = 2, **changes: Any) -> Federation:
    return variant(federation(adapt(model, Lora(rank=rank)), LOCAL), secure_sum=secure_sum, **changes)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("bits", [16, 32, 61])
def test_a_round_is_the_plain_one_to_half_a_unit_a_client(tiny_model: str, bits: int, weighting: str) -> None:
    """|sum of rounding errors| <= K 2^-f / 2, divided by the sum of the weights."""
    strategy = FedAvg(weighting=weighting)
    options = PairwiseMasks(bits=bits, range=4.0)
    secure = parts_of(tiny_model, options, strategy=strategy)
    (start, found), (result,) = rounds(secure, 1)
    starts = dict.fromkeys(range(5), start.adapter)
    ends = train(secure, starts, round=1, rng=secure.rng.child("round", 1))
    deltas = [tree.subtract(ends[client].adapter, start.adapter) for client in range(5)]
    weights = [1.0] * 5 if weighting == "uniform" else [float(size) for size in SIZES]
    mean = tree.weighted_mean(deltas, weights)
    unit = sum_format(secure, options, 5, 1).numbers.unit
    assert 5 * max(weights) * 4.0 / unit < 2 ** (bits - 1) <= 2 * 6 * max(weights) * 4.0 / unit  # as fine as can be
    bound = 5 * unit / 2 / sum(weights)
    moved = tree.subtract(found.adapter, start.adapter)
    worst = max(float((moved[name] - mean[name]).abs().max()) for name in mean)
    assert worst <= bound + TOLERANCE and (bits != 16 or worst > bound / 100)
    assert result.saturated_fraction == 0 and result.aggregation_error is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampler": Uniform(number=3)},
        {"strategy": FfaLora()},
        {"strategy": FedSaLora()},
        {"strategy": RoLora()},
        {"optimizer": ServerSgd(learning_rate=0.5, momentum=0.9)},
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [24, 32])
def test_rounds_are_those_of_plain_fixed_point_sums_bit_for_bit(
    tiny_model: str, changes: dict[str, Any], bits: int
) -> None:
    options: dict[str, Any] = {"bits": bits, "dropout": (0.05, 0.05, 0.05, 0.0)}
    plain, _ = rounds(parts_of(tiny_model, InTheClear(**options), **changes), 3)
    found, _ = rounds(parts_of(tiny_model, PairwiseMasks(**options, threshold=0.51), **changes), 3)
    for one, other in zip(plain[1:], found[1:], strict=True):
        assert all(torch.equal(one.adapter[name], other.adapter[name]) for name in one.adapter)
        assert any((plain[0].adapter[name] != one.adapter[name]).any() for name in one.adapter)


def test_numbers_beyond_the_range_are_set_to_it(tiny_model: str) -> None:
    parts = parts_of(tiny_model, PairwiseMasks(range=1e-3, bits=48))
    (start, found), (result,) = rounds(parts, 1)
    assert result.saturated_fraction is not None and 0.1 < result.saturated_fraction < 1
    ends = train(parts, dict.fromkeys(range(5), start.adapter), round=1, rng=parts.rng.child("round", 1))
    clipped = [
        {name: tensor.clamp(-1e-3, 1e-3) for name, tensor in tree.subtract(ends[each].adapter, start.adapter).items()}
        for each in range(5)
    ]
    mean = tree.weighted_mean(clipped, [float(size) for size in SIZES])
    moved = tree.subtract(found.adapter, start.adapter)
    assert all(torch.allclose(moved[name], mean[name], atol=TOLERANCE, rtol=0) for name in mean)


def test_below_the_threshold_nothing_is_released(tiny_model: str) -> None:
    lines: list[str] = []
    parts = parts_of(tiny_model, PairwiseMasks(dropout=(0.0, 0.0, 1.0, 0.0)))
    parts = variant(parts, engine=dataclasses.replace(parts.engine, log=lines.append))
    parts = dataclasses.replace(parts, local=dataclasses.replace(LOCAL, optimizer_state="kept"))
    (start, found), (result,) = rounds(parts, 1)
    assert all(torch.equal(start.adapter[name], found.adapter[name]) for name in start.adapter)
    assert found.round == 1 and not found.clients
    text = "round 1: no sum: masked input: 0 of 5 clients left, 4 needed: the adapter stays as it was"
    assert [line for line in lines if "round 1" in line] == [text]
    assert (result.num_clients, result.num_dropped, result.num_failed_sums, result.sum_phases) == (0, 5, 1, 3)
    assert result.train_loss is None and result.cohort == ()


def test_a_client_that_is_gone_after_its_input_counts(tiny_model: str) -> None:
    """With a threshold of three, and two that are gone before the unmasking."""
    parts = parts_of(tiny_model, PairwiseMasks(threshold=0.6, dropout=(0, 0, 0, 0.3)))
    plain = parts_of(tiny_model, InTheClear())
    (_, one), (result,) = rounds(parts, 1)
    (_, other), _ = rounds(plain, 1)
    assert result.sum_bytes is not None and result.sum_bytes["unmasking up"] < 5 * 5 * 41
    assert result.num_clients == 5 and result.num_dropped == 0
    assert all(torch.equal(one.adapter[name], other.adapter[name]) for name in one.adapter)


def test_a_client_that_diverged_says_nothing(tiny_model: str) -> None:
    def broken(round: int, update: ClientUpdate) -> ClientUpdate:
        if update.client != 2:
            return update
        return dataclasses.replace(update, delta=tree.scale(update.delta, float("nan")))

    parts = parts_of(tiny_model, PairwiseMasks(), hooks=Hooks(update=broken))
    (_, found), (result,) = rounds(parts, 1)
    assert [each.client for each in result.rejected_clients] == [2] and tree.is_finite(found.adapter)
    assert result.sum_bytes is not None
    words = result.sum_bytes["input up"] // 4
    assert result.sum_bytes["input up"] == 4 * Ring(32, words // 4).payload_bytes
    assert result.num_dropped == 0 and result.cohort == (0, 1, 2, 3, 4)


def test_bytes_of_a_round_by_hand(tiny_model: str) -> None:
    parts = parts_of(tiny_model, PairwiseMasks())
    plain = parts_of(tiny_model, None)
    (start, _), (result,) = rounds(parts, 1)
    _, (before,) = rounds(plain, 1)
    numbers = tree.count(start.adapter) + 1
    up = {"keys": 5 * 64, "shares": 5 * 4 * 92, "input": 5 * 4 * numbers, "unmasking": 5 * 5 * 41}
    down = {"keys": 5 * 4 * 68, "shares": 5 * 4 * 92, "input": 5 * 4 * 4, "unmasking": 0}
    assert result.uplink_bytes == sum(up.values())
    assert result.downlink_bytes == before.downlink_bytes + sum(down.values())
    assert result.sum_bytes == {f"{phase} {way}": of[phase] for phase in up for way, of in (("up", up), ("down", down))}
    assert (result.sum_phases, result.sum_messages) == (4, 35)
    assert (before.sum_phases, before.sum_messages, before.sum_bytes) == (None, 0, None)


def test_clients_of_a_network_drop_out_or_are_late(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "rounds": 6, "partition": "iid",
           "clients": {"number": 8, "cohort": {"name": "uniform", "number": 6}},
           "network": {"name": "drawn", "spread": 1.0, "dropout": 0.15, "step_seconds": 1.0, "latency_seconds": 0.5},
           "server": {"stragglers": {"over_selection": 1.3},
                      "secure_sum": {"name": "pairwise_masks", "threshold": 0.51}}}  # fmt: skip
    result = simulate(parse_config(raw))
    assert result.summary.num_late > 0 and result.summary.num_dropped > 0
    assert any(record.num_clients for record in result.records[1:])
    for record in result.records[1:]:
        assert record.uplink_bytes == sum(n for key, n in record.sum_bytes.items() if key.endswith("up"))
        if record.num_failed_sums:
            continue
        words = 4 * (sum(tensor.numel() for tensor in result.adapter.values()) + 1)
        assert record.sum_bytes["input up"] == words * (record.num_clients + record.num_late)
        asked = record.num_clients + record.num_late + record.num_dropped
        assert 64 * (record.num_clients + record.num_late) <= record.sum_bytes["keys up"] <= 64 * asked
    plain = simulate(parse_config({**raw, "name": "plain", "server": {"stragglers": {"over_selection": 1.3}}}))
    # Four trips there and back in place of one: three more, of half a second each way.
    assert result.records[1].simulated_seconds > plain.records[1].simulated_seconds + 3 * 2 * 0.5


def test_bytes_of_the_protocol_take_time_on_the_network(raw_config: dict[str, Any]) -> None:
    """Four clients alike: 4 latencies there and back, and each client's bytes at its rates."""
    network = {"name": "drawn", "spread": 0.0, "download_mbps": 1.0, "upload_mbps": 0.5, "step_seconds": 0.0,
               "latency_seconds": 0.25}  # fmt: skip
    raw = {**raw_config, "rounds": 1, "network": network, "server": {"secure_sum": "pairwise_masks"}}
    record = simulate(parse_config(raw)).records[1]
    seconds = 8 * 0.25 + record.downlink_bytes / 4 * 8e-6 / 1.0 + record.uplink_bytes / 4 * 8e-6 / 0.5
    assert record.simulated_seconds == pytest.approx(seconds)


SECURE = {
    "rounds": 4,
    "clients": {"number": 7, "cohort": {"name": "uniform", "number": 5}, "per_block": 2},
    "local": {"learning_rate": 0.05, "batch_size": 4, "optimizer_state": "kept"},
    "server": {
        "secure_sum": {"name": "pairwise_masks", "threshold": 0.51, "dropout": [0.1, 0.1, 0.2, 0.1], "bits": 27}
    },
}


def test_a_run_goes_on_exactly(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, **SECURE}
    whole = simulate(parse_config({**raw, "name": "whole"}))
    first = simulate(parse_config({**raw, "name": "parts", "rounds": 2}))
    rest = resume(first.directory, ["rounds=4"])
    assert all(torch.equal(whole.adapter[name], rest.adapter[name]) for name in whole.adapter)
    for one, other in zip(whole.records, rest.records, strict=True):
        assert (one.sum_bytes, one.num_failed_sums, one.cohort) == (
            other.sum_bytes,
            other.num_failed_sums,
            other.cohort,
        )
    assert whole.summary.num_failed_sums == sum(record.num_failed_sums for record in whole.records)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": {"aggregator": "median"}}, "server.aggregator median compares single ones"),
        ({"server": {"aggregator": "bounded_mean"}}, "server.aggregator bounded_mean compares single ones"),
        ({"server": {"strategy": "flexlora"}}, "server.strategy flexlora needs what each client ended with"),
        ({"server": {"strategy": "fedex_lora"}}, "server.strategy fedex_lora needs what each client ended with"),
        ({"server": {"screening": {"max_norm_ratio": 3}}}, "server.screening.max_norm_ratio compares their norms"),
        (
            {"local": {"correction": "scaffold", "optimizer": "sgd"}},
            "local.correction scaffold sends more than a delta, or remembers each one",
        ),
        ({"clients": {"centralized": True}}, "clients.centralized leaves one client: its sum would be its update"),
        ({"clients": {"ranks": [1, 2, 2, 1]}, "server": {"strategy": "hetlora"}}, "with clients.ranks each has other"),
        ({"communication": {"upload": "uniform"}}, "communication.upload writes other numbers than words"),
        ({"server": {"schedule": "buffered"}, "network": "preset"}, "a buffered schedule has none"),
    ],
)  # fmt: skip
def test_what_needs_single_updates_is_refused(
    raw_config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    raw = {**raw_config, **changes, "server": {**changes.get("server", {}), "secure_sum": "pairwise_masks"}}
    with pytest.raises(OptionError) as caught:
        check_experiment(parse_config(raw))
    assert str(caught.value).startswith("server.secure_sum: expected none") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["server.secure_sum=masks"], "server.secure_sum.name: 'masks' is not known; expected one of pairwise_masks"),
        (["server.secure_sum=pairwise_masks", "server.secure_sum.threshold=0.4"],
         "server.secure_sum.threshold: expected a number above 0.5 and at most 1, got 0.4"),
        (["server.secure_sum=pairwise_masks", "server.secure_sum.neighbours=5"],
         "server.secure_sum.neighbours: expected an even number, got 5"),
        (["server.secure_sum=pairwise_masks", "clients.cohort.number=1"],
         "clients.cohort: expected at least 2 clients in a round: a secure sum of one is no secret"),
        (["server.secure_sum=pairwise_masks", "server.secure_sum.bits=8"],
         "server.secure_sum.bits: 8 bits can't hold 4 clients' weights of up to"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line_are_one_line(
    raw_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    path = tmp_path / "mine.yaml"
    raw = {**raw_config, "data": {"name": "patterns", "num_train": 400}, "partition": "iid"}
    path.write_text(yaml.safe_dump({**raw, "clients": {"number": 4, "cohort": {"name": "uniform", "number": 4}}}))
    assert main([str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert not list((tmp_path / "runs").glob("*/rounds.jsonl"))


def test_without_cryptography_one_line_names_the_extra(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cryptography" else real(name))
    config = parse_config({**raw_config, "server": {"secure_sum": "pairwise_masks"}})
    check_experiment(config)  # which needs no library
    with pytest.raises(UserError) as caught:
        simulate(config)
    message = "cryptography is not installed; pip install 'flora-clip[privacy]'"
    assert str(caught.value) == f"server.secure_sum: pairwise_masks: {message}"
    assert not list(Path(raw_config["output"]).iterdir())


def test_a_network_of_which_nobody_can_be_asked(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "network": {"name": "drawn", "availability": 1e-9}}
    result = simulate(parse_config({**raw, "server": {"secure_sum": "pairwise_masks"}}))
    log = (result.directory / "log.txt").read_text()
    assert log.count("nobody delivered (0 asked, 0 dropped out, 0 too late): the adapter stays") == 2
    assert result.summary.num_failed_sums == 0 and DrawnNetwork().latency_seconds > 0


# --- with differential privacy: bound, fixed point, secure sum, noise


def private(mechanism: Privacy) -> PrivateRounds:
    return PrivateRounds.of(mechanism, Takes(), 3)


@pytest.mark.parametrize(
    "mechanism",
    [
        Central(clip_norm=0.05, noise_multiplier=0.5),
        Tree(clip_norm=0.05, noise_multiplier=0.5),
        Local(clip_norm=0.05, noise_multiplier=0.5),
    ],
    ids=name_of,
)
def test_private_rounds_are_those_without_a_secure_sum_to_a_unit_a_client(tiny_model: str, mechanism: Privacy) -> None:
    options = PairwiseMasks(bits=60, range=4.0)
    secure = parts_of(tiny_model, options, privacy=private(mechanism))
    plain = parts_of(tiny_model, None, privacy=private(mechanism))
    found, results = rounds(secure, 3)
    expected, others = rounds(plain, 3)
    assert sum_format(secure, options, 5, 1).numbers.unit < 1e-12
    for one, other in zip(found, expected, strict=True):
        assert_states_close(one.adapter, other.adapter)
        assert_states_close(one.privacy, other.privacy)
    for result, without in zip(results, others, strict=True):
        assert (result.epsilon, result.sum_epsilon, result.clip_norm) == (
            without.epsilon,
            without.sum_epsilon,
            without.clip_norm,
        )
        assert result.clipped_fraction is None and result.aggregation_error is None and result.sum_phases == 4


@given(seed=st.integers(0, 1000), bits=st.sampled_from([12, 16, 32]))
@settings(max_examples=20, deadline=None)
def test_rounding_toward_zero_makes_no_norm_larger(seed: int, bits: int) -> None:
    """So that what one client adds to the sum is within the bound that the noise is for."""
    numbers = np.random.default_rng(seed).normal(0, 1, 100)
    numbers *= 0.05 / np.linalg.norm(numbers)
    codec = FixedPoint.for_sum(bits, 0.05, 10)
    toward_zero = dataclasses.replace(codec, rounding=np.trunc)
    written = toward_zero.decode(toward_zero.encode(numbers))
    assert (np.abs(written) <= np.abs(numbers)).all() and np.abs(written - numbers).max() < codec.unit


def test_with_privacy_clients_send_numbers_rounded_toward_zero(tiny_model: str) -> None:
    options = PairwiseMasks(bits=16, range=1.0)
    parts = parts_of(tiny_model, options, privacy=private(Central(clip_norm=0.05, noise_multiplier=0.5)))
    assert sum_format(parts, options, 5, 1).numbers.rounding is np.trunc
    assert sum_format(parts, options, 5, 1).numbers.limit == 0.05
    local = parts_of(tiny_model, options, privacy=private(Local(clip_norm=0.05, noise_multiplier=0.5)))
    assert sum_format(local, options, 5, 1).numbers.limit == 1.0


def test_without_a_sum_a_private_round_steps_along_noise_alone(tiny_model: str) -> None:
    mechanism = private(Central(clip_norm=0.05, noise_multiplier=0.5))
    secure = parts_of(tiny_model, PairwiseMasks(dropout=(1.0, 0, 0, 0)), privacy=mechanism)
    (start, found), (result,) = rounds(secure, 1)
    like = tree.select(start.adapter, secure.roles.sent(start.adapter, 1))
    noise = mechanism.mechanism.on_sum(like, 0.5 * 0.05, 1, lambda number: secure.rng.child("round", number, "privacy"))
    assert result.num_failed_sums == 1 and result.epsilon == mechanism.epsilon(1)
    assert_states_close(tree.subtract(found.adapter, start.adapter), tree.scale(noise, 1 / 5))


def test_a_bound_that_adapts_is_refused(raw_config: dict[str, Any]) -> None:
    privacy = {"name": "central", "clip_norm": {"name": "adaptive"}, "noise_multiplier": 1.0}
    with pytest.raises(OptionError, match=r"privacy\.clip_norm: expected a number with server\.secure_sum"):
        check_experiment(parse_config({**raw_config, "privacy": privacy, "server": {"secure_sum": "pairwise_masks"}}))
