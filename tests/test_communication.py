"""Quantised broadcast, compressed uploads, error feedback and dynamic sampling, in rounds and in whole runs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LOCAL, SIZES, TOLERANCE, adapt, assert_states_close, federation, fp64, rounds, train, variant

from flora.client.corrections import Scaffold
from flora.clip.adapters.lora import Lora
from flora.communication.compressors import (
    Compressor,
    NoCompression,
    NormalFloat,
    RandomMask,
    TopComponents,
    TopK,
    UniformQuantizer,
)
from flora.communication.options import CommunicationOptions, payload_bytes
from flora.communication.sampling import Dynamic, Uniform
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.errors import UserError
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.tree import State
from flora.evaluation.accuracy import evaluate
from flora.evaluation.local_only import own_adapters
from flora.federated.federation import Federation
from flora.server.strategies.averaging import FedAvg
from flora.server.strategies.base import Strategy
from flora.server.strategies.factors import FedSaLora, FfaLora
from flora.server.strategies.products import FlexLora
from flora.server.strategies.residuals import FedExLora
from flora.simulate import resume, simulate

SMALL = dataclasses.replace(LOCAL, learning_rate=0.02)


def parts_of(
    model: str, *, strategy: Strategy | None = None, per_block: int = 1, cohort: int | None = None, local: Any = SMALL,
    precision: str = "fp64", **options: Any,
) -> Federation:  # fmt: skip
    adapted = adapt(model, Lora(rank=2), precision=precision)
    parts = federation(adapted, local, per_block=per_block, cohort=cohort)
    return variant(parts, strategy=strategy or FedAvg(), communication=CommunicationOptions(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"broadcast": UniformQuantizer(bits=32)},
        {"broadcast": NormalFloat(bits=32), "upload": UniformQuantizer(bits=32, rounding="stochastic")},
        {"upload": TopK(fraction=1.0)},
        {"upload": TopK(fraction=1.0, scope="global"), "error_feedback": True},
        {"upload": TopComponents(fraction=1.0)},
        {"upload": RandomMask(fraction=1.0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("strategy", [FedAvg(), FfaLora(), FedSaLora()])
def test_what_loses_nothing_is_as_without_bit_for_bit(
    tiny_model: str, options: dict[str, Any], strategy: Strategy
) -> None:
    # In fp32, the numbers in which everything travels that is written by a compressor.
    plain, _ = rounds(parts_of(tiny_model, strategy=strategy, precision="fp32"), 3)
    found, _ = rounds(parts_of(tiny_model, strategy=strategy, precision="fp32", **options), 3)
    for one, other in zip(plain, found, strict=True):
        assert all(torch.equal(one.adapter[name], other.adapter[name]) for name in one.adapter)


def test_a_round_of_fedlpp_written_out(tiny_model: str) -> None:
    """Clients begin with q, send what they changed of it, and the server adds that to its own adapter."""
    quantizer = UniformQuantizer(bits=3, rounding="stochastic")
    parts = parts_of(tiny_model, broadcast=quantizer)
    states, results = rounds(parts, 2)
    for round in (1, 2):
        theta = states[round - 1].adapter
        payload = quantizer.encode(theta, parts.rng.child("round", round, "broadcast"))
        q = fp64(quantizer.decode(payload, theta))
        assert (q["text.0.q.lora_A"] - theta["text.0.q.lora_A"]).abs().max() > 1e-3
        deltas = {}
        rng = parts.rng.child("round", round)
        for client, result in train(parts, dict.fromkeys(range(5), q), round=round, rng=rng).items():
            deltas[client] = tree.subtract(result.adapter, q)
        mean = tree.weighted_mean([deltas[client] for client in range(5)], SIZES)
        assert_states_close(states[round].adapter, tree.add(theta, mean))
        assert results[round - 1].downlink_bytes == 5 * len(payload) < 5 * payload_bytes(theta) / 4
        assert results[round - 1].uplink_bytes == 5 * payload_bytes(theta)


@pytest.mark.parametrize("upload", [UniformQuantizer(bits=2), TopK(fraction=0.1), RandomMask(fraction=0.2)], ids=str)
@pytest.mark.parametrize("error_feedback", [False, True])
def test_uploads_written_out(tiny_model: str, upload: Compressor, error_feedback: bool) -> None:
    parts = parts_of(tiny_model, cohort=3, upload=upload, error_feedback=error_feedback)
    states, results = rounds(parts, 4)
    lost: dict[int, State] = {}
    for round in range(1, 5):
        theta = states[round - 1].adapter
        rng = parts.rng.child("round", round)
        cohort = parts.participation.sampler.sample(parts.participation.sizes, 3, rng.child("cohort"))
        read, num_bytes = {}, 0
        begin = dict.fromkeys(cohort.tolist(), theta)
        for client, result in train(parts, begin, round=round, rng=rng).items():
            delta = tree.subtract(result.adapter, theta)
            meant = tree.add(delta, lost[client]) if client in lost else delta
            payload = upload.encode(meant, rng.child("client", client, "upload"))
            read[client] = fp64(upload.decode(payload, meant))
            num_bytes += len(payload)
            if error_feedback:
                lost[client] = tree.subtract(meant, read[client])
        order = sorted(read)
        mean = tree.weighted_mean([read[client] for client in order], [SIZES[client] for client in order])
        assert_states_close(states[round].adapter, tree.add(theta, mean))
        assert results[round - 1].uplink_bytes == num_bytes
        kept = {client: carried.feedback for client, carried in states[round].clients.items() if carried.feedback}
        assert kept.keys() == lost.keys()
        for client, own in kept.items():
            assert_states_close(own, lost[client])


@pytest.mark.parametrize(
    "upload", [TopK(fraction=0.05), TopComponents(fraction=0.3), RandomMask(fraction=0.1), UniformQuantizer(bits=1)],
    ids=str,
)  # fmt: skip
def test_with_feedback_what_was_sent_comes_to_what_was_meant(tiny_model: str, upload: Compressor) -> None:
    """Over rounds of the same delta: what is still owed stays bounded, so the mean of what was sent comes near it."""
    parts = parts_of(tiny_model, upload=upload, error_feedback=True)
    start = parts.engine.model.initial_adapter(Rng(1))
    delta = {name: torch.randn(tensor.shape, generator=Rng(2).child(name).torch()) for name, tensor in start.items()}
    lost: State = {}
    sent, errors = tree.scale(delta, 0.0), []
    for round in range(1, 241):
        upload_read = parts.link.upload(delta, lost, {}, 0, Rng(3).child(round))
        read, lost = upload_read.delta, upload_read.feedback
        sent = tree.add(sent, read)
        errors.append(tree.norm(tree.subtract(tree.scale(sent, 1 / round), delta)) / tree.norm(delta))
        assert_states_close(tree.add(sent, lost), tree.scale(delta, float(round)), atol=1e-3 * round)
    assert errors[-1] < 0.15 and errors[-1] < 0.5 * errors[len(errors) // 4]


def test_clients_per_block_change_nothing(tiny_model: str) -> None:
    options = {"broadcast": NormalFloat(bits=4), "upload": RandomMask(fraction=0.3), "error_feedback": True}
    found = [rounds(parts_of(tiny_model, per_block=number, **options), 2)[0][-1].adapter for number in (1, 2, 5)]
    # A rounded number may fall to the other side: nearly all agree closely.
    for other in found[1:]:
        gap = (tree.flatten(found[0]) - tree.flatten(other)).abs()
        assert gap.median() < 1e-6 and gap.max() < 0.05


@pytest.mark.parametrize("strategy", [FlexLora(), FedExLora()])
def test_other_strategies_take_what_the_server_reads(tiny_model: str, strategy: Strategy) -> None:
    parts = parts_of(tiny_model, strategy=strategy, upload=TopK(fraction=0.5))
    states, results = rounds(parts, 2)
    assert all(tree.is_finite(state.adapter) for state in states)
    error = results[-1].aggregation_error
    assert error is not None and (error < TOLERANCE or isinstance(strategy, FlexLora))


def test_a_corrections_memory_travels_as_it_is(tiny_model: str) -> None:
    local = dataclasses.replace(SMALL, correction=Scaffold())
    plain = rounds(parts_of(tiny_model, local=local), 1)[1][0]
    masked = rounds(parts_of(tiny_model, local=local, upload=TopK(fraction=0.1)), 1)[1][0]
    assert 0.45 * plain.uplink_bytes < masked.uplink_bytes < 0.6 * plain.uplink_bytes
    quantised = rounds(parts_of(tiny_model, local=local, broadcast=UniformQuantizer(bits=2)), 1)[1][0]
    assert 0.45 * plain.downlink_bytes < quantised.downlink_bytes < 0.6 * plain.downlink_bytes


# Dynamic sampling


@pytest.mark.parametrize(("beta", "minimum"), [(0.0, 1), (0.1, 2), (0.5, 3), (5.0, 1)])
def test_the_cohort_shrinks_as_the_closed_form_says(beta: float, minimum: int) -> None:
    sampler = Dynamic(fraction=0.5, beta=beta, minimum=minimum)
    sizes = np.ones(40)
    found = [sampler.size_in(round, 40) for round in range(1, 31)]
    assert all(len(sampler.sample(sizes, number, Rng(0))) == number for number in found)
    expected = [max(round(20 * math.exp(-beta * t)), minimum) for t in range(30)]
    assert found == expected and found[0] == 20
    if beta:
        # The sum of a geometric series, and what rounding and the minimum add at most.
        total = 20 * (1 - math.exp(-30 * beta)) / (1 - math.exp(-beta))
        assert abs(sum(found) - total) <= 30 * max(0.5, minimum)


def test_no_decay_is_uniform_sampling(tiny_model: str) -> None:
    parts = parts_of(tiny_model, cohort=3)
    plain, _ = rounds(parts, 3)
    found, _ = rounds(variant(parts, sampler=Dynamic(number=3, beta=0.0)), 3)
    assert isinstance(parts.participation.sampler, Uniform)
    assert all(torch.equal(plain[-1].adapter[name], found[-1].adapter[name]) for name in plain[-1].adapter)


def test_the_minimum_is_no_more_than_the_first_cohort() -> None:
    assert Dynamic(number=3, minimum=10, beta=1.0).size_in(9, 20) == 3


# Whole runs


def test_a_run_says_what_clients_read(raw_config: dict[str, Any]) -> None:
    quantizer = {"name": "uniform", "bits": 2}
    raw = {**raw_config, "communication": {"broadcast": quantizer}, "rounds": 3}
    config = parse_config(raw)
    result = simulate(config)
    assert result.records[0].broadcast_accuracy is None
    for record in result.records[1:]:
        assert record.accuracy is not None and record.broadcast_accuracy is not None
        assert record.model_privacy_gap == record.accuracy - record.broadcast_accuracy
    assert result.summary.broadcast_accuracy == result.records[-1].broadcast_accuracy
    assert "last broadcast" in (result.directory / "log.txt").read_text()
    plain = simulate(parse_config({**raw_config, "name": "plain", "rounds": 3}))
    assert result.summary.total_downlink_bytes < plain.summary.total_downlink_bytes / 8
    assert plain.summary.broadcast_accuracy is None


def test_a_run_goes_on_with_its_feedback(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "rounds": 4, "communication": {
        "broadcast": {"name": "normal_float", "bits": 4, "rounding": "stochastic"},
        "upload": {"name": "top_k", "fraction": 0.1}, "error_feedback": True,
    }, "clients": {"number": 4, "cohort": {"name": "dynamic", "beta": 0.3}}}  # fmt: skip
    whole = simulate(parse_config({**raw, "name": "whole"}))
    parts = simulate(parse_config({**raw, "name": "parts", "rounds": 2}))
    rest = resume(parts.directory, ["rounds=4"])
    assert all(torch.equal(whole.adapter[name], rest.adapter[name]) for name in whole.adapter)
    assert [record.num_clients for record in whole.records] == [0, 4, 3, 2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"communication": {"broadcast": "top_k"}},
         "communication.broadcast: top_k would set weights to zero: expected none or a quantiser"),
        ({"communication": {"error_feedback": True}},
         "communication.error_feedback: expected an upload that loses something"),
        ({"communication": {"upload": "top_k", "error_feedback": True}, "server": {"strategy": "rolora"}},
         "communication.error_feedback: expected false, because what is lost of one round's factors is no part of "
         "the next one's"),
        ({"communication": {"upload": "top_k", "error_feedback": True}, "server": {"strategy": "flora_stacking"}},
         "communication.error_feedback: expected false, because what is lost of one round's factors is no part of "
         "the next one's"),
        ({"communication": {"upload": "top_k"}, "local": {"correction": "feddyn"}},
         "communication.upload: expected none, because feddyn reads the deltas themselves"),
        ({"communication": {"upload": "top_k"}, "server": {"strategy": "hetlora"},
          "clients": {"number": 2, "ranks": [1, 2]}},
         "clients.ranks: expected communication.broadcast and communication.upload to lose nothing"),
        ({"communication": {"broadcast": "uniform"}, "server": {"strategy": "fedex_lora"}},
         "communication.broadcast: expected none, because the strategy sends a residual"),
        ({"communication": {"upload": {"name": "uniform", "bits": 12}}},
         "communication.upload.bits: expected 1 to 8, or 32, got 12"),
        ({"communication": {"upload": {"name": "top_k", "fraction": 0}}},
         "communication.upload.fraction: expected a number above 0 and at most 1, got 0.0"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_one_line(raw_config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, OptionError)) as caught:
        check_experiment(parse_config({**raw_config, **changes}))
    assert str(caught.value) == message


def test_the_gap_is_that_of_the_adapter_that_is_sent_next(tiny_model: str) -> None:
    parts = parts_of(tiny_model, broadcast=UniformQuantizer(bits=2))
    state = rounds(parts, 2)[0][-1]
    broadcast, view = parts.broadcast(state)
    read = view.adapter
    assert isinstance(broadcast.payload, bytes)
    again = UniformQuantizer(bits=2).decode(broadcast.payload, state.adapter)
    assert all(torch.equal(read[name], again[name]) for name in again)
    found = evaluate(parts.engine.model, tree.expand(read, 1), parts.engine.features, batch_size=50)[0]
    assert 0 <= found.accuracy <= 1 and isinstance(NoCompression().is_identity, bool)


def test_own_adapters_are_what_clients_can_have(tiny_model: str) -> None:
    """With a factor that stays, the other one is as the client reads it, not as the server keeps it."""
    parts = parts_of(tiny_model, strategy=FedSaLora(), broadcast=UniformQuantizer(bits=2))
    state = rounds(parts, 2)[0][-1]
    read = parts.broadcast(state)[1].adapter
    ((clients, stack),) = own_adapters(variant(parts, clients_per_block=5), state, np.arange(5))
    for place in range(len(clients)):
        assert torch.equal(stack["text.0.q.lora_A"][place], read["text.0.q.lora_A"])
    assert not torch.equal(read["text.0.q.lora_A"], state.adapter["text.0.q.lora_A"])
