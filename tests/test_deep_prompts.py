"""Vectors learned in several blocks of both towers, against one client at a time on plain OpenCLIP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ALL_ON,
    CLASSES,
    LABELS,
    PIXELS,
    TOLERANCE,
    adapt,
    assert_equal_to_a_plain_loop,
    comparable,
    load_plain,
    random_adapters,
    write_model,
)
from torch import Tensor

from flora.clip.adapters.deep_prompts import DeepPrompts, Maple, PromptSrc
from flora.clip.towers.speed import SpeedOptions
from flora.clip.towers.towers import AdaptedClip
from flora.config.parse import parse_config
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.tree import State, StateLike
from flora.runs.loop import resume
from flora.simulate import simulate

MAPLE = Maple(depth=2)
SRC = PromptSrc(
    num_tokens=3, num_image_tokens=2, depth=2, logit_weight=0.7, frozen_templates=("a photo of a {}.", "art of the {}.")
)
BOTH = pytest.mark.parametrize("method", [MAPLE, SRC], ids=["maple", "prompt_src"])


def contexts_of(state: StateLike) -> list[Tensor]:
    """The vectors `(n, width)` of each block of the text tower that has some."""
    return [state["context"], *state.get("deep_context", ())]


def tokens_of(state: StateLike) -> list[Tensor]:
    """The tokens `(P, width)` of each block of the vision tower that has some."""
    if "visual.prompt" in state:
        return list(state["visual.prompt"])
    layers = zip(contexts_of(state), state["coupling.weight"], state["coupling.bias"], strict=True)
    return [F.linear(context, weight, bias) for context, weight, bias in layers]


def text_features(plain: Any, tokenize: Callable[[list[str]], Tensor], state: StateLike, names: Any) -> Tensor:
    """Unit features of classes, the first words of whose prompts are learned vectors, through plain OpenCLIP."""
    tokens, contexts = tokenize([f"a photo of a {name}." for name in names]), contexts_of(state)
    number = len(contexts[0])
    x = plain.token_embedding(tokens)
    x = torch.cat([x[:, :1], contexts[0].expand(len(x), -1, -1), x[:, 1 + number :]], dim=1)
    x = x + plain.positional_embedding
    for place, block in enumerate(plain.transformer.resblocks):
        if 0 < place < len(contexts):
            x = torch.cat([x[:, :1], contexts[place].expand(len(x), -1, -1), x[:, 1 + number :]], dim=1)
        x = block(x, attn_mask=plain.attn_mask)
    x = plain.ln_final(x)[torch.arange(len(x)), tokens.argmax(dim=-1)] @ plain.text_projection
    return F.normalize(x, dim=-1)


def image_features(plain: Any, state: StateLike, pixels: Tensor) -> Tensor:
    """Unit features of images with learned tokens between the class token and the image's own."""
    visual, tokens = plain.visual, tokens_of(state)
    number = len(tokens[0])
    x = visual._embeds(pixels)
    for place, block in enumerate(visual.transformer.resblocks):
        if place < len(tokens):
            learned = tokens[place] if place else visual.ln_pre(tokens[0])
            rest = x[:, 1 + number :] if place else x[:, 1:]
            x = torch.cat([x[:, :1], learned.expand(len(x), -1, -1), rest], dim=1)
        x = block(x)
    return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)


@torch.no_grad()
def frozen_texts_of(plain: Any, tokenize: Callable[[list[str]], Tensor]) -> Tensor:
    """The classes' unit features, means over PromptSRC's templates."""
    by_template = [
        plain.encode_text(tokenize([template.format(name) for name in CLASSES]), normalize=True)
        for template in SRC.frozen_templates
    ]
    return F.normalize(torch.stack(by_template).mean(dim=0), dim=-1)


def regulation(plain: Any, frozen_texts: Tensor, texts: Tensor, images: Tensor, pixels: Tensor) -> Tensor:
    """What PromptSRC adds to the cross-entropy."""
    frozen_images, scale = plain.encode_image(pixels, normalize=True), plain.logit_scale.exp()
    target = (scale * frozen_images @ frozen_texts.T).softmax(dim=-1)
    own = (scale * images @ texts.T).log_softmax(dim=-1)
    divergence = (target * (target.log() - own)).sum() / target.numel()
    return 25 * (texts - frozen_texts).abs().mean() + 10 * (images - frozen_images).abs().mean() + 0.7 * divergence


@BOTH
def test_rounds_equal_a_plain_loop(tiny_model: str, method: DeepPrompts) -> None:
    model, whole = adapt(tiny_model, method, templates=method.templates(())), load_plain(tiny_model)
    plain: Any = whole.model.requires_grad_(False)
    frozen_texts = frozen_texts_of(plain, whole.tokenize)

    def loss(state: State, examples: np.ndarray) -> Tensor:
        pixels, texts = PIXELS[examples], text_features(plain, whole.tokenize, state, CLASSES)
        images = image_features(plain, state, pixels)
        found = F.cross_entropy(plain.logit_scale.exp() * images @ texts.T, LABELS[examples])
        return found + regulation(plain, frozen_texts, texts, images, pixels) if method is SRC else found

    first, last = assert_equal_to_a_plain_loop(model, loss)
    for name, tensor in first.items():
        assert (last[name] - tensor).abs().max() > 1e-6, f"{name} has not been trained"


ALL_OFF = SpeedOptions(
    cut_prompts=False, share_prefixes=False, trim_last_block=False, batch_classes=False, share_first_step=False
)


@pytest.mark.parametrize("speed", [ALL_ON, ALL_OFF], ids=["all on", "all off"])
@pytest.mark.parametrize("depth", [1, 3])
@BOTH
@torch.no_grad()
def test_each_clients_features_for_classes_old_and_new(
    method: DeepPrompts, depth: int, speed: SpeedOptions, tmp_path: Path
) -> None:
    """In towers of three blocks of other widths, with the adapter of a run on other classes' prompts."""
    path = write_model(tmp_path / "model.json", text={"layers": 3, "width": 16}, vision={"layers": 3})
    method = type(method)(num_tokens=2, depth=depth)
    model, whole = adapt(path, method, templates=method.templates(()), speed=speed), load_plain(path)
    new = AdaptedClip(
        model.clip, model.adapter, class_names=("dog", "police car"), templates=model.templates, speed=speed
    )
    stack, stem = random_adapters(model, 2), model.vision.stem(PIXELS[:6])
    model.release_stems()
    for each in (model, new):
        with model.adapter.bind(stack):
            images, texts = each.image_features(stem, 2), each.class_features(2)
        for client in range(2):
            own = {name: tensor[client] for name, tensor in stack.items()}
            expected = text_features(whole.model, whole.tokenize, own, each.class_names)
            torch.testing.assert_close(texts[client], expected, atol=TOLERANCE, rtol=0)
            expected = image_features(whole.model, own, PIXELS[3 * client : 3 * client + 3])
            torch.testing.assert_close(images[client], expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_frozen_texts_are_means_over_their_own_templates(tiny_model: str) -> None:
    model, whole = adapt(tiny_model, SRC, templates=SRC.templates(())), load_plain(tiny_model)
    found = model.frozen_class_features()
    torch.testing.assert_close(found, frozen_texts_of(whole.model, whole.tokenize), atol=TOLERANCE, rtol=0)
    assert (found - model.class_features(1)[0]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {},
            {"context": (2, 32), "deep_context": (1, 2, 32), "coupling.weight": (2, 32, 32), "coupling.bias": (2, 32)},
        ),
        ({"depth": 1}, {"context": (2, 32), "coupling.weight": (1, 32, 32), "coupling.bias": (1, 32)}),
    ],
)
def test_what_maple_starts_from(tiny_model: str, options: dict[str, Any], expected: dict[str, Any]) -> None:
    model = adapt(tiny_model, Maple(**options))
    state: State = model.initial_adapter(Rng(0))
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    words = load_plain(tiny_model).tokenize(["a photo"])[0, 1:3]
    assert torch.equal(state["context"], model.clip.text.token_embedding(words).detach())


def test_three_quarters_of_the_shallower_tower_by_default(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.json", text={"layers": 5}, vision={"layers": 4})
    assert Maple().depth_in(adapt(path).clip.architecture) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Maple(words="a photo", num_tokens=3),
            r"num_tokens: expected at most 2, the words of 'a photo', got 3",
        ),
        (lambda: Maple(words="a {} of"), r"words: expected words without braces, or none, got 'a \{\} of'"),
        (lambda: PromptSrc(frozen_templates=("a photo",)), r"frozen_templates: expected templates with one \{\}"),
        (lambda: PromptSrc(frozen_templates=()), r"frozen_templates: expected templates with .*, got none"),
    ],
)
def test_options_that_contradict_each_other(make: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


@BOTH
def test_there_are_no_more_blocks_than_the_towers_have(tiny_model: str, method: DeepPrompts) -> None:
    with pytest.raises(OptionError, match=r"depth: expected at most 2, the blocks of the shallower tower of .*, got 3"):
        type(method)(depth=3).check_fits(adapt(tiny_model).clip.architecture)


def test_a_mean_over_rounds_is_resumed_exactly(raw_config: dict[str, Any]) -> None:
    raw = raw_config | {
        "adapter": {"name": "prompt_src", "num_tokens": 2, "depth": 1},
        "server": {"optimizer": {"name": "gaussian_average", "mean": 2, "std": 1.5, "momentum": 0.3}},
        "local": {"steps": 1, "learning_rate": 0.01},
        "clients": {"number": 4, "holdout_fraction": 0.0},
        "data": "patterns",
    }
    whole = simulate(parse_config(raw | {"rounds": 4, "name": "whole"})).directory
    parts = simulate(parse_config(raw | {"rounds": 2})).directory
    resume(parts, ["rounds=4"])
    found, expected = comparable(parts), comparable(whole)
    for name in ("rounds.jsonl", "adapter.safetensors", "checkpoints/round-0004/server.safetensors"):
        assert found[name] == expected[name], name
