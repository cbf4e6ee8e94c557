"""Exact averaging: what A and B can't hold goes into a residual, and nothing of the mean product is lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    LOCAL,
    TOLERANCE,
    adapt,
    assert_states_close,
    federation,
    fp64,
    low_rank_clients,
    random_adapters,
    random_pixels,
)
from hypothesis import given
from hypothesis import strategies as st

from flora.clip.adapters.lora import TARGETS, Lora
from flora.clip.layers import Dropout, LowRank
from flora.communication.options import payload_bytes
from flora.config.parse import parse_config
from flora.core import tree
from flora.core.low_rank import aggregation_error, layers, product_of, residual_of, residuals_at_their_smallest
from flora.core.rng import Rng
from flora.core.states import ServerState
from flora.core.tree import State, StateLike
from flora.federated.round import RoundResult, run_round
from flora.server.strategies.residuals import FedExLora, FloraStacking, WithResidual
from flora.simulate import resume, simulate

EXACT = [FloraStacking(), FedExLora()]


def dense(state: StateLike, layer: str = "x") -> torch.Tensor:
    """B A and the residual of a layer, multiplied out."""
    pairs = [product_of(state, layer), *residual_of(state, layer)]
    return torch.stack([left @ right for left, right in pairs]).sum(dim=0)


def begun(strategy: WithResidual, adapter: State) -> State:
    """A server's adapter that begins at zero."""
    return strategy.initial({**adapter, "x.lora_B": torch.zeros_like(adapter["x.lora_B"])})


def settled(strategy: WithResidual, server: State, clients: list[State], weights: list[float]) -> State:
    """What the server has after a round."""
    after = strategy.finalize({**server, **tree.weighted_mean(clients, weights)}, clients, weights)
    assert not (strategy.restarts and after["x.lora_B"].any())
    return after


def test_fedex_by_hand() -> None:
    clients = [
        fp64({"x.lora_A": torch.tensor([[1.0, 0.0]]), "x.lora_B": torch.tensor([[1.0], [0.0]])}),
        fp64({"x.lora_A": torch.tensor([[0.0, 1.0]]), "x.lora_B": torch.tensor([[0.0], [1.0]])}),
    ]
    after = settled(FedExLora(), begun(FedExLora(), clients[0]), clients, [1.0, 1.0])
    assert after["x.lora_A"].tolist() == [[0.5, 0.5]] and after["x.lora_B"].tolist() == [[0.5], [0.5]]
    # The mean product is I / 2, the product of means 1/4 everywhere; the difference has rank 1.
    ((left, right),) = residual_of(after, "x")
    assert left.shape == (2, 1) and right.shape == (1, 2)
    torch.testing.assert_close(
        left @ right, torch.tensor([[0.25, -0.25], [-0.25, 0.25]]).double(), atol=TOLERANCE, rtol=0
    )


def test_stacking_by_hand() -> None:
    clients = [
        {"x.lora_A": torch.tensor([[1.0, 0.0]]), "x.lora_B": torch.tensor([[4.0], [0.0]])},
        {"x.lora_A": torch.tensor([[0.0, 1.0], [0.0, 2.0]]), "x.lora_B": torch.tensor([[0.0, 0.0], [4.0, 2.0]])},
    ]  # of ranks 1 and 2: weights 1 and 3 of 4 make diag(4, 0) / 4 + diag(0, 8) 3 / 4
    server = begun(FloraStacking(), clients[0])
    after = FloraStacking().finalize(server, clients, [1.0, 3.0])
    ((left, right),) = residual_of(after, "x")
    torch.testing.assert_close(left @ right, torch.diag(torch.tensor([1.0, 6.0])).double(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("strategy", EXACT)
@given(seed=st.integers(0, 999), number=st.sampled_from([1, 2, 5]), num_rounds=st.integers(1, 6))
def test_exact_over_many_rounds(strategy: WithResidual, seed: int, number: int, num_rounds: int) -> None:
    server = begun(strategy, low_rank_clients(1, seed=seed)[0])
    for round in range(num_rounds):
        clients = low_rank_clients(number, seed=1000 * round + seed)
        weights = [1.0 + place for place in range(number)]
        mean = torch.stack([w / sum(weights) * dense(c) for w, c in zip(weights, clients, strict=True)]).sum(dim=0)
        kept = dense({name: tensor for name, tensor in server.items() if "residual" in name} | {
            "x.lora_A": torch.zeros(1, 6).double(), "x.lora_B": torch.zeros(5, 1).double()})  # fmt: skip
        after = settled(strategy, server, clients, weights)
        torch.testing.assert_close(dense(after), kept + mean, atol=TOLERANCE * (1 + float(mean.norm())), rtol=0)
        error = aggregation_error(clients, weights, after, server)
        assert error is not None and error < TOLERANCE
        server = after
        ((left, right),) = residual_of(server, "x")
        assert left.shape[1] == right.shape[0] <= 5  # it never outgrows the matrix


def test_one_client_and_equal_clients_leave_no_residual_in_fedex() -> None:
    for number in (1, 4):
        clients = low_rank_clients(1) * number
        after = settled(FedExLora(), begun(FedExLora(), clients[0]), clients, [2.0] * number)
        assert after["x.residual_A"].shape == (0, 6)
        assert_states_close({name: after[name] for name in clients[0]}, clients[0])


def test_the_order_of_clients_is_irrelevant() -> None:
    clients, weights = low_rank_clients(4), [1.0, 2.0, 3.0, 4.0]
    for strategy in EXACT:
        server = begun(strategy, clients[0])
        one = dense(settled(strategy, server, clients, weights))
        other = dense(settled(strategy, server, clients[::-1], weights[::-1]))
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


def test_tolerance_says_what_is_left_out() -> None:
    clients = [{"x.lora_A": torch.eye(2, 6), "x.lora_B": torch.diag(torch.tensor([1.0, 1e-3]))}]
    for tolerance, rank in ((1e-2, 1), (1e-4, 2)):
        strategy = FloraStacking(tolerance=tolerance)
        assert len(strategy.finalize(strategy.initial(clients[0]), clients, [1.0])["x.residual_A"]) == rank


@pytest.mark.parametrize("tolerance", [0.0, 1e-8])
def test_what_rounding_adds_to_a_residual_is_no_rank(tolerance: float) -> None:
    """K clients of rank r differ from their means by a product of rank (K - 1) r; of 30 x 40, a few of rank 2 fit."""
    generator = torch.Generator().manual_seed(0)
    for number in (2, 3, 5):
        shapes = {"x.lora_A": (2, 40), "x.lora_B": (30, 2)}
        clients = [{name: torch.randn(s, generator=generator) for name, s in shapes.items()} for _ in range(number)]
        weights = [1.0 + place for place in range(number)]
        strategy = FedExLora(tolerance=tolerance)
        after = settled(strategy, begun(strategy, clients[0]), clients, weights)
        assert len(after["x.residual_A"]) == 2 * (number - 1)


def test_the_bytes_of_a_residual_do_not_depend_on_the_block(tiny_model: str) -> None:
    found = [
        [result.downlink_bytes for result in rounds(tiny_model, FedExLora(), 2, per_block=number)[1]]
        for number in (1, 2, 5)
    ]
    assert found[0] == found[1] == found[2]
    assert found[0][1] > found[0][0]


def test_a_residual_is_added_without_dropout() -> None:
    layer = LowRank(2, 2, scaling=0.5)
    x, frozen = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2)
    residual = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-1.0]])
    dropout = Dropout(0.999, [Rng(0).torch(), Rng(1).torch()])
    layer.attach(torch.zeros(2, 1, 2), torch.zeros(2, 2, 1), dropout, residual)
    assert layer(x, frozen).tolist() == [[1.5, -1.5], [3.5, -3.5]]
    layer.attach(torch.zeros(2, 1, 2), torch.zeros(2, 2, 1))
    assert not layer(x, frozen).any()


def test_what_is_bound_is_what_is_merged(tiny_model: str) -> None:
    options = Lora(towers=("text", "vision"), targets=TARGETS, rank=2)
    model = adapt(tiny_model, options)
    adapter = dict(tree.unstack(random_adapters(model, 1))[0])
    for layer in layers(adapter):
        generator = torch.Generator().manual_seed(len(layer))
        shapes = adapter[f"{layer}.lora_A"].shape[1], adapter[f"{layer}.lora_B"].shape[0]
        adapter[f"{layer}.residual_A"] = 0.2 * torch.randn(3, shapes[0], generator=generator).double()
        adapter[f"{layer}.residual_B"] = 0.2 * torch.randn(shapes[1], 3, generator=generator).double()
    stem = model.vision.stem(random_pixels(2))
    with torch.no_grad(), model.adapter.bind(tree.expand(adapter, 1)):
        ours = model.class_features(1), model.image_features(stem, 1)
    plain = dict(model.clip.model.state_dict())
    merged = adapt(tiny_model, options)
    merged.clip.model.load_state_dict(model.adapter.merged_state_dict(plain, adapter))
    merged = type(merged)(merged.clip, merged.adapter, class_names=("cat", "fire truck"), templates=("a {}.",))
    with torch.no_grad():
        again = adapt(tiny_model, options, class_names=("cat", "fire truck"), templates=("a {}.",))
        with again.adapter.bind(tree.expand(adapter, 1)):
            torch.testing.assert_close(again.class_features(1), merged.class_features(1), atol=TOLERANCE, rtol=0)
        theirs = merged.image_features(merged.vision.stem(random_pixels(2)), 1)
    torch.testing.assert_close(ours[1], theirs, atol=TOLERANCE, rtol=0)


def rounds(
    model: str, strategy: WithResidual, number: int, per_block: int = 1, **options: Any
) -> tuple[list[ServerState], list[RoundResult]]:
    adapted = adapt(model, Lora(rank=2))
    local = dataclasses.replace(LOCAL, learning_rate=0.02, **options)
    parts = federation(adapted, local, per_block=per_block, strategy=strategy)
    states, results = [parts.initial_state(adapted.initial_adapter(Rng(1)))], []
    for _ in range(number):
        state, result = run_round(parts, states[-1])
        states.append(state)
        results.append(result)
    return states, results


@pytest.mark.parametrize("strategy", EXACT)
def test_trained_for_real(tiny_model: str, strategy: WithResidual) -> None:
    states, results = rounds(tiny_model, strategy, 3)
    ranks = [len(state.adapter["text.0.q.residual_A"]) for state in states]
    assert ranks[0] == 0 and 2 < ranks[1] <= 10 and ranks == sorted(ranks)  # five clients of rank two
    assert all(result.aggregation_error is not None and result.aggregation_error < TOLERANCE for result in results)
    sizes = [result.downlink_bytes for result in results]
    assert sizes == sorted(sizes) and sizes[1] > sizes[0]
    assert len({result.uplink_bytes for result in results}) == 1
    for number in (2, 5):
        others, _ = rounds(tiny_model, strategy, 3, per_block=number)
        for layer in layers(states[-1].adapter):
            one, other = (dense(each.adapter, layer) for each in (states[-1], others[-1]))
            torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


def test_stacking_starts_anew_each_round(tiny_model: str) -> None:
    states, _ = rounds(tiny_model, FloraStacking(), 2)
    starts = [state.adapter["text.1.v.lora_A"] for state in states]
    assert not torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])
    assert not any(state.adapter["text.1.v.lora_B"].any() for state in states)


def test_the_first_round_of_fedex_is_that_of_exact_averaging(tiny_model: str) -> None:
    """Stacking and FedEx-LoRA begin alike, so the weights that they come to are the same after one round."""
    (_, stacked), _ = rounds(tiny_model, FloraStacking(), 1)
    (_, extended), _ = rounds(tiny_model, FedExLora(), 1)
    for layer in layers(stacked.adapter):
        torch.testing.assert_close(
            dense(stacked.adapter, layer), dense(extended.adapter, layer), atol=TOLERANCE, rtol=0
        )


@pytest.mark.parametrize("name", ["flora_stacking", "fedex_lora"])
def test_a_run_goes_on_with_its_residual(raw_config: dict[str, Any], tmp_path: Path, name: str) -> None:
    raw = {**raw_config, "server": {"strategy": name}, "rounds": 4}
    whole = simulate(parse_config({**raw, "name": "whole"}))
    first = simulate(parse_config({**raw, "name": "parts", "rounds": 2}))
    rest = resume(first.directory, ["rounds=4"])
    assert whole.adapter.keys() == rest.adapter.keys()
    assert all(torch.equal(whole.adapter[key], rest.adapter[key]) for key in whole.adapter)
    assert any(tensor.numel() for key, tensor in whole.adapter.items() if "residual" in key)
    trained = sum(tensor.numel() for key, tensor in whole.adapter.items() if "lora" in key)
    assert whole.summary.trainable_parameters == trained


def test_a_residual_travels_as_the_shorter_of_its_factors_and_their_product() -> None:
    def state(rank: int) -> State:
        return {"x.residual_A": torch.zeros(rank, 30), "x.residual_B": torch.zeros(20, rank), "x.lora_A": torch.ones(1)}

    thin, wide = (residuals_at_their_smallest(state(rank)) for rank in (12, 13))  # 12 * 50 = 20 * 30
    assert tree.count(thin) == 601 and set(thin) == set(state(1))
    assert tree.count(wide) == 601 and set(wide) == {"x.residual_B", "x.lora_A"}
    assert payload_bytes(wide) < payload_bytes(state(13))
