"""A state whose numbers are one vector is as good as a dict of the same tensors, and nothing writes into it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import TOLERANCE

from flora.core import tree
from flora.core.low_rank import aggregation_error
from flora.core.tree import FlatState, Moved, State
from flora.federated.movement import movement_of


def states(number: int, dtype: torch.dtype = torch.float64) -> list[State]:
    """States of a matrix, a vector and a number, all at random."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (2, 3), "b": (4,), "c": ()}
    return [
        {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
        for _ in range(number)
    ]


def assert_same(found: tree.StateLike, expected: tree.StateLike) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(found[name].shape == tensor.shape for name, tensor in expected.items())


def test_a_flat_state_has_the_same_tensors_as_views() -> None:
    (state,) = states(1)
    flat = tree.flat(state)
    assert_same(flat, state)
    assert tree.flat(flat) is flat and tree.flatten(flat) is flat.vector
    assert "a" in flat and "d" not in flat and len(flat) == 3 and tree.count(flat) == 11
    assert tree.kinds(flat) == tree.kinds(state)
    flat.vector.zero_()
    assert not flat["a"].any() and state["a"].all()
    with pytest.raises(KeyError):
        flat["d"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arithmetic_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    plain = states(3, dtype)
    flat = [tree.flat(state) for state in plain]
    difference = tree.subtract(flat[0], flat[1])
    assert isinstance(difference, FlatState)
    assert_same(difference, tree.subtract(plain[0], plain[1]))
    in_another_order = dict(reversed(plain[1].items()))
    assert_same(tree.subtract(flat[0], in_another_order), tree.subtract(plain[0], plain[1]))
    assert_same(tree.scale(flat[0], 0.3), tree.scale(plain[0], 0.3))
    assert tree.norm(flat[0]) == tree.norm(plain[0])
    assert_same(tree.weighted_mean(flat, [1, 2, 3]), tree.weighted_mean(plain, [1, 2, 3]))
    assert_same(tree.weighted_mean([flat[0], in_another_order], [1, 2]), tree.weighted_mean(plain[:2], [1, 2]))
    assert movement_of(flat) == movement_of(plain)
    assert tree.is_finite(flat[0]) and not tree.is_finite(tree.scale(flat[0], math.inf))
    for state, other in zip(flat, plain, strict=True):  # nothing was written into what was read
        assert_same(state, other)


def test_stacks_of_flat_states() -> None:
    plain = states(3)
    stack = tree.stack([tree.flat(state) for state in plain])
    assert_same(stack, tree.stack(plain))
    for found, expected in zip(tree.unstack(stack), plain, strict=True):
        assert_same(found, expected)


def test_a_weighted_mean_of_many_numbers_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = states(3)
    whole = tree.weighted_mean(plain, [1, 2, 3])
    monkeypatch.setattr(tree, "MAX_TOGETHER", 4)
    assert_same(tree.weighted_mean(plain, [1, 2, 3]), whole)


@pytest.mark.parametrize("shared", [True, False])
def test_one_tensor_of_states_that_moved(shared: bool) -> None:
    start, *deltas = states(4)
    deltas = [tree.select(delta, ("a", "c")) for delta in deltas]
    moved = [Moved(start if shared else dict(start), tree.flat(delta)) for delta in deltas]
    for name in start:
        expected = torch.stack([start[name] + delta[name] if name in delta else start[name] for delta in deltas])
        near, moves = tree.moves_of(moved, name)
        assert (near is start[name]) == (shared and name in deltas[0]) or name == "b"
        torch.testing.assert_close(torch.stack([near + move for move in moves]), expected, atol=TOLERANCE, rtol=0)
        assert all(torch.equal(each[name], row) for each, row in zip(moved, expected, strict=True))


@pytest.mark.parametrize("number", [2, 3, 40])
def test_the_aggregation_error_of_many_clients_is_added_up_in_parts(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(number)

    def adapter() -> State:
        shapes = {"x.lora_A": (2, 7), "x.lora_B": (9, 2)}
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}

    start, clients = adapter(), [adapter() for _ in range(number)]
    ends = [Moved(start, tree.flat(tree.subtract(client, start))) for client in clients]
    weights = list(range(1, number + 1))
    server = tree.weighted_mean(clients, weights)
    share = 1 / sum(weights)
    mean = sum(w * share * each["x.lora_B"] @ each["x.lora_A"] for w, each in zip(weights, clients, strict=True))
    expected = (mean - server["x.lora_B"] @ server["x.lora_A"]).norm() / mean.norm()
    for cached in (1, 50, 2**18):
        monkeypatch.setattr("flora.core.low_rank.CACHED_NUMBERS", cached)
        for some in (clients, ends):
            assert aggregation_error(some, weights, server) == pytest.approx(float(expected), rel=1e-9)
