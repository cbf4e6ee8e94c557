"""Files of low-rank adapters: the one that a run writes, and those of the library PEFT, which is not imported."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from flora.clip.adapters.lora import Lora
from flora.clip.huggingface import MODULES, TOWERS, as_json, module_name
from flora.core.errors import UserError
from flora.core.files import open_regular, read_text
from flora.core.tree import State, StateLike, is_finite, state_digest

ADAPTER_FORMAT = "flora-adapter-1"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
# What of PEFT's LoRA has no place in ours, and the value that says that it isn't used.
_PEFT_PLAIN = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
}


@dataclass(frozen=True, eq=False)
class LowRankFile:
    """The tensors `T.i.t.lora_A` and `T.i.t.lora_B` of an adapter, and the factor before B A."""

    tensors: State
    factor: float


def read_adapter(path: Path) -> tuple[State, dict[str, Any]]:
    """The tensors of an `adapter.safetensors`, verified, and what it says that they belong to.

    Raises `UserError` if it is missing, damaged, something else, or not finite.
    """
    tensors, metadata = _read_tensors(path)
    try:
        description = json.loads(metadata.get("flora", "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())}") from None
    if not isinstance(description, dict) or description.get("format") != ADAPTER_FORMAT:
        raise UserError(f"{path}: not an adapter of this program (format {ADAPTER_FORMAT})")
    if state_digest(tensors) != description.get("sha256"):
        raise UserError(f"{path}: its numbers are not those that the run wrote (SHA-256)")
    if not is_finite(tensors):
        raise UserError(f"{path}: its numbers are not finite: the run has diverged")
    return tensors, description


def read_low_rank(path: Path) -> LowRankFile:
    """The low-rank adapter in a folder of PEFT's, in a run's folder, or in its `adapter.safetensors`.

    Raises `UserError` if there is none, it is damaged, or has parts that are no low-rank factors.
    """
    if (path / PEFT_CONFIG).exists():
        return _read_peft(path)
    file = path / "adapter.safetensors" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise UserError(f"{path}: it has neither {PEFT_CONFIG} nor adapter.safetensors")
    tensors, description = read_adapter(file)
    strange = [name for name in tensors if not re.fullmatch(r"(text|vision)\.\d+\.\w+\.lora_[AB]", name)]
    if strange:
        raise UserError(f"{file}: {strange[0]} is no low-rank factor of LoRA that travels")
    try:
        own = description["adapter"]
        return LowRankFile(tensors, Lora(rank=own["rank"], alpha=own["alpha"], scaling=own["scaling"]).factor)
    except Exception:  # whatever is wrong with what the file says of itself
        raise UserError(f"{file}: it doesn't say what its factors are multiplied by") from None


def peft_files(tensors: StateLike, options: Lora) -> dict[str, bytes]:
    """The files of a PEFT adapter for `CLIPModel` of transformers, by name.

    `tensors` are named as in `AttachedLora`, `lora_A` `(r, d_in)` and `lora_B` `(d_out, r)`. Raises `UserError` for
    residuals, and for ranks that differ.
    """
    residual = [name for name, tensor in tensors.items() if ".residual_" in name and tensor.numel()]
    if residual:
        raise UserError(
            "the server keeps a residual beside the factors, for which PEFT's LoRA has no place; --to huggingface or "
            "openclip merges it"
        )
    factors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] in ("lora_A", "lora_B")}
    ranks = {tensor.shape[0] for name, tensor in factors.items() if name.endswith("lora_A")}
    rank = ranks.pop()
    named: State = {}
    for name, tensor in factors.items():
        tower, block, target, factor = name.split(".")
        named[f"{_PEFT_PREFIX}{module_name(tower, int(block), target)}.{factor}.weight"] = tensor.contiguous()
    modules = sorted({name.removeprefix(_PEFT_PREFIX).rpartition(".lora_")[0] for name in named})
    is_root = options.scaling == "alpha/sqrt(r)" and rank == options.rank
    is_plain = options.scaling == "alpha/r" and rank == options.rank
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": options.alpha if is_root or is_plain else options.factor * rank,
        "use_rslora": is_root,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "inference_mode": True,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    # PEFT reads "format": other libraries write it, too.
    weights = safetensors.torch.save(named, metadata={"format": "pt"})
    return {PEFT_CONFIG: as_json(config), PEFT_WEIGHTS: weights}


def _read_peft(folder: Path) -> LowRankFile:
    config = _read_peft_config(folder / PEFT_CONFIG)
    tensors: State = {}
    towers = {module: tower for tower, module in TOWERS.items()}
    targets = {module: target for target, module in MODULES.items()}
    path = folder / PEFT_WEIGHTS
    for name, tensor in _read_tensors(path)[0].items():
        match = re.fullmatch(
            r"(?:base_model\.model\.)?(text_model|vision_model)(?:\.\w+_model)?\.encoder\.layers\.(\d+)"
            r"\.(\w+\.\w+)\.(lora_[AB])\.weight",
            name,
        )
        if match is None or match[3] not in targets:
            raise UserError(f"{path}: {name} is no factor of a layer of CLIPModel that is adapted here")
        tensors[f"{towers[match[1]]}.{int(match[2])}.{targets[match[3]]}.{match[4]}"] = tensor
    if not is_finite(tensors):
        raise UserError(f"{path}: its numbers are not finite")
    rank = config["r"]
    return LowRankFile(tensors, config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _read_peft_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(read_text(path))
        numbers = [config[key] for key in ("r", "lora_alpha")]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError, KeyError, TypeError):
        raise UserError(f"{path}: not the configuration of a PEFT LoRA adapter") from None
    if config.get("peft_type") != "LORA" or not all(type(each) in (int, float) and each > 0 for each in numbers):
        raise UserError(f"{path}: not the configuration of a PEFT LoRA adapter (peft_type {config.get('peft_type')!r})")
    for key, plain in _PEFT_PLAIN.items():
        if config.get(key, plain) not in (plain, None):
            raise UserError(f"{path}: {key} is {config[key]!r}, which plain low-rank factors don't have")
    return dict(config)


def _read_tensors(path: Path) -> tuple[State, Mapping[str, str]]:
    """A safetensors file's tensors and metadata. Raises `UserError` if it can't be read."""
    try:
        open_regular(path).close()
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())}") from None
