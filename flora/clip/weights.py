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


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the model config and the preprocessing settings in a JSON file."""
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


def weights_in(folder: Path) -> Path:
    """The weights file of a folder, or of a copy of a hub's repository."""
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
