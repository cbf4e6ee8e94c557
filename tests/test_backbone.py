"""The frozen model: which ones are accepted, what they are loaded from, and which image reaches them."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from helpers import SHARED, TINY, TOLERANCE, load_clip, random_pixels, write_model
from PIL import Image

from flora.clip import backbone
from flora.clip.backbone import Backbone
from flora.clip.frozen import Architecture, FrozenClip, TowerShape
from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.data.rgb import to_rgb
from flora.simulate import main

pytestmark = pytest.mark.usefixtures("built_anew")
CPU = torch.device("cpu")
REAL = SHARED / "weights" / "ViT-Ti-8-48.json"


def load(model: str, weights: str | None = "random", seed: int = 0) -> FrozenClip:
    return Backbone(model=model, weights=weights).load(CPU, Rng(seed))


def error_of(model: str, weights: str | None = "random", *, seen_without_loading: bool = False) -> str:
    """The message of the `UserError`, one line, that the model ends in."""
    chosen = Backbone(model=model, weights=weights)
    look = chosen.architecture if seen_without_loading else partial(chosen.load, CPU, Rng(0))
    with pytest.raises(UserError) as caught:
        look()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Architectures, from their configs alone


def test_sizes_of_real_models_without_building_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "_build", None)
    text = TowerShape(512, 2048, 12)
    assert Backbone(model="ViT-B-32").architecture() == Architecture(
        "ViT-B-32", TowerShape(768, 3072, 12), text, 512, (224, 224), 77
    )
    assert Backbone(model="ViT-B-16").architecture().vision == TowerShape(768, 3072, 12)
    large = Backbone(model="ViT-L-14-336").architecture()
    assert (large.tower("vision").width, large.image_size, large.embed_dim) == (1024, (336, 336), 768)
    big = Backbone(model="ViT-bigG-14").architecture()
    assert big.vision == TowerShape(1664, 8192, 48)


@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_openclip_model_is_accepted_or_refused_in_one_line(name: str) -> None:
    try:
        architecture = Backbone(model=name).architecture()
    except UserError as error:
        assert str(error).startswith(f"backbone.model: {name} has a")
        assert "not supported; supported are OpenCLIP's own ViT" in str(error)
    else:
        assert name.startswith("ViT-")
        assert min(architecture.vision.num_layers, architecture.text.num_layers, architecture.embed_dim) > 0


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ViT-B-16-SigLIP", "a timm vision tower"),
        ("convnext_base", "a timm vision tower"),
        ("RN50", "a ResNet vision tower"),
        ("RN50x4", "a ResNet vision tower"),
        ("roberta-ViT-B-32", "a Hugging Face text tower"),
        ("xlm-roberta-base-ViT-B-32", "a Hugging Face text tower"),
        ("ViT-H-14-worldwide", "a Hugging Face tokenizer"),
        ("coca_ViT-B-32", "an attentional pooler"),
        ("coca_base", "a class token in the text tower"),
    ],
)
def test_an_unsupported_model_is_refused_by_what_it_has(name: str, what: str) -> None:
    assert f"{name} has {what}, which is not supported" in error_of(name, seen_without_loading=True)


@pytest.mark.parametrize(
    ("variant", "what"),
    [
        ({"text": {"block_type": "custom"}}, "custom attention blocks"),
        ({"vision": {"block_type": "custom", "qk_norm": True}}, "custom attention blocks"),
        ({"text": {"scale_fc": True}}, "custom attention blocks"),
        ({"vision": {"attentional_pool": True}}, "an attentional pooler"),
        ({"text": {"embed_cls": True}}, "a class token in the text tower"),
        ({"text": {"tokenizer_kwargs": {"clean": "canonicalize"}}}, "tokenizer settings of its own"),
        ({"text": {"proj_type": "none"}}, "no text projection"),
        ({"multimodal_cfg": {}}, "a multimodal decoder (CoCa)"),
    ],
)
def test_an_unsupported_config_is_refused_by_what_it_has(tmp_path: Path, variant: dict[str, Any], what: str) -> None:
    model = write_model(tmp_path / "m.json", **variant)
    assert f"{model} has {what}, which is not supported" in error_of(model, seen_without_loading=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-23", "'ViT-B-23' is not known; did you mean 'ViT-B-32'?"),
        ("vit-b-32", "'vit-b-32' is not known; did you mean 'ViT-B-32'?"),
        ("ViT-B/32", "'ViT-B/32' is not known; did you mean 'ViT-B-32'?"),
        ("quickstrat", "'quickstrat' is not known; did you mean 'quickstart'?"),
        ("hf-hub:laion/CLIP", "'hf-hub:laion/CLIP' is a repository of a hub; fetch its open_clip_config.json and "),
        ("https://example.org/clip", "'https://example.org/clip' is a repository of a hub; fetch its "),
        ("local-dir:models/mine", "name the folder itself: models/mine"),
        ("ViT-B-32.pt", "'ViT-B-32.pt' names weights, which belong to backbone.weights; expected an OpenCLIP model "),
        ("zebra", "'zebra' is not known; the nearest of the "),
        ("m" * 5000, f"'{'m' * 5000}' is not known; "),
        ("", "'' is a folder without open_clip_config.json"),
        ("nowhere.json", "nowhere.json: No such file or directory"),
    ],
    ids=lambda value: value[:30],
)
def test_an_unknown_model_is_answered_with_the_nearest(name: str, message: str) -> None:
    assert error_of(name, seen_without_loading=True).startswith(f"backbone.model: {message}")


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("ViT-B-32", "openai", "backbone.model: the weights 'openai' were trained with another GELU; use model "),
        ("ViT-B-32", "opnai", "backbone.weights: 'opnai' is neither a file nor a tag of ViT-B-32; did you mean 'op"),
        ("ViT-B-32", None, "backbone.weights: needed: a pretrained tag, a .safetensors file or `random` (tags of "),
        ("ViT-B-32", "builtin", "backbone.weights: there are no built-in weights for model 'ViT-B-32'"),
        ("ViT-B-32", "hf-hub:laion/x", "backbone.weights: 'hf-hub:laion/x' is a repository of a hub; fetch its "),
    ],
)  # fmt: skip
def test_weights_are_checked_as_far_as_they_need_not_be_fetched(
    model: str, weights: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        json.dumps({"data": "digits", "partition": "iid", "backbone": {"model": model, "weights": weights}})
    )
    assert main(["--check", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"{path}: {message}")


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tiny_model: str, tmp_path: Path) -> None:
    """The line that is shown, run as it stands, makes a file that is read."""
    state = Backbone(tiny_model, "random").load(torch.device("cpu"), Rng(0)).model.state_dict()
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "mine.pt")
    with pytest.raises(UserError, match="pickled weights can run code") as caught:
        Backbone(tiny_model, str(tmp_path / "mine.pt")).check_weights()
    code = str(caught.value).partition("convert it: ")[2]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    read = Backbone(tiny_model, str(tmp_path / "mine.safetensors")).load(torch.device("cpu"), Rng(1)).model.state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON: Expecting value: line 1 column 1 (char 0)"),
        ('{"embed_dim": 3,', "not valid JSON: Expecting property name"),
        ("[" * 100_000, "not valid JSON: maximum recursion depth exceeded"),
        (b"\xff\xfe", "not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        ("[]", "not an OpenCLIP model config: embed_dim, vision_cfg, text_cfg missing"),
        ("null", "not an OpenCLIP model config: embed_dim, vision_cfg, text_cfg missing"),
        ('{"embed_dim": 3, "text_cfg": {}}', "not an OpenCLIP model config: vision_cfg missing"),
        ('{"embed_dim": 3, "text_cfg": {}, "vision_cfg": 4}', "vision_cfg: expected an object, got 4"),
        ('{"embed_dim": 3, "text_cfg": {}, "vision_cfg": {"wdith": 4}}', "CLIPVisionCfg.__init__() got an unexpected "),
        (json.dumps({"model_cfg": TINY, "preprocess_cfg": 3}), "preprocess_cfg: expected an object, got 3"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_broken_config_is_one_line_that_names_the_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert error_of(str(path), seen_without_loading=True).startswith(f"backbone.model: {path}: {message}")


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"embed_dim": "16"}, "embed_dim: expected a whole number above 0, got '16'"),
        ({"vision": {"width": -32}}, "vision_cfg.width: expected a whole number above 0, got -32"),
        ({"vision": {"layers": 2.5}}, "vision_cfg.layers: expected a whole number above 0, got 2.5"),
        ({"vision": {"patch_size": 0}}, "vision_cfg.patch_size: expected a whole number above 0, got 0"),
        ({"vision": {"patch_size": 17}}, "vision_cfg.patch_size: (17, 17) doesn't fit into image_size, (16, 16)"),
        ({"vision": {"image_size": "a"}}, "vision_cfg.image_size: expected a whole number above 0, got 'a'"),
        ({"vision": {"mlp_ratio": "a"}}, "vision_cfg.mlp_ratio: expected a number above 0, got 'a'"),
        ({"text": {"layers": None}}, "text_cfg.layers: expected a whole number above 0, got null"),
        ({"text": {"vocab_size": 100}}, "text_cfg.vocab_size: OpenCLIP's tokenizer needs at least 49408, got 100"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_sizes_that_make_no_model(tmp_path: Path, variant: dict[str, Any], message: str) -> None:
    model = write_model(tmp_path / "m.json", **variant)
    assert error_of(model, seen_without_loading=True) == f"backbone.model: {model}: {message}"


@pytest.mark.parametrize(
    ("variant", "what"),
    [
        ({"text": {"pool_type": "none"}}, "text pooling 'none'"),
        ({"vision": {"pool_type": "none"}}, "vision pooling 'none'"),
        ({"text": {"pool_type": "eos"}}, "end-of-text token 2"),
    ],
    ids=str,
)
def test_pooling_that_would_read_the_wrong_place_is_refused(tmp_path: Path, variant: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=f"has {what}, which is not supported"):
        Backbone(model=write_model(tmp_path / "m.json", **variant), weights="random").architecture()


def test_weights_of_another_image_size_are_not_stretched(tmp_path: Path) -> None:
    small, large = write_model(tmp_path / "s.json"), write_model(tmp_path / "l.json", vision={"image_size": 32})
    file = tmp_path / "w.safetensors"
    safetensors.torch.save_file(load_clip(small).model.state_dict(), file)
    message = r"doesn't fit the model: visual.positional_embedding is \[5, 32\], the model's \[17, 32\]"
    with pytest.raises(UserError, match=message):
        Backbone(model=large, weights=str(file)).load(torch.device("cpu"), Rng(0))


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ({"text": {"heads": 3}}, "embed_dim must be divisible by num_heads"),
        ({"foo": 1}, "unexpected keyword argument 'foo'"),
    ],
    ids=str,
)
def test_sizes_that_openclip_refuses(tmp_path: Path, variant: dict[str, Any], reason: str) -> None:
    model = write_model(tmp_path / "m.json", **variant)
    message = error_of(model)
    assert message.startswith(f"backbone.model: {model} can't be built: ")
    assert reason in message


# Weights


def test_random_weights_are_the_same_each_time_and_differ_by_seed(tiny_model: str) -> None:
    first, again, other = (load(tiny_model, seed=seed).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["visual.proj"], other["visual.proj"])


def test_loading_leaves_the_global_generator_alone(tiny_model: str) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    load(tiny_model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_loaded_model_is_frozen_and_in_evaluation_mode(tiny_model: str) -> None:
    model = load(tiny_model).model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("custom_text", [False, True])
def test_weights_survive_a_file(tmp_path: Path, custom_text: bool) -> None:
    model = write_model(tmp_path / "m.json", custom_text=custom_text)
    saved = load(model, seed=3).model.state_dict()
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(saved, path)
    loaded = load(model, str(path)).model.state_dict()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_a_folder_with_config_and_weights(tmp_path: Path, tiny_model: str) -> None:
    mean = [0.1, 0.2, 0.3]
    config = {"model_cfg": TINY, "preprocess_cfg": {"mean": mean, "std": [1, 1, 1], "unknown": 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    saved = load_clip(tiny_model).model.state_dict()
    assert "should hold one .safetensors file, found 0" in error_of(str(tmp_path), None)
    safetensors.torch.save_file(saved, tmp_path / "open_clip_model.safetensors")
    clip = load(str(tmp_path), None)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in clip.model.state_dict().items())
    black = clip.preprocess(Image.new("RGB", (40, 20)))
    assert torch.allclose(black[:, 0, 0], -torch.tensor(mean))
    shutil.copy(tmp_path / "open_clip_model.safetensors", tmp_path / "other.safetensors")
    assert "should hold one .safetensors file, found 2" in error_of(str(tmp_path), None)
    assert load(str(tmp_path), str(tmp_path / "other.safetensors")).architecture.embed_dim == 16


def test_a_folder_without_config(tmp_path: Path) -> None:
    assert error_of(str(tmp_path)).endswith("is a folder without open_clip_config.json")


def broken_weights(tiny_model: str) -> dict[str, Any]:
    state = load_clip(tiny_model).model.state_dict()
    without = {name: tensor for name, tensor in state.items() if name != "visual.proj"}
    return {
        "missing": (without, 'Missing key(s) in state_dict: "visual.proj"'),
        "extra": ({**state, "extra": torch.zeros(1)}, 'Unexpected key(s) in state_dict: "extra"'),
        "shape": ({**state, "visual.proj": torch.zeros(3, 3)}, "size mismatch for visual.proj"),
        "other": ({"lora_A": torch.zeros(3)}, "Missing key(s) in state_dict"),
        "empty": ({}, "it holds no tensors"),
    }


@pytest.mark.parametrize("case", ["missing", "extra", "shape", "other", "empty"])
def test_weights_that_do_not_fit(tmp_path: Path, tiny_model: str, case: str) -> None:
    state, message = broken_weights(tiny_model)[case]
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(state, path)
    found = error_of(tiny_model, str(path))
    assert found.startswith(f"backbone.weights: {path} doesn't fit the model: ")
    assert message in found
    assert len(found) < 500 + len(str(path))


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"not safetensors at all", b"\xff" * 1000])
def test_a_damaged_weights_file(tmp_path: Path, tiny_model: str, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    assert error_of(tiny_model, str(path)).startswith(f"backbone.weights: {path} doesn't fit the model: Error while ")


def test_pickled_weights_are_refused_unread(tmp_path: Path, tiny_model: str) -> None:
    for suffix in ("pt", "bin", "npz", "ckpt"):
        path = tmp_path / f"w.{suffix}"
        torch.save(load_clip(tiny_model).model.state_dict(), path)
        assert "only .safetensors files are read (pickled weights can run code)" in error_of(tiny_model, str(path))


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("TINY", None, "needed: a pretrained tag, a .safetensors file or `random`"),
        ("TINY", "builtin", "there are no built-in weights for model "),
        ("TINY", "nowhere.safetensors", "'nowhere.safetensors' is neither a file nor a tag of "),
        ("TINY", "Random", "'Random' is neither a file nor a tag of "),
        ("TINY", "", "'' is neither a file nor a tag of "),
        ("ViT-B-32", None, "(tags of ViT-B-32: openai, laion400m_e31, "),
        ("ViT-B-32", "laion2b_e61", "is neither a file nor a tag of ViT-B-32; did you mean 'laion2b_e16'?"),
    ],
)
def test_weights_that_are_not_there(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch, model: str, weights: str | None, message: str
) -> None:
    monkeypatch.setattr(backbone, "_build", _never)
    found = error_of(tiny_model if model == "TINY" else model, weights)
    assert found.startswith("backbone.weights: ")
    assert message in found


def _never(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("this must not be called")


@pytest.mark.parametrize(
    ("model", "tag", "other"),
    [("ViT-B-32", "openai", "ViT-B-32-quickgelu"), ("ViT-H-14-quickgelu", "laion2b_s32b_b79k", "ViT-H-14")],
)
def test_weights_of_another_gelu_are_refused_without_a_download(
    monkeypatch: pytest.MonkeyPatch, model: str, tag: str, other: str
) -> None:
    settings = {"quick_gelu": True} if tag == "openai" else {}
    monkeypatch.setattr(open_clip, "download_pretrained", _never)
    monkeypatch.setattr(open_clip, "is_pretrained_cfg", lambda *_: True)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: settings)
    monkeypatch.setattr(backbone, "_build", _never)
    expected = f"backbone.model: the weights {tag!r} were trained with another GELU; use model {other}"
    assert error_of(model, tag) == expected


def test_openclip_itself_marks_the_openai_weights_as_quickgelu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip, "download_pretrained", _never)
    assert error_of("ViT-B-32", "openai").endswith("use model ViT-B-32-quickgelu")


def test_every_model_that_such_a_message_names_exists() -> None:
    for name, tag in open_clip.list_pretrained():
        if open_clip.get_pretrained_cfg(name, tag).get("quick_gelu") and name.startswith("ViT-"):
            assert f"{name.removesuffix('-quickgelu')}-quickgelu" in open_clip.list_models()


def test_a_pretrained_tag_is_downloaded_and_brings_its_preprocessing(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = load_clip(tiny_model).model.state_dict()
    safetensors.torch.save_file(saved, tmp_path / "w.safetensors")
    settings = {"hf_hub": "somebody/model/", "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    monkeypatch.setattr(open_clip, "is_pretrained_cfg", lambda model, tag: tag == "some_tag")
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: settings)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda _: str(tmp_path / "w.safetensors"))
    clip = load(tiny_model, "some_tag", seed=5)
    assert torch.equal(clip.model.state_dict()["visual.proj"], saved["visual.proj"])
    assert clip.preprocess(Image.new("RGB", (9, 9))).unique().tolist() == [-2.0]


@pytest.mark.parametrize("error", [OSError("no\nnetwork"), RuntimeError("404"), ValueError("x" * 1000)])
def test_a_failed_download_is_one_line(tiny_model: str, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(_: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(open_clip, "is_pretrained_cfg", lambda *_: True)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"hf_hub": "a/b/"})
    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    found = error_of(tiny_model, "some_tag")
    assert found.startswith(f"backbone.weights: 'some_tag' of {tiny_model} can't be downloaded: ")
    assert len(found) < 400 + len(tiny_model) and found.endswith("backbone.weights=FILE.safetensors")


# Against OpenCLIP itself


def assert_same_features(clip: FrozenClip, plain: Any, pixels: torch.Tensor, tokens: torch.Tensor) -> None:
    """The same unit features, in fp64."""
    model, plain = copy.deepcopy(clip.model).double(), copy.deepcopy(plain).double()
    pixels = pixels.double()
    with torch.no_grad():
        for encode, inputs in (("encode_image", pixels), ("encode_text", tokens)):
            ours = getattr(model, encode)(inputs, normalize=True)
            theirs = getattr(plain, encode)(inputs, normalize=True)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_the_tiny_model_computes_what_openclip_does(tiny_model: str, tmp_path: Path) -> None:
    clip = load(tiny_model)
    name = "flora-test-tiny"
    shutil.copy(tiny_model, tmp_path / f"{name}.json")
    open_clip.add_model_config(tmp_path / f"{name}.json")
    safetensors.torch.save_file(clip.model.state_dict(), tmp_path / "w.safetensors")
    plain = open_clip.create_model(name, pretrained=str(tmp_path / "w.safetensors"), require_pretrained=True).eval()
    pixels, tokens = random_pixels(3), clip.tokenize(["a cat", "a dog"])
    assert torch.equal(tokens, open_clip.get_tokenizer(name)(["a cat", "a dog"]))
    assert_same_features(clip, plain, pixels, tokens)


@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL.parent} is not on this machine")
def test_the_real_model_computes_what_openclip_does() -> None:
    weights = str(REAL.with_suffix(".safetensors"))
    clip = load(str(REAL), weights)
    open_clip.add_model_config(REAL)
    plain, _, preprocess = open_clip.create_model_and_transforms(REAL.stem, pretrained=weights, require_pretrained=True)
    plain.eval()
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((48, 48), (30, 70))]
    pixels = torch.stack([clip.preprocess(image) for image in images])
    assert torch.equal(pixels, torch.stack([preprocess(image) for image in images]))
    tokens = clip.tokenize(["a photo of a cat.", "a centered satellite photo of a forest."])
    assert_same_features(clip, plain, pixels, tokens)


# Any image becomes RGB


def test_plain_modes_become_rgb() -> None:
    assert to_rgb(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("L", (2, 2), 90)).getpixel((0, 0)) == (90, 90, 90)
    assert to_rgb(Image.new("RGB", (2, 2), (1, 2, 3))).getpixel((1, 1)) == (1, 2, 3)
    assert to_rgb(Image.new("CMYK", (2, 2), (0, 0, 0, 255))).getpixel((0, 0)) == (0, 0, 0)
    for mode in ("YCbCr", "HSV", "LAB"):
        assert to_rgb(Image.new(mode, (2, 3))).mode == "RGB"


def test_transparency_lies_over_white() -> None:
    assert to_rgb(Image.new("RGBA", (2, 2), (200, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (2, 2), (200, 0, 0, 255))).getpixel((0, 0)) == (200, 0, 0)
    assert to_rgb(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    half = to_rgb(Image.new("RGBA", (2, 2), (0, 0, 0, 128))).getpixel((0, 0))
    assert half == (127, 127, 127)


def test_a_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert [to_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (40, 50, 60)]
    image.info["transparency"] = 0
    assert [to_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


def test_a_grey_or_rgb_image_with_a_transparent_colour() -> None:
    for mode, colour in (("L", 7), ("RGB", (1, 2, 3))):
        image = Image.new(mode, (2, 1), colour)
        image.putpixel((1, 0), (90, 90, 90) if mode == "RGB" else 90)
        image.info["transparency"] = colour
        assert [to_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (90, 90, 90)]


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_an_image_of_more_than_8_bits_does_not_say_what_is_white(mode: str) -> None:
    with pytest.raises(ValueError, match=r"more than 8 bits .* set data\.value_range"):
        to_rgb(Image.new(mode, (2, 2), 5))


def test_a_rotated_photo_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as opened:
        upright = to_rgb(opened)
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (0, 0, 255)
    assert upright.getpixel((10, 35)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("mode", "size"),
    [("1", (1, 1)), ("L", (500, 3)), ("P", (16, 16)), ("RGBA", (3, 200)), ("LA", (7, 7)), ("CMYK", (9, 5))],
)
def test_any_image_fits_the_model(tiny_model: str, mode: str, size: tuple[int, int]) -> None:
    pixels = load_clip(tiny_model).preprocess(Image.new(mode, size))
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert torch.isfinite(pixels).all()


def test_an_upright_rgb_image_is_not_copied() -> None:
    image = Image.new("RGB", (4, 3))
    assert to_rgb(image) is image
