"""Bottlenecks beside the upper blocks of both towers, against one client at a time on plain OpenCLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ALL_ON,
    LABELS,
    PIXELS,
    TEXTS,
    TOLERANCE,
    adapt,
    assert_equal_to_a_plain_loop,
    load_plain,
    random_adapters,
    write_model,
)
from torch import Tensor

from flora.clip.adapters.multimodal import PFedMma
from flora.clip.towers.speed import SpeedOptions
from flora.clip.towers.towers import AdaptedClip
from flora.core import tree
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.tree import State, StateLike

METHOD = PFedMma(rank=3, depth=1, scale=0.2)


def through(blocks: Any, x: Tensor, tower: str, state: StateLike, scale: float, mask: Tensor | None = None) -> Tensor:
    """A tower's blocks, with a bottleneck beside each of the last ones."""
    depth = len(state["shared.bias"])
    for number, block in enumerate(blocks):
        given = x
        x = block(x, attn_mask=mask)
        place = number - (len(blocks) - depth)
        if place >= 0:
            y = block.ln_1(given)
            for layer in (f"{tower}.down", "shared"):
                y = F.relu(F.linear(y, state[f"{layer}.weight"][place], state[f"{layer}.bias"][place]))
            x = x + scale * F.linear(y, state[f"{tower}.up.weight"][place], state[f"{tower}.up.bias"][place])
    return x


def text_features(plain: Any, tokens: Tensor, state: StateLike, scale: float) -> Tensor:
    x = plain.token_embedding(tokens) + plain.positional_embedding
    x = plain.ln_final(through(plain.transformer.resblocks, x, "text", state, scale, plain.attn_mask))
    return F.normalize(x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ plain.text_projection, dim=-1)


def image_features(plain: Any, pixels: Tensor, state: StateLike, scale: float) -> Tensor:
    visual = plain.visual
    x = through(visual.transformer.resblocks, visual._embeds(pixels), "vision", state, scale)
    return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)


def test_rounds_equal_a_plain_loop(tiny_model: str) -> None:
    """The middle is averaged; what is before and behind it stays, and never travels."""
    model, whole = adapt(tiny_model, METHOD), load_plain(tiny_model)
    plain: Any = whole.model.requires_grad_(False)
    tokens = whole.tokenize(TEXTS)

    def loss(state: State, examples: np.ndarray) -> Tensor:
        texts = text_features(plain, tokens, state, METHOD.scale)
        images = image_features(plain, PIXELS[examples], state, METHOD.scale)
        return F.cross_entropy(plain.logit_scale.exp() * images @ texts.T, LABELS[examples])

    first, last = assert_equal_to_a_plain_loop(
        model, loss, learning_rate=0.01, stays=lambda name: not name.startswith("shared.")
    )
    for name, tensor in last.items():
        assert (tensor - first[name]).abs().max() > 1e-6, f"{name} has not been trained"


UNTRIMMED = SpeedOptions(cut_prompts=False, share_prefixes=False, trim_last_block=False, batch_classes=False)


@pytest.mark.parametrize("speed", [ALL_ON, UNTRIMMED], ids=["all on", "untrimmed"])
@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_blocks_are_paired_from_the_top_for_classes_old_and_new(
    depth: int, speed: SpeedOptions, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model.json", text={"layers": 2, "width": 16}, vision={"layers": 3})
    model, whole = adapt(path, PFedMma(rank=3, depth=depth, scale=0.5), speed=speed), load_plain(path)
    new = AdaptedClip(
        model.clip, model.adapter, class_names=("dog", "police car"), templates=model.templates, speed=speed
    )
    stack, stem = random_adapters(model, 2), model.vision.stem(PIXELS[:6])
    model.release_stems()
    for each in (model, new):
        with model.adapter.bind(stack):
            images, texts = each.image_features(stem, 2), each.class_features(2)
        tokens = whole.tokenize([f"a photo of a {name}." for name in each.class_names])
        for client in range(2):
            own = {name: tensor[client] for name, tensor in stack.items()}
            expected = text_features(whole.model, tokens, own, 0.5)
            torch.testing.assert_close(texts[client], expected, atol=TOLERANCE, rtol=0)
            expected = image_features(whole.model, PIXELS[3 * client : 3 * client + 3], own, 0.5)
            torch.testing.assert_close(images[client], expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_a_bottleneck_without_an_upper_layer_changes_nothing(tiny_model: str) -> None:
    model = adapt(tiny_model, METHOD)
    stack = tree.expand(model.initial_adapter(Rng(0)), 1)
    stem, frozen = model.vision.stem(PIXELS[:4]), model.class_features(1)
    with model.adapter.bind(stack):
        assert (model.class_features(1) - frozen).abs().max() > 1e-6
    zero = {name: torch.zeros_like(tensor) if ".up." in name else tensor for name, tensor in stack.items()}
    images = model.image_features(stem, 1)
    with model.adapter.bind(zero):
        assert torch.equal(model.class_features(1), frozen)
        assert torch.equal(model.image_features(stem, 1), images)


def test_what_it_starts_from(tiny_model: str) -> None:
    """Normal numbers of variance 2 / d_out, zero biases, in two thirds of two blocks: both."""
    state = adapt(tiny_model, PFedMma(rank=20)).initial_adapter(Rng(0))
    shapes = {"text.down": (2, 20, 32), "text.up": (2, 32, 20), "vision.down": (2, 20, 32), "vision.up": (2, 32, 20)}
    for layer, shape in {"shared": (2, 20, 20), **shapes}.items():
        weight, bias = state.pop(f"{layer}.weight"), state.pop(f"{layer}.bias")
        assert weight.shape == shape and bias.shape == shape[:2] and not bias.any()
        assert weight.var().item() == pytest.approx(2 / shape[1], rel=0.2)
    assert not state


def test_there_are_no_more_blocks_than_the_towers_have(tiny_model: str) -> None:
    with pytest.raises(OptionError, match=r"depth: expected at most 2, the blocks of the shallower tower of .*, got 3"):
        PFedMma(depth=3).check_fits(adapt(tiny_model).clip.architecture)
