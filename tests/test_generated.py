"""Contexts that are made of the classes' names, against a generator of PyTorch's layers on plain OpenCLIP."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CLASSES,
    LABELS,
    LOCAL,
    PIXELS,
    TOLERANCE,
    adapt,
    assert_equal_to_a_plain_loop,
    federation,
    load_plain,
    plain_texts,
    random_adapters,
    random_pixels,
    rounds,
)
from torch import Tensor

from flora.clip.adapters.generated import CoCoOp, FedTpg
from flora.clip.adapters.outside import linear
from flora.clip.frozen import FrozenClip
from flora.clip.towers import towers
from flora.core import tree
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.tree import State

TPG = FedTpg(words=None, num_tokens=3, heads=2)
# Queries of width w, names' features of width d.
NUMBERS = 3 * 32 + 2 * (32 + 16 + 32) + 2 * (32 * 32 + 32) + 2 * (32 * 16 + 32) + (32 + 1) * 256 + (128 + 1) * 32


def context_of(state: State, names: Tensor, heads: int) -> Tensor:
    """The context `(n, w)` from the features of names `(C, d)`, by PyTorch's own layers."""
    s = state
    queries = F.layer_norm(s["queries"], (32,), s["norm_queries.weight"], s["norm_queries.bias"])
    read = F.layer_norm(names, (16,), s["norm_names.weight"], s["norm_names.bias"])
    mixed, _ = F.multi_head_attention_forward(
        queries, read, read, 32, heads, None, torch.cat([s[f"{each}.bias"] for each in ("query", "key", "value")]),
        None, None, False, 0.0, s["out.weight"], s["out.bias"], need_weights=False, use_separate_proj_weight=True,
        q_proj_weight=s["query.weight"], k_proj_weight=s["key.weight"], v_proj_weight=s["value.weight"],
    )  # fmt: skip
    normed = F.layer_norm(mixed, (32,), s["norm_mixed.weight"], s["norm_mixed.bias"])
    inner = F.linear(normed, s["up.weight"], s["up.bias"])
    return mixed + F.linear(inner[:, :128] * F.gelu(inner[:, 128:]), s["down.weight"], s["down.bias"])


def texts_of(
    plain: FrozenClip, state: State, classes: tuple[str, ...], read: tuple[str, ...], heads: int = 2
) -> Tensor:
    """Unit features of `classes` with the context that the generator makes of the names `read`."""
    context = context_of(state, plain_texts(plain, read), heads)

    def put(x: Tensor, ends: Tensor) -> None:
        x[:, 1 : 1 + len(context)] = context

    return plain_texts(plain, [f"{'x ' * len(context)}{name}." for name in classes], put)


@pytest.mark.parametrize("names", ["client", "all"])
def test_rounds_equal_a_plain_loop(tiny_model: str, names: str) -> None:
    method = dataclasses.replace(TPG, names=names)
    model, plain = adapt(tiny_model, method, templates=method.templates(())), load_plain(tiny_model)
    plain.model.requires_grad_(False)
    images = model.logit_scale() * model.image_features(model.vision.stem(PIXELS), 1)[0].detach()

    def loss(state: State, examples: np.ndarray) -> Tensor:
        labels = LABELS[examples]
        own = tuple(CLASSES[label] for label in sorted(set(labels.tolist())))
        texts = texts_of(plain, state, CLASSES, own if names == "client" else CLASSES)
        return F.cross_entropy(images[examples] @ texts.T, labels)

    _, last = assert_equal_to_a_plain_loop(model, loss, epochs=3)
    assert tree.count(last) == NUMBERS


@torch.no_grad()
def test_new_classes_have_the_context_of_their_own_names(tiny_model: str) -> None:
    method, new = FedTpg(), ("owl", "a red lorry")
    model, plain = adapt(tiny_model, method, templates=method.templates(())), load_plain(tiny_model)
    other = dataclasses.replace(method)
    stack = random_adapters(model, 2)
    # The same adapter, as an experiment with new classes attaches it once.
    model_of_new = type(model)(model.clip, model.adapter, class_names=new, templates=other.templates(()))
    for each, names in ((model, CLASSES), (model_of_new, new)):
        with each.adapter.bind(stack):
            found = each.class_features(2)
        for client in range(2):
            expected = texts_of(plain, {name: tensor[client] for name, tensor in stack.items()}, names, names, heads=4)
            torch.testing.assert_close(found[client], expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_the_frozen_model_reads_words_in_the_vectors_places(tiny_model: str) -> None:
    method = FedTpg()
    model, plain = adapt(tiny_model, method, templates=method.templates(())), load_plain(tiny_model)
    expected = plain_texts(plain, [f"a photo of a {name}." for name in CLASSES])
    torch.testing.assert_close(model.frozen_class_features(), expected, atol=TOLERANCE, rtol=0)
    queries = model.initial_adapter(Rng(0))["queries"]
    assert queries.shape == (4, 32) and 0.01 < queries.std() < 0.03


def test_heads_divide_the_width(tiny_model: str) -> None:
    with pytest.raises(OptionError, match=r"heads: expected a divisor of 32, .*'s text width"):
        FedTpg(heads=3).check_fits(adapt(tiny_model).clip.architecture)
    with pytest.raises(OptionError, match=r"words: expected words without braces, or none"):
        FedTpg(words="{}")


COCOOP = CoCoOp(reduction=4)


def logits_by_image(plain: FrozenClip, state: State, images: Tensor) -> Tensor:
    """The cosines `(B, C)` of images, each with the classes' features that its own context gives."""
    rows = []
    for image in images:
        hidden = F.linear(image, state["down.weight"], state["down.bias"]).relu()
        context = state["context"] + F.linear(hidden, state["up.weight"], state["up.bias"])

        def put(x: Tensor, ends: Tensor, context: Tensor = context) -> None:
            x[:, 1:5] = context

        rows.append(plain_texts(plain, [f"a photo of a {name}." for name in CLASSES], put) @ image)
    return torch.stack(rows)


def test_rounds_with_contexts_of_images_equal_a_plain_loop(tiny_model: str) -> None:
    model, plain = adapt(tiny_model, COCOOP, templates=COCOOP.templates(())), load_plain(tiny_model)
    plain.model.requires_grad_(False)
    images = model.image_features(model.vision.stem(PIXELS), 1)[0].detach()

    def loss(state: State, examples: np.ndarray) -> Tensor:
        logits = model.logit_scale() * logits_by_image(plain, state, images[examples])
        return F.cross_entropy(logits, LABELS[examples])

    _, last = assert_equal_to_a_plain_loop(model, loss)
    assert tree.count(last) == 4 * 32 + (16 + 1) * 4 + (4 + 1) * 32


def test_a_step_encodes_the_classes_for_its_images_alone(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(tiny_model, COCOOP, templates=COCOOP.templates(()))
    encode, numbers = model.class_features, list[int]()

    def counted(number: int, classes: Tensor | None = None) -> Tensor:
        numbers.append(number)
        return encode(number, classes)

    monkeypatch.setattr(model, "class_features", counted)
    rounds(federation(model, dataclasses.replace(LOCAL, steps=1, batch_size=4), per_block=5), 1)
    assert numbers == [1, 5 * 4]  # before the step the frozen model, once


def test_a_layers_gradient_is_laid_out_as_its_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 6, 5), (2, 6), (2, 3, 5))
    )
    found, expected = linear(x, {"up.weight": weight, "up.bias": bias}, "up"), x @ weight.mT + bias.unsqueeze(1)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    ours, theirs = (torch.autograd.grad(each.square().sum(), [weight, bias, x]) for each in (found, expected))
    assert ours[0].is_contiguous()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("at_once", [1, 4, 6])
def test_each_image_is_evaluated_with_its_own_context(
    tiny_model: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = adapt(tiny_model, COCOOP, templates=COCOOP.templates(())), load_plain(tiny_model)
    monkeypatch.setattr(towers, "MAX_TEXT_TOKENS", at_once * model.prompts.tokens.numel())
    stack, stem = random_adapters(model, 2), model.vision.stem(random_pixels(6))
    images = model.image_features(stem, 2)
    with model.adapter.bind(stack):
        found = model.logits(stem, model.class_features(2))
    for client in range(2):
        own = {name: tensor[client] for name, tensor in stack.items()}
        expected = model.logit_scale() * logits_by_image(plain, own, images[client])
        torch.testing.assert_close(found[client], expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_images_shift_the_contexts_of_all_classes_alike(tiny_model: str) -> None:
    method = CoCoOp(class_specific=True, position="middle", words=None, num_tokens=3)
    model = adapt(tiny_model, method, templates=method.templates(()))
    stack = {"context": torch.zeros(2, 3, 3, 32).double(), **_layers(2)}
    images = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).double()
    with model.adapter.bind(stack):
        context = model.adapter.for_images(images)["context"]
    assert context.shape == (10, 3, 3, 32)
    torch.testing.assert_close(context, context[:, :1, :1].expand_as(context), atol=0, rtol=0)
    assert context[:, 0, 0].std(dim=0).min() > 0


def _layers(number: int) -> State:
    generator = torch.Generator().manual_seed(1)
    shapes = {"down.weight": (1, 16), "down.bias": (1,), "up.weight": (32, 1), "up.bias": (32,)}
    return {name: torch.rand((number, *shape), generator=generator).double() for name, shape in shapes.items()}


def test_the_layers_are_no_narrower_than_one(tiny_model: str) -> None:
    with pytest.raises(OptionError, match=r"reduction: expected at most embed_dim of .*, 16, got 17"):
        CoCoOp(reduction=17).check_fits(adapt(tiny_model).clip.architecture)
