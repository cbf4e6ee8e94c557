"""Read a model's config and weights from files, without running code that is in them."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from flora.core.errors import UserError
from flora.core.files import open_regular, read_text
from flora.core.registry import show


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the model config and the preprocessing settings in a JSON file. Raises `UserError` if it is damaged."""
    try:
        content = json.loads(read_text(path))
    except OSError as error:
        raise UserError(f"backbone.model: {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"backbone.model: {path}: not valid JSON: {error}") from None
    config = content.get("model_cfg", content) if isinstance(content, dict) else {}
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise UserError(f"backbone.model: {path}: not an OpenCLIP model config: {', '.join(missing)} missing")
    preprocess = content.get("preprocess_cfg", {})
    for key, part in {**config, "preprocess_cfg": preprocess}.items():
        if key.endswith("_cfg") and not isinstance(part, dict):
            raise UserError(f"backbone.model: {path}: {key}: expected an object, got {part!r}")
    return config, preprocess


def check_sizes(name: str, config: dict[str, Any], vision: Any, text: Any) -> None:
    """Raise `UserError` where a size is not a number above 0, or sizes don't go together."""
    sizes = [("embed_dim", config["embed_dim"])]
    sizes += [(f"vision_cfg.{key}", getattr(vision, key)) for key in ("width", "layers", "head_width")]
    sizes += [(f"text_cfg.{key}", getattr(text, key)) for key in ("width", "layers", "heads", "context_length")]
    image, patch = pair(vision.image_size), pair(vision.patch_size)
    sizes += [("vision_cfg.image_size", side) for side in image] + [("vision_cfg.patch_size", side) for side in patch]
    for key, value in sizes:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"backbone.model: {name}: {key}: expected a whole number above 0, got {show(value)}")
    for key, ratio in (("vision_cfg", vision.mlp_ratio), ("text_cfg", text.mlp_ratio)):
        if not isinstance(ratio, int | float) or ratio <= 0:
            raise UserError(f"backbone.model: {name}: {key}.mlp_ratio: expected a number above 0, got {show(ratio)}")
    if len(image) != 2 or len(patch) != 2 or any(small > large for small, large in zip(patch, image, strict=True)):
        raise UserError(f"backbone.model: {name}: vision_cfg.patch_size: {patch} doesn't fit into image_size, {image}")
    if not isinstance(text.vocab_size, int) or text.vocab_size < 49408:
        raise UserError(
            f"backbone.model: {name}: text_cfg.vocab_size: OpenCLIP's tokenizer needs at least 49408, "
            f"got {text.vocab_size!r}"
        )


def pair(value: Any) -> tuple[Any, ...]:
    """Height and width of what a config gives as one number or as two."""
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def weights_in(folder: Path) -> Path:
    """The weights file of a folder, or of a copy of a hub's repository. Raises `UserError` unless it has one."""
    files = sorted(folder.glob("*.safetensors"))
    if [file.name for file in files] == ["model.safetensors", "open_clip_model.safetensors"]:
        return files[1]  # the other one holds the same weights for the libraries transformers or timm
    if len(files) != 1:
        raise UserError(
            f"backbone.model: {folder} should hold one .safetensors file, found {len(files)}; "
            "name it in backbone.weights"
        )
    return files[0]


def read_state(path: Path) -> dict[str, Any]:
    """The weights in a file by name: as they are, below "state_dict", or with the "module." of a parallel training."""
    open_regular(path).close()
    content = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not isinstance(state, dict):
        raise ValueError("it holds no tensors")
    if any(name.startswith(("text_model.", "vision_model.")) for name in state):
        raise ValueError("it was saved for the library transformers; OpenCLIP's is called open_clip_model.safetensors")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _read_pickle(path: Path) -> Any:
    """Return what `torch.save` wrote, by the unpickler of torch that makes nothing but tensors and plain containers."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UserError(
                    f"backbone.weights: {path} is a TorchScript archive, which can run code and is not read; "
                    "OpenCLIP's tags have safetensors on the Hugging Face hub: pip install huggingface_hub"
                )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError):
        raise UserError(
            f"backbone.weights: {path} is damaged, or holds more than tensors, which could run code and is not read"
        ) from None


def reason_of(error: Exception, *, after: str = "", limit: int = 300) -> str:
    """Return what a library's error says, on one line, or what it says `after` some words."""
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = reason.rpartition(after)[2] if after else reason
    return reason if len(reason) <= limit else reason[:limit] + " ..."
