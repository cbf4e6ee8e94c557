"""Fewer tokens in the vision tower: what is merged or pooled, and that nothing else changes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, TOLERANCE, load_plain, random_adapters, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flora
from flora import export
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.lora import TARGETS, Lora
from flora.clip.backbone import Backbone
from flora.clip.frozen import FrozenClip
from flora.clip.towers.speed import SpeedOptions
from flora.clip.towers.text import with_classes
from flora.clip.towers.tokens import (
    AllTokens,
    Grouping,
    Merge,
    Reducer,
    TextRelevance,
    TokenReduction,
    choose,
    match,
    merge,
    pack_sizes,
    reduce_tokens,
    unpack_sizes,
)
from flora.clip.towers.towers import AdaptedClip
from flora.clip.towers.vision import VisionTower
from flora.config.listing import list_components
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.data.splits import BaseToNew
from flora.experiment.build import build_experiment
from flora.simulate import simulate

REDUCTIONS = (Merge(per_layer=3), Merge(per_layer=99), TextRelevance(keep=0.4), TextRelevance(keep=0.1, after=1))
IDLE = (Merge(per_layer=0), TextRelevance(keep=1.0))
VISION = Lora(towers=("vision",), targets=TARGETS, rank=2)
TEMPLATES = ("a photo of a {}.",)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of four blocks and 16 patches."""
    vision = {"layers": 4, "image_size": 32}
    return write_model(tmp_path_factory.mktemp("tokens") / "model.json", vision=vision)


def load(path: str, tokens: TokenReduction, precision: str = "fp64", *, reads_patches: bool = False) -> FrozenClip:
    clip = Backbone(path, "random", precision, tokens).load(torch.device("cpu"), Rng(0))
    return with_classes(replace(clip, reads_patches=reads_patches), (CLASSES[:1], CLASSES[1:]), TEMPLATES)


def adapted(
    path: str, tokens: TokenReduction, adapter: Adapter = VISION, *, trim: bool = True, reads_patches: bool = False
) -> AdaptedClip:
    clip = load(path, tokens, reads_patches=reads_patches)
    return AdaptedClip(
        clip,
        adapter.attach(clip),
        class_names=CLASSES,
        templates=TEMPLATES,
        speed=SpeedOptions(trim_last_block=trim),
    )


def images(number: int, seed: int = 1) -> Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).double()


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


# What is merged, by hand and against loops.


def test_a_matching_by_hand() -> None:
    """Patches 2, 4, 6 look among 1, 3, 5: 2 is like 3, 4 is the same as 1, 6 is like none; two pairs are merged."""
    keys = torch.tensor([[[9, 9], [1, 0], [0.1, 1], [0, 1], [2, 0], [1, 0.9], [-1, -1]]], dtype=torch.float64)
    one = match(keys, 1)
    assert one.number == 6 and one.groups.tolist() == [[0, 3, 1, 4, 3, 5, 2]]
    two = match(keys, 2)
    assert two.number == 5 and two.groups.tolist() == [[0, 2, 3, 3, 2, 4, 1]]


def slow_groups(keys: Tensor, number: int) -> list[list[int]]:
    """Each new token's old ones for one image, `keys` `(M, d)`."""

    def cosine(one: int, other: int) -> float:
        return float(torch.dot(keys[one], keys[other]) / (keys[one].norm() * keys[other].norm()))

    seekers, targets = range(2, len(keys), 2), range(1, len(keys), 2)
    best = {seeker: max(targets, key=lambda target, seeker=seeker: cosine(seeker, target)) for seeker in seekers}  # type: ignore[misc]
    ranked = sorted(seekers, key=lambda seeker: -cosine(seeker, best[seeker]))
    merged = set(ranked[:number])
    return [
        [0],
        *([seeker] for seeker in seekers if seeker not in merged),
        *([target, *(seeker for seeker in merged if best[seeker] == target)] for target in targets),
    ]


def slow_merge(x: Tensor, sizes: Tensor, groups: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The groups' means and sizes, for one image."""
    totals = torch.stack([sum((sizes[token] for token in group), torch.zeros(())) for group in groups])
    sums = [sum((sizes[token] * x[token] for token in group), torch.zeros(())) for group in groups]
    return torch.stack(sums) / totals.unsqueeze(1), totals


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 14), st.integers(1, 7), st.integers(0, 10_000))
def test_matching_and_merging_are_those_of_a_loop(num_patches: int, asked: int, seed: int) -> None:
    number = min(asked, num_patches // 2)
    generator = torch.Generator().manual_seed(seed)
    keys, x = torch.randn(2, 3, num_patches + 1, 5, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 9, (3, num_patches + 1), generator=generator).double()
    found, merged_sizes = merge(x, sizes, match(keys, number))
    assert found.shape == (3, num_patches + 1 - number, 5)
    for image in range(3):
        expected, expected_sizes = slow_merge(x[image], sizes[image], slow_groups(keys[image], number))
        close(found[image], expected)
        assert torch.equal(merged_sizes[image], expected_sizes.double())
    assert torch.equal(merged_sizes.sum(dim=1), sizes.sum(dim=1))
    assert torch.equal(found[:, 0], x[:, 0]) and torch.equal(merged_sizes[:, 0], sizes[:, 0])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10_000))
def test_an_image_is_matched_alone(number: int, seed: int) -> None:
    keys = torch.randn(9, 12, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    together = match(keys, 3).groups[:number]
    assert torch.equal(together, torch.cat([match(keys[image : image + 1], 3).groups for image in range(number)]))


def test_the_most_relevant_patches_by_hand() -> None:
    """With classes (1, 0) and (0, 1) the relevances are 1, 0.6, 0.8, 0.9...: the first and the fourth stay."""
    patches = F.normalize(torch.tensor([[[1, 0], [-0.8, 0.6], [0.8, -0.6], [0.3, 0.9]]], dtype=torch.float64), dim=-1)
    grouping = choose(patches, torch.eye(2, dtype=torch.float64), 2)
    assert grouping.number == 4 and grouping.groups.tolist() == [[0, 1, 3, 3, 2]]
    x = torch.tensor([[[5.0], [1.0], [2.0], [6.0], [3.0]]])
    pooled, sizes = merge(x, torch.tensor([[1.0, 1.0, 1.0, 3.0, 1.0]]), grouping)
    assert pooled.flatten().tolist() == [5, 1, 3, 5] and sizes.tolist() == [[1, 1, 1, 4]]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.floats(0.01, 1), st.integers(0, 10_000))
def test_as_many_patches_stay_as_asked_for(num_patches: int, keep: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(2, num_patches, 6, generator=generator, dtype=torch.float64)
    classes = F.normalize(torch.randn(3, 6, generator=generator, dtype=torch.float64), dim=-1)
    grouping = TextRelevance(keep=keep).after_block(lambda: patches, classes)
    if grouping is None:
        assert keep > (num_patches - 1) / num_patches
        return
    kept = grouping.number - 2
    assert kept >= 1 and keep * num_patches <= kept + 1e-9 and kept - 1 < keep * num_patches
    relevance = torch.stack([(F.normalize(patches, dim=-1) * each).sum(dim=-1) for each in classes]).amax(dim=0)
    for scores, groups in zip(relevance, grouping.groups[:, 1:], strict=True):
        assert scores[groups <= kept].min() >= scores[groups > kept].max()
        assert groups[groups <= kept].tolist() == list(range(1, kept + 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_patches", [4, 256, 576])
def test_sizes_behind_the_width_are_exact(dtype: torch.dtype, num_patches: int) -> None:
    sizes = torch.arange(1, num_patches + 1, dtype=torch.float32).unsqueeze(0)
    x = torch.randn(1, num_patches, 3).to(dtype)
    packed = pack_sizes(x, sizes, num_patches)
    assert packed.dtype == dtype
    assert packed.shape[-1] == 3 + (2 if dtype == torch.bfloat16 and num_patches > 256 else 1)
    tokens, found = unpack_sizes(packed, num_patches)
    assert torch.equal(tokens, x) and torch.equal(found.float(), sizes)


# The tower.


def slow_features(visual: Any, pixels: Tensor, per_layer: int) -> Tensor:
    """Plain PyTorch, one image and one head at a time, with the weights of OpenCLIP's own tower."""
    return torch.stack([_slow_image(visual, image, per_layer) for image in pixels])


def _slow_image(visual: Any, image: Tensor, per_layer: int) -> Tensor:
    x = visual._embeds(image.unsqueeze(0))[0]
    sizes = torch.ones(len(x), dtype=x.dtype)
    for block in visual.transformer.resblocks:
        heads = block.attn.num_heads
        projected = block.ln_1(x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
        q, k, v = (part.unflatten(1, (heads, -1)) for part in projected.chunk(3, dim=1))
        outputs = []
        for head in range(heads):
            logits = q[:, head] @ k[:, head].T / math.sqrt(q.shape[-1])
            # A key that stands for s tokens counts s times.
            counts = logits.exp() * sizes
            outputs.append((counts / counts.sum(dim=1, keepdim=True)) @ v[:, head])
        x = x + block.attn.out_proj(torch.cat(outputs, dim=1))
        number = min(per_layer, (len(x) - 1) // 2)
        x, sizes = slow_merge(x, sizes, slow_groups(k.detach().mean(dim=1), number))
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x)[0] @ visual.proj  # type: ignore[no-any-return]


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("per_layer", [1, 3, 99])
def test_features_and_gradients_are_those_of_a_slow_loop(model_path: str, per_layer: int, trim: bool) -> None:
    tower = VisionTower(load(model_path, Merge(per_layer)), 0, SpeedOptions(trim_last_block=trim))
    pixels, weights = images(3).requires_grad_(), torch.randn(3, 16, dtype=torch.float64)
    features = tower.suffix(pixels)
    expected = slow_features(load_plain(model_path).visual, pixels, per_layer)
    close(features, expected)
    (found,) = torch.autograd.grad((features * weights).sum(), pixels)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), pixels)
    close(found, gradient)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("tokens", IDLE)
@torch.no_grad()
def test_what_reduces_nothing_changes_no_bit(model_path: str, tokens: TokenReduction, precision: str) -> None:
    plain, idle = (VisionTower(load(model_path, each, precision), 3) for each in (AllTokens(), tokens))
    stem = plain.stem(images(4))
    assert torch.equal(idle.stem(images(4)), stem)
    assert torch.equal(idle.suffix(stem), plain.suffix(stem))
    assert idle.stem_key() == plain.stem_key()


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
@pytest.mark.parametrize("reads_patches", [False, True])
@pytest.mark.parametrize("tokens", [AllTokens(), *REDUCTIONS])
@torch.no_grad()
def test_a_cut_anywhere_changes_nothing(
    model_path: str, tokens: TokenReduction, reads_patches: bool, precision: str
) -> None:
    """In bf16, too: the same operations in the same order, and sizes that are exact."""
    clip = load(model_path, tokens, precision, reads_patches=reads_patches)
    whole = VisionTower(clip, 0).suffix(images(4).to(clip.dtype))
    for cut in range(7):
        tower = VisionTower(clip, cut)
        stem = tower.stem(images(4))
        assert tower.stem_shape() == (stem.shape[1:], stem.dtype)
        torch.testing.assert_close(tower.suffix(stem), whole, atol=TOLERANCE if precision == "fp64" else 0.05, rtol=0)


@torch.no_grad()
def test_the_stems_sizes_sum_to_the_tokens(model_path: str) -> None:
    for tokens, cut, left in ((Merge(3), 2, 14), (Merge(3), 4, 8), (TextRelevance(keep=0.4), 3, 9)):
        stem = VisionTower(load(model_path, tokens), cut).stem(images(2))
        assert stem.shape == (2, left, 33)
        assert stem[..., -1].sum(dim=1).tolist() == [17, 17]
        assert stem[:, 0, -1].tolist() == [1, 1]
    assert VisionTower(load(model_path, Merge(3)), 1).stem(images(2)).shape == (2, 17, 32)
    assert VisionTower(load(model_path, Merge(3)), 5).stem(images(2)).shape == (2, 1, 32)


@pytest.mark.parametrize("pool_type", ["tok", "avg"])
@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("tokens", REDUCTIONS)
@torch.no_grad()
def test_duplicates_become_one_without_changing_the_features(
    tmp_path: Path, tokens: TokenReduction, trim: bool, pool_type: str, norm_last: bool
) -> None:
    """Patches that are all the same, without positions, stay the same: however many stand for them."""
    vision = {"layers": 3, "image_size": 32, "pool_type": pool_type, "final_ln_after_pool": norm_last}
    path = write_model(tmp_path / "model.json", vision=vision)
    features = []
    for each in (AllTokens(), tokens):
        clip = load(path, each)
        clip.visual.positional_embedding[1:] = 0
        tower = VisionTower(clip, 2, SpeedOptions(trim_last_block=trim))
        features.append(tower.suffix(tower.stem(images(3)[:, :, :8, :8].repeat(1, 1, 4, 4))))
    close(*features)


@torch.no_grad()
def test_pairs_of_duplicates_are_found(tmp_path: Path) -> None:
    """Eight patches twice: the first block merges each with its double, and the class token doesn't notice."""
    path = write_model(tmp_path / "model.json", vision={"layers": 2, "image_size": 32})
    pixels = images(3)
    pixels = torch.cat([pixels[..., 0:8], pixels[..., 0:8], pixels[..., 8:16], pixels[..., 8:16]], dim=-1)
    features = []
    for tokens in (AllTokens(), Merge(8)):
        clip = load(path, tokens)
        clip.visual.positional_embedding[1:] = 0
        features.append(VisionTower(clip, 0).suffix(pixels))
        if tokens == Merge(8):
            sizes = VisionTower(clip, 2, SpeedOptions(trim_last_block=False)).stem(pixels)[..., -1]
            assert sizes.tolist() == [[1, *[2] * 8]] * 3
    close(*features)


# Clients.


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("tokens", REDUCTIONS)
@pytest.mark.parametrize("layers", [None, (2, 3)])
def test_clients_in_one_step_are_each_what_they_are_alone(
    model_path: str, tokens: TokenReduction, trim: bool, layers: tuple[int, ...] | None
) -> None:
    adapter = Lora(towers=("vision",), targets=TARGETS, rank=2, layers=layers)
    model = adapted(model_path, tokens, adapter, trim=trim)
    stack = {name: tensor.requires_grad_() for name, tensor in random_adapters(model, 3).items()}
    stem, weights = model.vision.stem(images(6)), torch.randn(3, 2, 16, dtype=torch.float64)
    with model.adapter.bind(stack):
        together = model.image_features(stem, 3)
    gradients = torch.autograd.grad((together * weights).sum(), list(stack.values()))
    for client in range(3):
        own = {name: tensor[client : client + 1].detach().requires_grad_() for name, tensor in stack.items()}
        with model.adapter.bind(own):
            alone = model.image_features(stem[2 * client : 2 * client + 2], 1)
        close(together[client], alone[0])
        alone_gradients = torch.autograd.grad((alone[0] * weights[client]).sum(), list(own.values()))
        for one, other in zip(gradients, alone_gradients, strict=True):
            close(one[client], other[0])
    assert all(gradient.abs().max() > 0 for gradient in gradients if gradient.numel())


@pytest.mark.parametrize("tokens", REDUCTIONS)
def test_the_gradient_is_the_slope(model_path: str, tokens: TokenReduction) -> None:
    model = adapted(model_path, tokens)
    # Small ones: with large ones the function bends too much for a difference of this step.
    stack, stem = random_adapters(model, 1, scale=0.05), model.vision.stem(images(4))
    generator = torch.Generator().manual_seed(3)
    direction = {name: torch.randn(tensor.shape, generator=generator).double() for name, tensor in stack.items()}
    weights = torch.randn(1, 4, 16, generator=generator).double()

    def value(step: float) -> Tensor:
        with model.adapter.bind({name: tensor + step * direction[name] for name, tensor in stack.items()}):
            return (model.image_features(stem, 1) * weights).sum()

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(value(step), step)  # type: ignore[arg-type]
    difference = (value(1e-5) - value(-1e-5)) / 2e-5
    torch.testing.assert_close(difference, slope, rtol=1e-5, atol=1e-5)
    assert slope.abs() > 1e-3


# Patches.


@pytest.mark.parametrize("tokens", [AllTokens(), *REDUCTIONS])
@pytest.mark.parametrize("layers", [None, (2,), (3,)])
@torch.no_grad()
def test_reading_patches_changes_nothing_in_the_class_tokens_features(
    model_path: str, tokens: TokenReduction, layers: tuple[int, ...] | None
) -> None:
    adapter = Lora(towers=("vision",), rank=2, layers=layers)
    plain, both = (adapted(model_path, tokens, adapter, reads_patches=each) for each in (False, True))
    stack = random_adapters(plain, 2)
    stems = [model.vision.stem(images(6)) for model in (plain, both)]
    with plain.adapter.bind(stack), both.adapter.bind(stack):
        close(plain.image_features(stems[0], 2), both.image_features(stems[1], 2))
        patches = both.image_and_patch_features(stems[1], 2)[1]
    left = {Merge(3): 4, Merge(99): 1, TextRelevance(0.4): 8, TextRelevance(0.1, 1): 3}.get(tokens, 16)  # type: ignore[call-overload]
    assert patches.shape == (2, 3, left, 16)
    close(patches.norm(dim=-1), torch.ones(2, 3, left, dtype=torch.float64))
    with pytest.raises(ValueError, match="reads_patches"):
        plain.image_and_patch_features(stems[0], 2)[1]


@torch.no_grad()
def test_patch_features_are_openclips(model_path: str) -> None:
    model = adapted(model_path, AllTokens(), Lora(towers=("text",), rank=2), reads_patches=True)
    stem = model.vision.stem(images(4))
    assert stem.shape == (4, 17, 16)
    visual = load_plain(model_path).visual
    visual.output_tokens = True
    pooled, tokens = visual(images(4))
    close(stem[:, 0], pooled)
    close(model.image_features(stem, 2), F.normalize(pooled, dim=-1).unflatten(0, (2, 2)))
    close(model.image_and_patch_features(stem, 2)[1], F.normalize(tokens @ visual.proj, dim=-1).unflatten(0, (2, 2)))
    model.release_stems()
    close(model.image_features(stem, 1)[0], F.normalize(pooled, dim=-1))


def test_patches_of_a_mean_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.json", vision={"pool_type": "avg"})
    with pytest.raises(UserError, match=r"^backbone.model: .*: features of patches need .* its class token$"):
        VisionTower(load(path, AllTokens(), reads_patches=True), 0)


# The cache, options, whole runs.


def test_the_key_of_the_cache_holds_the_reduction(model_path: str) -> None:
    def key(tokens: TokenReduction, *, names: tuple[str, ...] = CLASSES, reads_patches: bool = False) -> str:
        clip = Backbone(model_path, "random", "fp64", tokens).load(torch.device("cpu"), Rng(0))
        clip = with_classes(replace(clip, reads_patches=reads_patches), (names, ()), TEMPLATES)
        return json.dumps(VisionTower(clip, 6).stem_key(), sort_keys=True)

    known = [key(each) for each in (AllTokens(), Merge(1), Merge(2), TextRelevance(0.5), TextRelevance(0.5, 1))]
    known += [key(TextRelevance(0.5), names=CLASSES[:2]), key(AllTokens(), reads_patches=True)]
    assert len(set(known)) == 7
    assert key(AllTokens(), names=CLASSES[:2]) == known[0]
    assert "tokens" not in json.loads(known[0]) and "reads_patches" not in json.loads(known[0])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"name": "merge", "per_layer": -1}, "backbone.tokens.per_layer: expected a number at least 0, got -1"),
        ({"name": "text_relevance", "keep": 0.0}, "backbone.tokens.keep: expected a number above 0 and at most 1, got"),
        ({"name": "text_relevance", "after": 0}, "backbone.tokens.after: expected a number at least 1, got 0"),
        (
            {"name": "text_relevance", "after": 2},
            "backbone.tokens.after: expected at most 1, because the vision tower has 2 blocks, got 2",
        ),
        ({"name": "merge", "keep": 0.5}, "backbone.tokens.keep: "),
        ("merged", "did you mean 'merge'?"),
    ],
)
def test_wrong_options_are_one_clear_line(raw_config: dict[str, Any], tokens: Any, message: str) -> None:
    raw_config["backbone"]["tokens"] = tokens
    with pytest.raises(UserError) as caught:
        check_experiment(parse_config(raw_config))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_tower_of_one_block_has_nothing_to_save(tmp_path: Path, raw_config: dict[str, Any]) -> None:
    path = write_model(tmp_path / "model.json", vision={"layers": 1})
    raw_config["backbone"] = {"model": path, "weights": "random", "tokens": "text_relevance"}
    with pytest.raises(UserError, match=r"^backbone\.tokens\.after: .*two blocks or more"):
        check_experiment(parse_config(raw_config))
    raw_config["backbone"]["tokens"] = {"name": "text_relevance", "keep": 1.0}
    check_experiment(parse_config(raw_config))


def test_without_the_classes_nothing_is_compared(model_path: str) -> None:
    clip = Backbone(model_path, "random", "fp64", TextRelevance()).load(torch.device("cpu"), Rng(0))
    with pytest.raises(ValueError, match="with_classes"):
        VisionTower(clip, 0)


def test_the_list_shows_them() -> None:
    shown = list_components()
    for words in ("TOKENREDUCTION: Which tokens", "  merge: In each block", "  text_relevance: Behind", "tokens: none"):
        assert words in shown


@pytest.mark.parametrize("tower", ["text", "vision"])
@pytest.mark.parametrize("tokens", [{"name": "merge", "per_layer": 1}, {"name": "text_relevance", "keep": 0.5}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_and_its_cache(raw_config: dict[str, Any], tokens: dict[str, Any], tower: str, precision: str) -> None:
    raw_config["adapter"]["towers"] = [tower]
    raw_config["backbone"] |= {"tokens": tokens, "precision": precision}
    fresh, cached = (simulate(parse_config(raw_config), numbered=True) for _ in range(2))
    assert all(torch.equal(fresh.adapter[name], cached.adapter[name]) for name in fresh.adapter)
    assert "read from the cache" in (cached.directory / "log.txt").read_text()
    raw_config["backbone"]["tokens"] = "none"
    plain = simulate(parse_config(raw_config), numbered=True)
    assert "read from the cache" not in (plain.directory / "log.txt").read_text() or tower == "vision"
    assert not all(torch.equal(fresh.adapter[name], plain.adapter[name]) for name in fresh.adapter)


def test_patches_are_compared_with_new_classes_too(raw_config: dict[str, Any]) -> None:
    raw_config["backbone"] |= {"tokens": {"name": "text_relevance", "keep": 0.5}, "precision": "fp64"}
    raw_config |= {"data": {"name": "patterns", "num_classes": 5}, "split": "base_to_new"}
    config = parse_config(raw_config)
    assert isinstance(config.split, BaseToNew)
    built = build_experiment(config)
    model = built.federation.engine.model
    assert built.new is not None and model.clip.token_classes is built.new.model.clip.token_classes
    expected = [each.frozen_class_features() for each in (model, built.new.model)]
    assert model.clip.token_classes is not None
    close(model.clip.token_classes, torch.cat(expected))
    assert simulate(config).records[-1].metrics


# Exported weights.


@pytest.mark.parametrize("pool_type", ["tok", "avg"])
@pytest.mark.parametrize("tokens", [*IDLE, *REDUCTIONS])
@torch.no_grad()
def test_a_plain_openclip_model_encodes_as_the_simulator_does(
    tmp_path: Path, tokens: TokenReduction, pool_type: str
) -> None:
    path = write_model(
        tmp_path / "model.json", vision={"layers": 3, "image_size": 32, "pool_type": pool_type}, custom_text=True
    )
    model, plain = adapted(path, tokens), load_plain(path).model
    adapter = random_adapters(model, 1)
    with model.adapter.bind(adapter):
        expected = model.image_features(model.vision.stem(images(5)), 1)[0]
    one = {name: tensor[0] for name, tensor in adapter.items()}
    plain.load_state_dict(model.adapter.merged_state_dict(plain.state_dict(), one))
    names = list(plain.state_dict())
    before = plain.encode_image(images(5), normalize=True)  # type: ignore[operator]
    assert reduce_tokens(plain, tokens, model.clip.token_classes) is plain
    found = plain.encode_image(images(5), normalize=True)  # type: ignore[operator]
    close(found, expected)
    assert list(plain.state_dict()) == names
    reduce_tokens(plain, AllTokens())
    close(plain.encode_image(images(5), normalize=True), before)  # type: ignore[operator]
    assert torch.equal(found, before) == (tokens in IDLE)


def test_an_export_says_how_to_reduce(
    raw_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_config["backbone"]["tokens"] = {"name": "merge", "per_layer": 1}
    run = simulate(parse_config({**raw_config, "rounds": 1})).directory
    assert export.main([str(run), str(tmp_path / "model")]) == 0
    assert "flora.reduce_tokens(model, flora.Merge(per_layer=1))" in capsys.readouterr().out
    assert flora.reduce_tokens is reduce_tokens and flora.Merge is Merge and flora.TextRelevance is TextRelevance


def test_a_tower_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="a vision tower of class Linear has no tokens that can be reduced"):
        reduce_tokens(torch.nn.ModuleDict({"visual": torch.nn.Linear(1, 1)}), Merge(1))


def test_a_group_of_one_keeps_its_bits() -> None:
    x = torch.randn(2, 3, 5)
    grouping = Grouping(torch.tensor([[0, 1, 2], [0, 2, 1]]), 3)
    merged, _ = merge(x, torch.tensor([[1.0, 3.0, 7.0]]).expand(2, -1), grouping)
    assert torch.equal(merged[0], x[0]) and torch.equal(merged[1], x[1][[0, 2, 1]])


def test_the_blocks_before_the_first_reduction_are_the_models_own(model_path: str) -> None:
    clip = load(model_path, TextRelevance(after=3))
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    out, sizes = Reducer(clip.visual, clip.tokens, clip.token_classes).block(2, x, None)
    assert sizes is None and torch.equal(out, clip.visual.transformer.resblocks[1](x))
