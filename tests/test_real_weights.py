"""Real CLIP weights: each layout in which OpenCLIP's tags are published, served by a stand-in for the hub.

OpenCLIP's own table of tags, its choice of files and its loading take part; only the download itself is replaced. What
the hub holds was not within reach. By OpenCLIP's pull request 970 all its tags are there, as safetensors (and as the
older open_clip_pytorch_model.bin); that a repository may have the .bin alone is tested too.
"""

from __future__ import annotations

import copy
import gc
import json
import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from helpers import LOOSE, TINY, TOLERANCE, random_pixels
from open_clip.transformer import QuickGELU
from PIL import Image
from torch import Tensor, nn

from flora.clip.adapters.lora import Lora
from flora.clip.backbone import Backbone
from flora.clip.frozen import FrozenClip, parameter_count
from flora.core.errors import UserError
from flora.core.rng import Rng

CPU = torch.device("cpu")
SAFE, PICKLED = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
TEXTS = ["a photo of a cat.", "a centered satellite photo of a forest."]
MODELS = {
    "tiny": TINY,
    "tiny-quickgelu": {**TINY, "quick_gelu": True},
    "tiny-custom-quickgelu": {**TINY, "quick_gelu": True, "custom_text": True},
}
State = dict[str, Tensor]


@dataclass
class Hub:
    """What stands in for the Hugging Face hub: files by repository and name, and what was asked for."""

    folder: Path
    asked: list[str] = field(default_factory=list)

    def path(self, repository: str, name: str) -> Path:
        """Where the file lies, in a folder that exists."""
        path = self.folder / repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def download(self, *, repo_id: str, filename: str, **_: Any) -> str:
        """What `huggingface_hub.hf_hub_download` does; raises where there is no such file."""
        self.asked.append(filename)
        path = self.folder / repo_id / filename
        if not path.is_file():
            raise FileNotFoundError(f"404 Client Error: Entry Not Found: {filename}")
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub, and tiny models that have the very tags of ViT-B-32 and ViT-B-32-quickgelu."""
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", hub.download)
    for name, config in MODELS.items():
        model = "ViT-B-32-quickgelu" if name.endswith("-quickgelu") else "ViT-B-32"
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, open_clip.pretrained._PRETRAINED[model])
    return hub


def repository(model: str, tag: str) -> str:
    """Where OpenCLIP's table says that a tag's files are."""
    where = open_clip.get_pretrained_cfg(model, tag)["hf_hub"]
    assert where.endswith("/")  # no file name: SAFE is asked for first, and PICKLED only without it
    return str(where).rstrip("/")


def source_model(config: dict[str, Any]) -> Any:
    """OpenCLIP's own model with random weights, twice their usual size so that the kind of GELU can be seen."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        model = open_clip.CLIP(**{key: deepcopy(value) for key, value in config.items() if key != "custom_text"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.ndim > 1 else 1)
    return model.eval()


def features(model: Any, pixels: Tensor | None = None) -> Tensor:
    """Unit features of images and texts, one below the other; of the tiny model in fp64."""
    tokens = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    if pixels is None:
        model, pixels = copy.deepcopy(model).double(), random_pixels(3)
    with torch.no_grad():
        images = model.encode_image(pixels, normalize=True)
        return torch.cat([images, model.encode_text(tokens, normalize=True)])


def load(model: str, weights: str | None) -> FrozenClip:
    return Backbone(model=model, weights=weights).load(CPU, Rng(5))


def error_of(model: str, weights: str | None) -> str:
    """The message, one line, of the `UserError` that loading ends in."""
    with pytest.raises(UserError) as caught:
        load(model, weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The layouts


def half(state: State) -> State:
    """Every tensor in fp16."""
    return {name: tensor.half() for name, tensor in state.items()}


def openai_archive(state: State) -> State:
    """As OpenAI published them: matrices and biases of layers in fp16, norms and embeddings in fp32, three scalars."""
    model = open_clip.CLIP(**deepcopy(TINY))
    model.load_state_dict(state)
    open_clip.convert_weights_to_fp16(model)
    scalars = {"input_resolution": 16, "context_length": 77, "vocab_size": 49408}
    return {**model.state_dict(), **{name: torch.tensor(value) for name, value in scalars.items()}}


def checkpoint(state: State) -> dict[str, Any]:
    """As OpenCLIP's training saves them: below "state_dict", with the prefix of distributed training."""
    modules = {f"module.{name}": tensor for name, tensor in state.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    return {"epoch": 32, "name": "a run", "state_dict": modules, "optimizer": optimizer}


def prefixed(state: State) -> State:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def scale_of_one_dimension(state: State) -> State:
    return {**state, "logit_scale": state["logit_scale"].reshape(1)}


@pytest.mark.parametrize("model", ["tiny-quickgelu", "tiny-custom-quickgelu"])
@pytest.mark.parametrize(
    ("name", "layout", "tolerance"),
    [
        (SAFE, dict, TOLERANCE),
        (SAFE, half, 2e-3),
        (SAFE, openai_archive, 2e-3),
        (SAFE, prefixed, TOLERANCE),
        (SAFE, scale_of_one_dimension, TOLERANCE),
        (PICKLED, dict, TOLERANCE),
        (PICKLED, half, 2e-3),
        (PICKLED, checkpoint, TOLERANCE),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_tag_in_each_layout_computes_what_its_source_does(
    hub: Hub, model: str, name: str, layout: Callable[[State], Any], tolerance: float
) -> None:
    source = source_model(MODELS["tiny-quickgelu"])
    path, content = hub.path(repository(model, "openai"), name), layout(source.state_dict())
    if name == SAFE:
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    clip = load(model, "openai")
    assert {tensor.dtype for tensor in clip.model.parameters()} == {torch.float32}
    torch.testing.assert_close(features(clip.model), features(source), rtol=0, atol=tolerance)
    if layout is not openai_archive:  # OpenCLIP refuses its scalars
        theirs = open_clip.create_model(model, pretrained="openai", require_pretrained=True).eval()
        torch.testing.assert_close(features(clip.model), features(theirs), rtol=0, atol=TOLERANCE)


def test_safetensors_are_fetched_where_there_are_any_and_the_pickle_only_otherwise(hub: Hub) -> None:
    place = repository("tiny", "laion2b_s34b_b79k")
    first = source_model(TINY).state_dict()
    second = {name: tensor + 0.1 for name, tensor in first.items()}
    torch.save(second, hub.path(place, PICKLED))
    assert torch.equal(load("tiny", "laion2b_s34b_b79k").model.state_dict()["visual.proj"], second["visual.proj"])
    assert hub.asked == [SAFE, PICKLED]
    hub.asked.clear()
    safetensors.torch.save_file(first, hub.path(place, SAFE))
    assert torch.equal(load("tiny", "LAION2B-s34b-b79k").model.state_dict()["visual.proj"], first["visual.proj"])
    assert hub.asked == [SAFE]


# Every tag of every supported model


def supported_tags() -> list[tuple[str, str]]:
    def is_supported(model: str) -> bool:
        try:
            Backbone(model=model).architecture()
        except UserError:
            return False
        return True

    return [(model, tag) for model, tag in open_clip.list_pretrained() if is_supported(model)]


def test_every_tag_of_a_supported_model_is_on_the_hub_and_none_is_an_archive_with_code() -> None:
    tags = supported_tags()
    assert len(tags) >= 70
    for model, tag in tags:
        assert repository(model, tag).count("/") == 1


@pytest.mark.parametrize(
    ("tag", "plain", "quick"),
    [
        ("openai", (), ("ViT-B-32", "ViT-B-16", "ViT-L-14")),
        ("metaclip_400m", (), ("ViT-B-32", "ViT-B-16", "ViT-L-14")),
        ("laion400m_e32", ("ViT-B-16", "ViT-L-14"), ("ViT-B-32",)),
        ("datacomp_xl_s13b_b90k", ("ViT-B-32", "ViT-B-16", "ViT-L-14"), ()),
        ("laion2b_s34b_b79k", ("ViT-B-32",), ()),
        ("laion2b_s34b_b88k", ("ViT-B-16",), ()),
        ("laion2b_s32b_b82k", ("ViT-L-14",), ()),
    ],
)
def test_which_model_a_tag_goes_with(hub: Hub, tag: str, plain: tuple[str, ...], quick: tuple[str, ...]) -> None:
    for model in (*plain, *(f"{name}-quickgelu" for name in quick)):
        # Found, of the right GELU, and looked for at the hub, which is empty.
        assert error_of(model, tag).startswith(f"backbone.weights: '{tag}' of {model} can't be downloaded: 404 Client")
    for model in quick:
        assert error_of(model, tag).endswith(f"were trained with another GELU; use model {model}-quickgelu")
    for model in plain:
        assert "is neither a file nor a tag of " in error_of(f"{model}-quickgelu", tag)


# QuickGELU


def gelus(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules() if "GELU" in type(module).__name__}


def test_quickgelu_is_used_where_the_model_has_it_and_makes_a_difference(hub: Hub) -> None:
    plain, quick = source_model(TINY), source_model(MODELS["tiny-quickgelu"])
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in quick.state_dict().items())
    for model, tag in (("tiny", "laion2b_s34b_b79k"), ("tiny-quickgelu", "metaclip_400m")):
        safetensors.torch.save_file(plain.state_dict(), hub.path(repository(model, tag), SAFE))
    with_gelu, with_quick = load("tiny", "laion2b_s34b_b79k").model, load("tiny-quickgelu", "metaclip_400m").model
    assert gelus(with_gelu) == {nn.GELU}
    assert gelus(with_quick) == {QuickGELU}
    torch.testing.assert_close(features(with_gelu), features(plain), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(features(with_quick), features(quick), rtol=0, atol=TOLERANCE)
    assert (features(with_gelu) - features(with_quick)).abs().max() > 1e-3


def test_a_file_made_from_the_openai_archive_is_known_by_its_scalars(hub: Hub, tmp_path: Path) -> None:
    source, path = source_model(MODELS["tiny-quickgelu"]), tmp_path / "ViT-B-32.safetensors"
    safetensors.torch.save_file(openai_archive(source.state_dict()), path)
    torch.testing.assert_close(features(load("tiny-quickgelu", str(path)).model), features(source), rtol=0, atol=2e-3)
    assert error_of("tiny", str(path)) == (
        f"backbone.model: the weights in {path} are OpenAI's, trained with another GELU; "
        "use a model with quick_gelu, such as ViT-B-32-quickgelu"
    )


# Preprocessing


@pytest.mark.parametrize(
    ("model", "tag", "expected"),
    [
        ("ViT-B-32", "openai", {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}),
        ("ViT-L-14", "laion2b_s32b_b82k", {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}),
        ("ViT-H-14", "dfn5b", {"resize_mode": "squash", "interpolation": "bicubic"}),
        ("MobileCLIP-S1", "datacompdr", {"mean": (0.0, 0.0, 0.0), "interpolation": "bilinear"}),
    ],
)
def test_the_preprocessing_of_a_tag_is_what_openclip_makes_of_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, model: str, tag: str, expected: dict[str, Any]
) -> None:
    settings = {**open_clip.get_pretrained_cfg(model, tag), "quick_gelu": False}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {tag: settings})
    safetensors.torch.save_file(source_model(TINY).state_dict(), hub.path(repository("tiny", tag), SAFE))
    clip = load("tiny", tag)
    usual = {"size": (16, 16), "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
    openai = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    got = clip.preprocess_settings
    assert {key: got[key] for key in expected} == expected
    assert {**usual, **openai, **{key: settings[key] for key in settings.keys() & got.keys()}} == got
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))
    _, _, theirs = open_clip.create_model_and_transforms("tiny", pretrained=tag, require_pretrained=True)
    assert torch.equal(clip.preprocess(image), theirs(image))


def test_a_copy_of_a_hub_repository_is_a_model(hub: Hub, tmp_path: Path) -> None:
    source, settings = source_model(MODELS["tiny-quickgelu"]), {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
    config = {
        "model_cfg": MODELS["tiny-quickgelu"],
        "preprocess_cfg": {**settings, "interpolation": "bilinear", "resize_mode": "squash", "fill_color": None},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(source.state_dict(), tmp_path / SAFE)
    safetensors.torch.save_file({"vision_model.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    clip = load(str(tmp_path), None)
    torch.testing.assert_close(features(clip.model), features(source), rtol=0, atol=TOLERANCE)
    assert clip.preprocess_settings == {
        **settings, "interpolation": "bilinear", "resize_mode": "squash", "size": (16, 16), "mode": "RGB",
        "fill_color": 0,
    }  # fmt: skip
    assert error_of(str(tmp_path), str(tmp_path / "model.safetensors")).endswith(
        "it was saved for the library transformers; OpenCLIP's is called open_clip_model.safetensors"
    )
    safetensors.torch.save_file(source.state_dict(), tmp_path / "adapted.safetensors")
    assert "should hold one .safetensors file, found 3" in error_of(str(tmp_path), None)


@pytest.mark.parametrize("settings", [{"resize_mode": "crop"}, {"interpolation": "nearest"}, {"mode": "L"}], ids=str)
def test_preprocessing_that_openclip_does_not_know(tmp_path: Path, settings: dict[str, str]) -> None:
    config = {"model_cfg": TINY, "preprocess_cfg": settings}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (key, value), *_ = settings.items()
    message = error_of(str(tmp_path), "random")
    assert message.startswith(f"backbone.model: {tmp_path}: preprocess_cfg: not known to OpenCLIP: ")
    assert f"'{key}': '{value}'" in message


# What is refused


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "this ran")


def test_a_download_that_could_run_code_is_refused_and_not_run(hub: Hub, tmp_path: Path) -> None:
    path, trace = hub.path(repository("tiny", "datacomp_xl_s13b_b90k"), PICKLED), tmp_path / "trace"
    contents: list[Callable[[], Any]] = [
        lambda: torch.save({"state_dict": source_model(TINY).state_dict(), "args": Evil(trace)}, path),
        lambda: torch.save(nn.Linear(1, 1), path),
        lambda: torch.save({"best": np.float64(3.0)}, path),  # Meta's own .pt files have such a number
        lambda: path.write_bytes(pickle.dumps(Evil(trace), protocol=2)),
        lambda: path.write_bytes(b"<!DOCTYPE html><html>not a model</html>"),
        lambda: path.write_bytes(b""),
    ]
    for write in contents:
        write()
        assert error_of("tiny", "datacomp_xl_s13b_b90k") == (
            f"backbone.weights: {path} is damaged, or holds more than tensors, which could run code and is not read"
        )
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "error::UserWarning")
def test_a_torchscript_archive_is_refused_unread(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub.path("openai", "ViT-B-32.pt")
    torch.jit.script(nn.Linear(1, 1)).save(str(path))
    # What OpenCLIP fetches without huggingface_hub, which it requires.
    monkeypatch.setattr("open_clip.pretrained._has_hf_hub", False)
    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_url", lambda url, **_: str(path))
    assert error_of("tiny-quickgelu", "openai") == (
        f"backbone.weights: {path} is a TorchScript archive, which can run code and is not read; "
        "OpenCLIP's tags have safetensors on the Hugging Face hub: pip install huggingface_hub"
    )


@pytest.mark.parametrize("name", [SAFE, PICKLED])
@pytest.mark.parametrize("layout", [dict, prefixed])
@pytest.mark.parametrize("model", ["tiny-quickgelu", "tiny-custom-quickgelu"])
def test_weights_of_another_size_are_stretched_in_no_layout(
    hub: Hub, model: str, layout: Callable[[State], State], name: str
) -> None:
    config = deepcopy(MODELS["tiny-quickgelu"])
    config["text_cfg"]["context_length"] = 32  # type: ignore[index]
    path, content = hub.path(repository(model, "openai"), name), layout(source_model(config).state_dict())
    if name == SAFE:
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    assert error_of(model, "openai").endswith("positional_embedding is [32, 32], the model's [77, 32]")


def test_the_reason_of_a_failed_download_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = (  # of huggingface_hub, without a network
        "An error happened while trying to locate the file on the Hub and we cannot find the requested files in the "
        "local cache. Please check your connection and try again or make sure your Internet connection is on."
    )

    def fail(**_: Any) -> str:
        raise RuntimeError(reason)

    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", fail)
    assert error_of("ViT-B-32-quickgelu", "openai") == (
        f"backbone.weights: 'openai' of ViT-B-32-quickgelu can't be downloaded: {reason.rstrip('.')}; weights "
        "that are on this machine: backbone.weights=FILE.safetensors"
    )


# At true size


def test_openai_weights_at_true_size_carry_the_adapter_of_the_paper(hub: Hub) -> None:
    """24,576 trained parameters, 6155 times fewer than CLIP ViT-B/32 has (arXiv:2404.15182)."""
    model, pixels = "ViT-B-32-quickgelu", torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    source = source_model(open_clip.get_model_config(model))
    expected = features(source, pixels)
    path = hub.path("timm/vit_base_patch32_clip_224.openai", SAFE)
    try:
        safetensors.torch.save_file(source.state_dict(), path)
        del source
        # The size of the real file (fp32, sha256 e6d1bd77...) in projects that pin it; the names are a part of it.
        assert path.stat().st_size == 605_143_284
        clip = load(model, "openai")
    finally:
        path.unlink(missing_ok=True)
    assert hub.asked == [SAFE]
    attached = Lora(towers=("text",), targets=("out",), rank=2, alpha=32, scaling="alpha", init="normal").attach(clip)
    state = attached.initial_state(Rng(0))
    trained = sum(tensor.numel() for tensor in state.values())
    with attached.bind({name: tensor.unsqueeze(0) for name, tensor in state.items()}):
        torch.testing.assert_close(features(clip.model, pixels), expected, rtol=0, atol=LOOSE)
    assert trained == 24_576
    assert parameter_count(clip.model) // trained == 6155
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    assert clip.preprocess_settings["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert gelus(clip.model) == {QuickGELU}
    del clip, attached
    gc.collect()
