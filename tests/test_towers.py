"""Cutting a tower, trimming prompts and averaging templates change nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, TOLERANCE, adapt, load_clip, load_plain, random_pixels, write_model

from flora.clip.adapters.lora import Lora
from flora.clip.layers import Gelu
from flora.clip.towers.text import TextTower
from flora.clip.towers.vision import VisionTower
from flora.core.errors import UserError

TEMPLATES = ("a photo of a {}.", "{}", "an astonishingly detailed painting of the {}, by a child.")


@pytest.mark.parametrize("cut", range(5))
@torch.no_grad()
def test_every_cut_of_both_towers_gives_openclips_features(tiny_model: str, cut: int) -> None:
    clip, plain = load_clip(tiny_model), load_plain(tiny_model).model
    vision, text = VisionTower(clip, cut), TextTower(clip, cut)
    pixels = random_pixels(5)
    expected = plain.encode_image(pixels)  # type: ignore[operator]
    torch.testing.assert_close(vision.suffix(vision.stem(pixels)), expected, atol=TOLERANCE, rtol=0)
    prompts = text.prompts(CLASSES, TEMPLATES[:1])
    tokens = clip.tokenize([TEMPLATES[0].format(name) for name in CLASSES])
    expected = plain.encode_text(tokens)  # type: ignore[operator]
    torch.testing.assert_close(text.suffix(text.stem(prompts), prompts.layout), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("text", "is_cut"),
    [
        ({}, True),
        ({"pool_type": "eos", "eos_id": 49407}, True),
        ({"pool_type": "last"}, False),
        ({"pool_type": "first"}, False),
        ({"no_causal_mask": True}, False),
        ({"proj_bias": True}, True),
        ({"ls_init_value": 0.5}, True),
    ],
)
@pytest.mark.parametrize("custom_text", [False, True])
@torch.no_grad()
def test_prompts_are_cut_where_that_is_exact(tmp_path, text, is_cut: bool, custom_text: bool) -> None:  # type: ignore[no-untyped-def]
    if text.get("no_causal_mask") and not custom_text:
        pytest.skip("OpenCLIP's class CLIP needs a mask")
    path = write_model(tmp_path / "model.json", text=text, custom_text=custom_text)
    clip = load_clip(path)
    tower = TextTower(clip, 1)
    prompts = tower.prompts(CLASSES, TEMPLATES)
    tokens = clip.tokenize([template.format(name) for name in CLASSES for template in TEMPLATES])
    assert tower.is_cut_at_end == is_cut
    assert (prompts.tokens.numel() < 100) == is_cut
    expected = load_plain(path).model.encode_text(tokens)  # type: ignore[operator]
    torch.testing.assert_close(tower.suffix(tower.stem(prompts), prompts.layout), expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_an_ensemble_is_the_normalised_mean_of_normalised_features(tiny_model: str) -> None:
    model, plain = adapt(tiny_model, templates=TEMPLATES), load_plain(tiny_model)
    for index, name in enumerate(CLASSES):
        tokens = plain.tokenize([template.format(name) for template in TEMPLATES])
        mean = plain.model.encode_text(tokens, normalize=True).mean(dim=0)  # type: ignore[operator]
        torch.testing.assert_close(model.class_features(2)[1, index], F.normalize(mean, dim=0), atol=TOLERANCE, rtol=0)


def test_a_cpu_takes_as_many_images_at_once_as_its_caches_hold(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = load_clip(tiny_model)
    tower, pixels = VisionTower(clip, 1 + clip.architecture.vision.num_layers), random_pixels(5)
    sizes: list[int] = []
    run = tower._run
    monkeypatch.setattr(tower, "_run", lambda x, *arguments: sizes.append(len(x)) or run(x, *arguments))  # type: ignore[func-returns-value]
    whole = tower.stem(pixels)
    monkeypatch.setattr("flora.clip.towers.vision.CPU_BATCH_BYTES", 2 * tower.activation_bytes())
    torch.testing.assert_close(tower.stem(pixels), whole, atol=TOLERANCE, rtol=0)
    assert sizes == [5, 2, 2, 1]


def test_logit_scale_is_the_models(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = write_model(tmp_path / "model.json", init_logit_scale=2.0, nonscalar_logit_scale=True)
    assert adapt(path).logit_scale().item() == pytest.approx(7.389056)


def test_classes_that_no_prompt_tells_apart_are_refused(tiny_model: str) -> None:
    with pytest.raises(UserError, match="classes 'One' and 'one' have the same prompts"):
        adapt(tiny_model, class_names=("One", "two", "one"))


def test_prompts_share_nothing_where_there_is_dropout(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(dropout=0.1))
    assert len(model.prompts.tokens) == len(CLASSES)
    assert len(adapt(tiny_model).prompts.tokens) == 1


def test_prompts_that_are_cut_off_are_counted_and_the_longest_is_named(tiny_model: str) -> None:
    """The end of a text is its last token: 76 words fill the context of 77 with it, and one of them is lost."""
    long, longer = " ".join(["cat"] * 75), " ".join(["dog"] * 90)
    assert adapt(tiny_model, class_names=("one", long), templates=("{}",)).text.cut_prompts == []
    names = ("one", f"{long} cat", longer)
    (line,) = adapt(tiny_model, class_names=names, templates=("{}", "the {}")).text.cut_prompts
    assert line.startswith(
        "the model reads 77 tokens of a prompt: 4 prompts of 2 classes are cut off, the longest is of "
    )
    assert f"class {longer!r}, 93 tokens" in line


def test_a_prompt_without_anything_of_its_class_is_refused(tiny_model: str) -> None:
    """Whatever else tells the classes apart: the other template's features would be the same for all of them."""
    words = " ".join(["cat"] * 74)
    model = adapt(tiny_model, class_names=("one", "two"), templates=("{}", f"{words} {{}}"))
    assert model.text.cut_prompts == []
    cut = f"{words} cat {{}}"
    with pytest.raises(
        UserError, match=r"prompts.templates: nothing of class 'one' is left in 'cat .* reads 77 tokens"
    ):
        adapt(tiny_model, class_names=("one", "two"), templates=("{}", cut))


def test_gelu_without_gradients_has_the_same_bits_and_keeps_its_input_with_them() -> None:
    given = torch.randn(3, 5)
    expected = torch.nn.GELU()(given)
    assert torch.equal(Gelu()(given.clone()), expected)
    kept = given.clone()
    Gelu()(kept)
    assert torch.equal(kept, given)
    with torch.no_grad():
        assert torch.equal(Gelu()(kept), expected)
    assert torch.equal(kept, expected)  # it is written over
