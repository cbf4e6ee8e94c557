"""`backbone.precision`: fp64 is float64 from features to checkpoints, and fp32 is fp64 up to rounding."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import LOCAL, LOOSE, adapt, comparable, federation, rounds, variant

from flora.client.corrections import Correction, FedDyn, FedProx, Scaffold
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.dual_lora import DualLora
from flora.clip.adapters.lora import TARGETS, Lora
from flora.communication.compressors import Compressor
from flora.communication.options import CommunicationOptions
from flora.config.parse import parse_config
from flora.core import tree
from flora.core.registry import components
from flora.federated.federation import Federation
from flora.runs.stored_state import client_tensors, server_tensors
from flora.server.strategies.averaging import FedRep
from flora.server.strategies.base import Strategy
from flora.simulate import resume, simulate

ADAPTERS = {name: cls() for name, cls in components(Adapter).items()} | {
    "lora": Lora(towers=("text", "vision"), targets=TARGETS, rank=2),
    "dual_lora": DualLora(rank=2, local_rank=2),
}
STRATEGIES = {name: cls() for name, cls in components(Strategy).items()} | {"fedrep": FedRep(stay=("*.lora_B",))}
CORRECTIONS = {"fedprox": FedProx(), "scaffold": Scaffold(), "feddyn": FedDyn(alpha=0.5)}
COMPRESSORS = {name: cls() for name, cls in components(Compressor).items()}


def in_both(model: str, adapter: Adapter, **parts: Any) -> tuple[tree.State, tree.State, tree.State]:
    """The server's adapter after two rounds in fp32 and in fp64, and where the latter began."""
    ends, begin = [], {}
    for precision in ("fp32", "fp64"):
        templates = adapter.templates(("a photo of a {}.",))
        adapted = adapt(model, adapter, templates=templates, precision=precision)
        whole: Federation = federation(adapted, parts.get("local", GENTLE), per_block=5)
        others = {name: part for name, part in parts.items() if name != "local"}
        states, _ = rounds(variant(whole, **others), 2)
        begin = states[0].adapter
        ends.append(states[-1].adapter)
        wanted = torch.float64 if precision == "fp64" else torch.float32
        for state in states:
            kept = [state.adapter, server_tensors(state), *map(client_tensors, state.clients.values())]
            assert {tensor.dtype for each in kept for tensor in each.values()} <= {wanted, torch.float64}
            assert {tensor.dtype for tensor in state.adapter.values()} == {wanted}
    return ends[0], ends[1], begin


GENTLE = dataclasses.replace(LOCAL, learning_rate=0.01)


def assert_fp32_is_fp64(ends: tuple[tree.State, tree.State, tree.State]) -> None:
    """Assert that both came to the same place, to a thousandth of the way there."""
    fp32, fp64, begin = ends
    shared = [name for name in fp64 if name in begin and fp64[name].shape == begin[name].shape]
    way = max(float((fp64[name] - begin[name]).abs().max()) for name in shared)
    assert way > 1e-6
    for name in shared:
        assert float((fp32[name] - fp64[name]).abs().max()) < LOOSE * way, name


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_fp32_is_fp64_up_to_rounding_for_every_adapter(tiny_model: str, adapter: Adapter) -> None:
    assert_fp32_is_fp64(in_both(tiny_model, adapter))


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_fp32_is_fp64_up_to_rounding_for_every_strategy(tiny_model: str, strategy: Strategy) -> None:
    fp32, fp64, begin = in_both(tiny_model, Lora(rank=2), strategy=strategy)
    products = [
        {layer: _product(state, layer) for layer in {name.rpartition(".")[0] for name in state}}
        for state in (fp32, fp64, begin)
    ]  # a basis may turn, what it spans may not
    assert_fp32_is_fp64((products[0], products[1], products[2]))


def _product(state: tree.State, layer: str) -> torch.Tensor:
    dense = state[f"{layer}.lora_B"] @ state[f"{layer}.lora_A"]
    if f"{layer}.residual_A" in state:
        dense = dense + state[f"{layer}.residual_B"] @ state[f"{layer}.residual_A"]
    # What a strategy leaves at its start at the server shows in the factors alone.
    return torch.cat([dense, state[f"{layer}.lora_A"].T @ state[f"{layer}.lora_A"]])


@pytest.mark.parametrize("correction", CORRECTIONS.values(), ids=CORRECTIONS.keys())
def test_fp32_is_fp64_up_to_rounding_for_every_correction(tiny_model: str, correction: Correction) -> None:
    local = dataclasses.replace(GENTLE, correction=correction)
    assert_fp32_is_fp64(in_both(tiny_model, Lora(rank=2), local=local))


@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS.keys())
def test_what_is_compressed_is_read_in_the_precision_of_the_run(tiny_model: str, compressor: Compressor) -> None:
    parts = dataclasses.replace(
        federation(adapt(tiny_model, Lora(rank=2)), GENTLE), communication=CommunicationOptions(upload=compressor)
    )
    states, results = rounds(parts, 2)
    assert {tensor.dtype for tensor in states[-1].adapter.values()} == {torch.float64}
    assert not results[-1].rejected_clients


def test_a_run_in_fp64_is_written_resumed_and_cached_in_fp64(raw_config: dict[str, Any], tmp_path: Path) -> None:
    raw_config |= {"rounds": 3, "cache": {"folder": str(tmp_path / "cache")}}
    raw_config["local"] |= {"optimizer": "adam", "optimizer_state": "kept"}
    raw_config["backbone"]["precision"] = "fp64"
    whole = simulate(parse_config({**raw_config, "name": "whole"}))
    simulate(parse_config({**raw_config, "name": "half", "rounds": 2}))
    resume(tmp_path / "runs" / "half", ["rounds=3"])
    adapter = safetensors.torch.load_file(whole.directory / "adapter.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float64}
    assert all(
        torch.equal(tensor, adapter[name])
        for name, tensor in safetensors.torch.load_file(tmp_path / "runs" / "half" / "adapter.safetensors").items()
    )
    entries = len(list((tmp_path / "cache" / "features").iterdir()))
    raw_config["backbone"]["precision"] = "fp32"
    simulate(parse_config({**raw_config, "name": "single"}))
    assert (
        len(list((tmp_path / "cache" / "features").iterdir())) == 2 * entries
    )  # features of another precision are others
    assert comparable(whole.directory).keys() == comparable(tmp_path / "runs" / "half").keys()
    records = [json.loads(line) for line in (whole.directory / "rounds.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [0, 1, 2, 3]
