"""LoRA equals plain OpenCLIP at B = 0, and plain OpenCLIP with merged weights elsewhere, for every target and tower."""

from __future__ import annotations

import pytest
import torch
from helpers import CLASSES, TOLERANCE, adapt, load_plain, random_adapters, random_pixels, write_model
from torch import nn

from flora.clip.adapters.lora import TARGETS, Lora
from flora.clip.layers import Dropout, LowRank
from flora.core import tree
from flora.core.registry import OptionError
from flora.core.rng import Rng

TEMPLATE = "a photo of a {}."


def plain_features(model: str, state_dict: dict[str, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and class features by OpenCLIP's own code, on prompts padded to the full context."""
    clip = load_plain(model)
    if state_dict is not None:
        clip.model.load_state_dict(state_dict)
    tokens = clip.tokenize([TEMPLATE.format(name) for name in CLASSES])
    with torch.no_grad():
        images = clip.model.encode_image(random_pixels(6), normalize=True)  # type: ignore[operator]
        return images, clip.model.encode_text(tokens, normalize=True)  # type: ignore[operator]


def our_features(model, adapter_stack):  # type: ignore[no-untyped-def]
    """Image and class features of K clients, `(K, 6, d)` and `(K, C, d)`."""
    num_clients = len(next(iter(adapter_stack.values())))
    stem = model.vision.stem(random_pixels(6))
    with torch.no_grad(), model.adapter.bind(adapter_stack):
        repeated = stem.unsqueeze(0).expand(num_clients, *stem.shape).flatten(0, 1)
        return model.image_features(repeated, num_clients), model.class_features(num_clients)


@pytest.fixture(params=["CLIP", "CustomTextCLIP"])
def model_path(request, tmp_path) -> str:  # type: ignore[no-untyped-def]
    return write_model(tmp_path / "model.json", **({"custom_text": True} if request.param == "CustomTextCLIP" else {}))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_fresh_adapter_computes_what_plain_openclip_does(tiny_model: str, tower: str, target: str) -> None:
    model = adapt(tiny_model, Lora(towers=(tower,), targets=(target,)))
    stack = tree.expand(model.adapter.initial_state(Rng(0)), 1)
    for ours, plain in zip(our_features(model, stack), plain_features(tiny_model), strict=True):
        torch.testing.assert_close(ours[0], plain, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layers", [None, (-1,), (0,)])
@pytest.mark.parametrize("target", [*TARGETS, "all"])
def test_adapted_model_equals_plain_openclip_with_merged_weights(model_path: str, target: str, layers) -> None:  # type: ignore[no-untyped-def]
    targets = TARGETS if target == "all" else (target,)
    model = adapt(model_path, Lora(towers=("text", "vision"), targets=targets, layers=layers, rank=3))
    stack = random_adapters(model, 1)
    plain_state = load_plain(model_path).model.state_dict()
    before = {name: tensor.clone() for name, tensor in plain_state.items()}
    merged = model.adapter.merged_state_dict(plain_state, tree.unstack(stack)[0])
    changed = [name for name in merged if not torch.equal(merged[name], before[name])]
    matrices = len({"qkv" if target in "qkv" else target for target in targets})
    assert len(changed) == 2 * (1 if layers else 2) * matrices  # towers, blocks, matrices
    assert all(torch.equal(plain_state[name], before[name]) for name in before)  # merging is a pure function
    for ours, plain in zip(our_features(model, stack), plain_features(model_path, merged), strict=True):
        torch.testing.assert_close(ours[0], plain, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("towers", [("text",), ("vision",), ("text", "vision")])
def test_a_block_of_clients_computes_what_each_client_does_alone(tiny_model: str, towers: tuple[str, ...]) -> None:
    model = adapt(tiny_model, Lora(towers=towers, targets=TARGETS, dropout=0.5))
    stack = random_adapters(model, 3)
    together = our_features(model, stack)
    for client in range(3):
        alone = our_features(model, {name: tensor[client : client + 1] for name, tensor in stack.items()})
        for ours, single in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[client], single[0], atol=TOLERANCE, rtol=0)
    assert (together[0][0] - together[0][1]).abs().max() > 1e-3 or "vision" not in towers


def test_low_rank_by_hand() -> None:
    layer = LowRank(2, 3, scaling=0.5)
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])  # one row for each of two clients
    frozen = torch.zeros(2, 3)
    assert torch.equal(layer(x, frozen), frozen)  # nothing attached
    lora_A = torch.tensor([[[1.0, 1.0]], [[2.0, 0.0]]])
    lora_B = torch.tensor([[[1.0], [0.0], [-1.0]], [[0.0], [1.0], [2.0]]])
    layer.attach(lora_A, lora_B)
    # client 0: A x = 3, B A x = (3, 0, -3), halved; client 1: A x = 6, B A x = (0, 6, 12), halved
    assert layer(x, frozen).tolist() == [[1.5, 0.0, -1.5], [0.0, 3.0, 6.0]]


def test_dropout_masks_depend_on_the_client_alone() -> None:
    x = torch.ones(3, 40, 5)
    three = Dropout(0.25, [Rng(0).child(client).torch() for client in range(3)]).apply(x)
    one = Dropout(0.25, [Rng(0).child(2).torch()]).apply(x[2:])
    assert torch.equal(three[2], one[0])
    assert not torch.equal(three[0], three[1])
    assert three.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert 0.6 < three.count_nonzero() / three.numel() < 0.9


def test_binding_leaves_no_trace(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(towers=("text", "vision"), targets=TARGETS))
    names = list(load_plain(tiny_model).model.state_dict())
    stem = model.vision.stem(random_pixels(2))
    with torch.no_grad():
        before = model.class_features(1), model.image_features(stem, 1)
        with model.adapter.bind(random_adapters(model, 1)):
            assert not torch.equal(model.class_features(1), before[0])
        assert torch.equal(model.class_features(1), before[0])
        assert torch.equal(model.image_features(stem, 1), before[1])
    # Names stay OpenCLIP's own, so checkpoints load before and after the injection.
    assert sorted(model.clip.model.state_dict()) == sorted(names)
    assert not any(isinstance(value, nn.Parameter) and value.requires_grad for value in model.clip.model.parameters())


@pytest.mark.parametrize(("scaling", "factor"), [("alpha/r", 4.0), ("alpha/sqrt(r)", 8.0), ("alpha", 16.0)])
def test_scaling(scaling: str, factor: float) -> None:
    assert Lora(rank=4, alpha=16, scaling=scaling).factor == factor


def test_initial_state_is_random_a_and_zero_b(tiny_model: str) -> None:
    lora = Lora(targets=("q", "fc"), rank=4, init="normal")
    state = adapt(tiny_model, lora).adapter.initial_state(Rng(0))
    assert {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith("text.0.")} == {
        "text.0.q.lora_A": (4, 32),
        "text.0.q.lora_B": (32, 4),
        "text.0.fc.lora_A": (4, 32),
        "text.0.fc.lora_B": (128, 4),
    }
    assert all(tensor.count_nonzero() == 0 for name, tensor in state.items() if name.endswith("B"))
    values = torch.cat([tensor.flatten() for name, tensor in state.items() if name.endswith("A")])
    assert values.std().item() == pytest.approx(1 / 2, rel=0.15)
    uniform = adapt(tiny_model, Lora(rank=4)).adapter.initial_state(Rng(0))["text.0.q.lora_A"]
    assert uniform.abs().max() <= 32**-0.5


@pytest.mark.parametrize("layers", [(0, 0), (1, -1)])
def test_a_layer_that_is_named_twice_is_refused(tiny_model: str, layers: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match=r"layers: expected each block once \(2 in the tower\), got \["):
        adapt(tiny_model, Lora(layers=layers))


def test_layers_that_do_not_exist(tiny_model: str) -> None:
    with pytest.raises(OptionError, match=r"layers: expected blocks from -2 to 1 \(2 in the tower\), got 2"):
        adapt(tiny_model, Lora(layers=(2,)))
