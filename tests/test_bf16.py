"""bf16: the towers' products in bf16 whatever the weights are kept in, adapters and optimisers in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_adapters, random_pixels
from torch import nn

from flora.client.objectives import CrossEntropy
from flora.clip.adapters.full import FullFineTuning
from flora.clip.adapters.lora import TARGETS, Lora
from flora.clip.backbone import Backbone
from flora.clip.frozen import FrozenClip
from flora.clip.layers import LoraAttention
from flora.clip.towers.towers import AdaptedClip
from flora.config.parse import parse_config
from flora.core.rng import Rng
from flora.engine.batch import Batch
from flora.engine.gradients import FlatStack, Loss, gradient_function
from flora.export import merged_model
from flora.simulate import simulate

CLASSES = ("cat", "dog", "fire truck")
LORA = Lora(towers=("text", "vision"), targets=TARGETS)


def load(tiny_model: str, precision: str) -> FrozenClip:
    return Backbone(tiny_model, "random", precision).load(torch.device("cpu"), Rng(0))


def adapted(clip: FrozenClip) -> AdaptedClip:
    return AdaptedClip(clip, LORA.attach(clip), class_names=CLASSES, templates=("a {}", "the {}"))


def step(model: AdaptedClip) -> tuple[torch.Tensor, ...]:
    """The stem's outputs, and losses and gradients of two clients."""
    stem = model.vision.stem(random_pixels(8).float())
    adapters = {name: tensor.float() for name, tensor in random_adapters(model, 2).items()}
    flat = FlatStack(adapters, model.device)
    labels, mask = torch.tensor([[0, 1, 2, 0], [1, 1, 2, 2]]), torch.ones(2, 4, dtype=torch.bool)
    compute = gradient_function(model, Loss((("local.objective", CrossEntropy()),)), flat, None, batch_size=4)
    return stem, *compute(flat.matrix, Batch({"stem": stem, "labels": labels, "example_mask": mask}))


def test_weights_kept_in_bf16_change_no_bit(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = adapted(load(tiny_model, "bf16"))
    assert kept.clip.visual.transformer.resblocks[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert kept.clip.text.ln_final.weight.dtype == torch.float32
    monkeypatch.setattr(FrozenClip, "keep_matrices_in_bf16", lambda self: None)
    cast_at_each_call = adapted(load(tiny_model, "bf16"))
    assert cast_at_each_call.clip.visual.transformer.resblocks[0].mlp.c_fc.weight.dtype == torch.float32
    for one, other in zip(step(kept), step(cast_at_each_call), strict=True):
        assert torch.equal(one, other)
    assert all(tensor.dtype == torch.float32 for tensor in step(kept)[1:])


def test_bf16_is_fp32_but_for_rounding(tiny_model: str) -> None:
    (stem, losses, gradients), (exact_stem, exact_losses, exact_gradients) = (
        step(adapted(load(tiny_model, precision))) for precision in ("bf16", "fp32")
    )
    assert (stem.float() - exact_stem).norm() < 0.02 * exact_stem.norm()  # a number of bf16 is exact to 2**-9
    assert (losses - exact_losses).abs().max() < 0.2
    assert torch.cosine_similarity(gradients, exact_gradients).min() > 0.9


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_whose_attention_is_used(tiny_model: str, precision: str) -> None:
    """PyTorch's in the vision tower, whose bits stay; ours with bf16, where PyTorch's copies weights at every call."""
    clip = load(tiny_model, precision)
    expected = LoraAttention if precision == "bf16" else nn.MultiheadAttention
    assert all(type(block.attn) is expected for block in clip.visual.transformer.resblocks)


def test_full_fine_tuning_starts_from_the_weights_themselves(tiny_model: str) -> None:
    clip = load(tiny_model, "bf16")
    model = AdaptedClip(clip, FullFineTuning().attach(clip), class_names=CLASSES, templates=("{}",))
    fine = dict(load(tiny_model, "fp32").model.named_parameters())
    assert all(torch.equal(tensor, fine[name]) for name, tensor in model.initial_adapter(Rng(0)).items())


def test_a_run_and_its_cache(raw_config: dict[str, Any]) -> None:
    """The same bits whether features come from the cache or not; fp32's features are not taken for them."""
    raw_config["backbone"]["precision"] = "bf16"
    fresh, cached = (simulate(parse_config(raw_config), numbered=True) for _ in range(2))
    assert all(torch.equal(fresh.adapter[name], cached.adapter[name]) for name in fresh.adapter)
    assert "read from the cache" in (cached.directory / "log.txt").read_text()
    fine = simulate(
        parse_config({**raw_config, "backbone": {**raw_config["backbone"], "precision": "fp32"}}), numbered=True
    )
    assert "read from the cache" not in (fine.directory / "log.txt").read_text()
    assert all(tensor.dtype == torch.float32 for tensor in fresh.adapter.values())


def test_a_bf16_run_is_exported_with_the_weights_that_it_began_with(raw_config: dict[str, Any]) -> None:
    raw_config["backbone"]["precision"] = "bf16"
    result = simulate(parse_config(raw_config))
    model = merged_model(result.directory)
    backbone = Backbone(raw_config["backbone"]["model"], "random", "fp32")
    frozen = backbone.load(torch.device("cpu"), Rng(raw_config.get("seed", 0)).child("backbone")).model.state_dict()
    changed = {name for name, tensor in model.weights.items() if not torch.equal(tensor, frozen[name])}
    assert changed
    assert all("resblocks" in name for name in changed), changed
    assert all(tensor.dtype != torch.bfloat16 for tensor in model.weights.values())
