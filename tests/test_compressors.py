"""What travels is bytes: they decode to what the receiver works with, and their number is what is counted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flora.communication.compressors import (
    Compressor,
    NoCompression,
    NormalFloat,
    Quantizer,
    RandomMask,
    TopComponents,
    TopK,
    UniformQuantizer,
    pack,
    unpack,
    write_places,
)
from flora.core import tree
from flora.core.registry import OptionError, components
from flora.core.rng import Rng
from flora.core.tree import State

ALL = [
    NoCompression(),
    *(cls(bits=bits, scales=scales, rounding=rounding) for cls in (UniformQuantizer, NormalFloat)
      for bits in (1, 3, 4, 8, 32) for scales in ("tensor", "rank") for rounding in ("nearest", "stochastic")),
    *(TopK(fraction=fraction, scope=scope) for fraction in (1e-6, 0.01, 0.3, 1.0) for scope in ("tensor", "global")),
    *(cls(fraction=fraction) for cls in (RandomMask, TopComponents) for fraction in (1e-6, 0.3, 1.0)),
]  # fmt: skip
MASKS = [TopK, TopComponents, RandomMask]


SEED = Rng(0)


def some(seed: int = 0, rank: int = 4, scale: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x.lora_A": (rank, 7), "x.lora_B": (9, rank), "y.weight": (3, 5), "y.bias": (5,), "scale": (1,)}
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def sent(compressor: Compressor, state: State, rng: Rng = SEED) -> State:
    """What the receiver makes of a state."""
    like = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    return compressor.decode(compressor.encode(state, rng), like)


def distance(left: State, right: State) -> float:
    return tree.norm(tree.subtract(left, right))


def test_all_are_tried_here() -> None:
    assert {type(each) for each in ALL} == set(components(Compressor).values())


@pytest.mark.parametrize("compressor", ALL, ids=str)
@settings(max_examples=25, deadline=None)  # of each of these many
@given(seed=st.integers(0, 99), rank=st.sampled_from([1, 2, 5]), scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]))
def test_names_shapes_and_sense(compressor: Compressor, seed: int, rank: int, scale: float) -> None:
    state = some(seed, rank, scale)
    found = sent(compressor, state)
    assert [(name, tensor.shape, tensor.dtype) for name, tensor in found.items()] == [
        (name, tensor.shape, tensor.dtype) for name, tensor in state.items()
    ]
    assert tree.is_finite(found)
    assert distance(found, state) <= 3 * tree.norm(state)
    if compressor.is_identity or getattr(compressor, "fraction", 0) == 1.0:
        assert all(torch.equal(found[name], state[name]) for name in state)
    again = sent(compressor, state)
    assert all(torch.equal(found[name], again[name]) for name in state)  # from the same seed


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_zeros_stay_zeros(compressor: Compressor) -> None:
    found = sent(compressor, tree.scale(some(), 0.0))
    assert not any(tensor.any() for tensor in found.values())


@given(codes=st.lists(st.integers(0, 255), min_size=1, max_size=50), bits=st.integers(1, 17))
def test_packed_codes_come_back(codes: list[int], bits: int) -> None:
    numbers = torch.tensor([code % 2**bits for code in codes])
    packed = pack(numbers, bits)
    assert len(packed) == math.ceil(len(codes) * bits / 8)
    assert torch.equal(unpack(packed, len(codes), bits), numbers)


def test_packing_by_hand() -> None:
    assert pack(torch.tensor([1, 2, 3]), 2) == bytes([0b111001])  # the lowest bits first
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1]), 1) == bytes([1, 1])


# Quantisers


def test_uniform_by_hand() -> None:
    state = {"w": torch.tensor([[-2.0, 0.0, 0.7, 1.3, 2.0]])}
    # Three bits are the seven values -2, -4/3, -2/3, 0, 2/3, 4/3, 2.
    expected = torch.tensor([[-2.0, 0.0, 2 / 3, 4 / 3, 2.0]])
    torch.testing.assert_close(sent(UniformQuantizer(bits=3), state)["w"], expected)
    # Two bits are -2, 0, 2; one is the sign, of mean size 6 / 5.
    assert sent(UniformQuantizer(bits=2), state)["w"].tolist() == [[-2.0, 0.0, 0.0, 2.0, 2.0]]
    sign = sent(UniformQuantizer(bits=1), {"w": torch.tensor([-2.0, 1.0, 3.0])})["w"]
    assert sign.tolist() == [-2.0, 2.0, 2.0]


def test_normal_float_is_that_of_qlora() -> None:
    """The sixteen values of NF4 as the paper's appendix E prints them."""
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    torch.testing.assert_close(
        NormalFloat(bits=4).values(), torch.tensor(published, dtype=torch.float64), atol=1e-6, rtol=0
    )
    for bits in range(1, 9):
        values = NormalFloat(bits=bits).values()
        assert len(values) == 2**bits and (values.diff() > 0).all()
        assert (0.0 in values.tolist()) == (bits > 1)


@pytest.mark.parametrize("cls", [UniformQuantizer, NormalFloat])
def test_more_bits_are_nearer(cls: type[Quantizer]) -> None:
    state = {"w": torch.randn(2000, generator=torch.Generator().manual_seed(0))}
    errors = [distance(sent(cls(bits=bits), state), state) for bits in range(1, 9)]
    assert errors[2:] == sorted(errors[2:], reverse=True) and errors[-1] < 0.05 * errors[0]


def test_a_normal_code_book_suits_normal_numbers() -> None:
    state = {"w": torch.randn(4000, generator=torch.Generator().manual_seed(0))}
    assert distance(sent(NormalFloat(bits=4), state), state) < distance(sent(UniformQuantizer(bits=4), state), state)


def test_a_scale_for_each_rank_serves_ranks_of_different_sizes() -> None:
    state = some()
    state["x.lora_A"] = state["x.lora_A"] * torch.tensor([[1.0], [1e-3], [1e3], [1.0]])
    state["x.lora_B"] = state["x.lora_B"] * torch.tensor([[1.0, 1e-3, 1e3, 1.0]])
    for name, each in (("x.lora_A", 1), ("x.lora_B", 0)):
        one, many = (sent(UniformQuantizer(bits=8, scales=scales), state)[name] for scales in ("tensor", "rank"))
        small = 1
        wrong = [(found - state[name]).select(1 - each, small).norm() for found in (one, many)]
        assert wrong[1] < 0.02 * state[name].select(1 - each, small).norm() < wrong[0]


@pytest.mark.parametrize("cls", [UniformQuantizer, NormalFloat])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_stochastic_rounding_is_unbiased(cls: type[Quantizer], bits: int) -> None:
    state = {"w": torch.tensor([-1.0, -0.3, 0.0, 0.11, 0.5, 1.0])}
    quantizer, number = cls(bits=bits, rounding="stochastic"), 20_000
    repeated = {"w": state["w"].repeat(number)}
    mean = sent(quantizer, repeated)["w"].view(number, -1).double().mean(dim=0)
    # Five standard errors of the mean of numbers between -1 and 1.
    assert (mean - state["w"]).abs().max() < 5 / number**0.5
    if bits < 4:
        nearest = sent(cls(bits=bits), state)["w"]
        assert (nearest - state["w"]).abs().max() > 0.1


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_the_length_of_quantised_tensors(bits: int) -> None:
    state = some()
    for scales, number in (("tensor", 5), ("rank", 4 + 4 + 3 + 1 + 1)):
        length = len(UniformQuantizer(bits=bits, scales=scales).encode(state, Rng(0)))
        assert length == 4 * number + sum(math.ceil(tensor.numel() * bits / 8) for tensor in state.values())


# Masks


def test_top_k_by_hand() -> None:
    state = {"a": torch.tensor([3.0, -5.0, 1.0, 4.0]), "b": torch.tensor([[0.1, 0.3], [-0.2, 0.0]])}
    half = sent(TopK(fraction=0.5), state)
    assert half["a"].tolist() == [0, -5, 0, 4]
    torch.testing.assert_close(half["b"], torch.tensor([[0.0, 0.3], [-0.2, 0.0]]))
    whole = sent(TopK(fraction=0.5, scope="global"), state)
    assert whole["a"].tolist() == [3, -5, 1, 4] and not whole["b"].any()


def test_top_components_by_hand() -> None:
    state = {
        "x.lora_A": torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0]]),
        "x.lora_B": torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 1.0]]),
    }  # squared norms of the components: 1 + 16, 9 + 1, 8 + 1
    found = sent(TopComponents(fraction=0.67), state)
    assert found["x.lora_A"].tolist() == [[1, 0], [0, 3], [0, 0]]
    assert found["x.lora_B"].tolist() == [[4, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("cls", MASKS)
def test_a_mask_sends_numbers_as_they_are(cls: type[TopK]) -> None:
    state = some()
    found = sent(cls(fraction=0.3), state)
    for name, tensor in found.items():
        assert ((tensor == state[name]) | (tensor == 0)).all()
    share = sum(int(tensor.count_nonzero()) for tensor in found.values()) / tree.count(state)
    assert 0.2 < share < 0.6


@given(size=st.integers(1, 3000), fraction=st.floats(0.001, 1.0))
def test_places_take_the_shorter_way(size: int, fraction: float) -> None:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(size))
    number = min(max(1, round(fraction * size)), size)
    places = torch.randperm(size, generator=torch.Generator().manual_seed(size))[:number].sort().values
    width = max(1, math.ceil(math.log2(size)))
    expected = 0 if number == size else min(math.ceil(size / 8), math.ceil(number * width / 8))
    assert abs(len(write_places(places, size)) - expected) <= 1
    state = {"w": vector}
    assert len(TopK(fraction=fraction).encode(state, Rng(0))) <= expected + 1 + 4 * number
    assert len(RandomMask(fraction=fraction).encode(state, Rng(0))) == 8 + 4 * number
    assert int(sent(TopK(fraction=fraction), state)["w"].count_nonzero()) == number


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_the_length_does_not_depend_on_the_numbers(compressor: Compressor) -> None:
    lengths = {len(compressor.encode(state, SEED)) for state in (some(), some(1, scale=1e-3), tree.scale(some(), 0.0))}
    assert len(lengths) == 1


def test_random_masks_differ_from_seed_to_seed() -> None:
    state = some()
    one, other = (sent(RandomMask(fraction=0.5), state, Rng(0).child(place)) for place in range(2))
    assert any(not torch.equal(one[name], other[name]) for name in state)


def test_options() -> None:
    for bits in (9, 16, 31):
        with pytest.raises(OptionError, match=f"bits: expected 1 to 8, or 32, got {bits}"):
            UniformQuantizer(bits=bits)
