"""Learned tokens of images, against OpenCLIP's vision tower with these tokens put in by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LOCAL, TOLERANCE, adapt, assert_states_close, load_plain, random_pixels, run
from torch import Tensor

from flora.clip.adapters.visual_prompts import VisualPrompt
from flora.core.registry import OptionError
from flora.core.rng import Rng


def by_hand(visual: Any, pixels: Tensor, prompts: Tensor) -> Tensor:
    """Unit features of images with `prompts` `(depth, P, width)` between the class token and the image's own."""
    x = visual._embeds(pixels)
    for number, block in enumerate(visual.transformer.resblocks):
        if number < len(prompts):
            tokens = prompts[number] if number else visual.ln_pre(prompts[0])
            rest = x[:, 1:] if number == 0 else x[:, 1 + len(tokens) :]
            x = torch.cat([x[:, :1], tokens.expand(len(x), -1, -1), rest], dim=1)
        x = block(x)
    return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_features_equal_a_tower_with_the_tokens_put_in(tiny_model: str, depth: int) -> None:
    model, visual = adapt(tiny_model, VisualPrompt(num_tokens=3, depth=depth)), load_plain(tiny_model).model.visual
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(2, depth, 3, 32, generator=generator, dtype=torch.float64)
    pixels = random_pixels(6)
    stem = model.vision.stem(pixels)
    model.release_stems()
    with model.adapter.bind({"visual.prompt": prompts}):
        found = model.image_features(stem, 2)
    for client in range(2):
        expected = by_hand(visual, pixels[3 * client : 3 * client + 3], prompts[client])
        torch.testing.assert_close(found[client], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_number_of_clients_per_block_changes_nothing(tiny_model: str, depth: int) -> None:
    model = adapt(tiny_model, VisualPrompt(num_tokens=2, depth=depth))
    local = dataclasses.replace(LOCAL, learning_rate=0.05)
    alone, two, together = (run(model, local, per_block=number).adapter for number in (1, 2, 5))
    assert_states_close(alone, together)
    assert_states_close(alone, two)
    before = model.initial_adapter(Rng(0))["visual.prompt"]
    assert before.shape == (depth, 2, 32) and (alone["visual.prompt"] - before).abs().max() > 1e-4


def test_there_are_no_more_blocks_than_the_tower_has(tiny_model: str) -> None:
    with pytest.raises(OptionError, match=r"depth: expected at most 2, the blocks of .*, got 3"):
        VisualPrompt(depth=3).check_fits(adapt(tiny_model).clip.architecture)
