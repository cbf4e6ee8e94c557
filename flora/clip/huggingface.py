"""An OpenCLIP model as the library transformers has it: names, settings and files of its `CLIPModel`.

Nothing of transformers is imported. What its `CLIPModel` can't express is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flora.core.errors import UserError
from flora.core.tree import State, StateLike

MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "fc": "mlp.fc1",
    "proj": "mlp.fc2",
}
"""Which module of a block of transformers each target of an adapter is."""
TOWERS = {"text": "text_model", "vision": "vision_model"}
# A block's other parts: OpenCLIP's name, and that of transformers.
_OF_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": MODULES["out"]}
_OF_BLOCK |= {"mlp.c_fc": MODULES["fc"], "mlp.c_proj": MODULES["proj"]}
_OTHERS = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
# Pillow's numbers of interpolations.
_RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}
START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407


def module_name(tower: str, block: int, target: str) -> str:
    """The name in `CLIPModel` of the module that an adapter's target is: "text_model.encoder.layers.0.mlp.fc1"."""
    return f"{TOWERS[tower]}.encoder.layers.{block}.{MODULES[target]}"


def clip_config(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `config.json`. Raises `UserError` for what `CLIPModel` can't express."""
    _refuse(model_cfg)
    text, vision = model_cfg["text_cfg"], model_cfg["vision_cfg"]
    width, text_width = vision.get("width", 768), text.get("width", 512)
    shared = {
        "hidden_act": "quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "projection_dim": model_cfg["embed_dim"],
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model_cfg["embed_dim"],
        "text_config": {
            **shared,
            "model_type": "clip_text_model",
            "hidden_size": text_width,
            "intermediate_size": int(text_width * text.get("mlp_ratio", 4.0)),
            "num_attention_heads": text.get("heads", 8),
            "num_hidden_layers": text.get("layers", 12),
            "max_position_embeddings": text.get("context_length", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "bos_token_id": START_ID,
            "eos_token_id": END_ID,
            "pad_token_id": END_ID,
        },
        "vision_config": {
            **shared,
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_attention_heads": width // vision.get("head_width", 64),
            "num_hidden_layers": vision.get("layers", 12),
            "image_size": _side("vision_cfg.image_size", vision.get("image_size", 224)),
            "patch_size": _side("vision_cfg.patch_size", vision.get("patch_size", 16)),
            "num_channels": 3,
        },
    }


def clip_weights(state: StateLike) -> State:
    """The weights of OpenCLIP under the names of `CLIPModel`; q, k and v, which OpenCLIP packs, are three matrices."""
    return dict(_renamed(state))


def _renamed(state: StateLike) -> Iterator[tuple[str, Tensor]]:
    for full, tensor in state.items():
        name = full.removeprefix("text.")
        tower = "vision_model" if name.startswith("visual.") else "text_model"
        part = name.removeprefix("visual.")
        if part.startswith("transformer.resblocks."):
            _, _, block, rest = part.split(".", 3)
            yield from _of_block(f"{tower}.encoder.layers.{block}", rest, tensor)
        elif name in _TRANSPOSED:
            yield _TRANSPOSED[name], tensor.T.contiguous()
        elif name in _OTHERS:
            yield _OTHERS[name], tensor.reshape(()) if name == "logit_scale" else tensor
        else:
            raise UserError(f"the model has weights {full!r}, for which CLIPModel of transformers has no place")


def _of_block(layer: str, rest: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        for target, third in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{layer}.{MODULES[target]}.{kind}", third.contiguous()
        return
    module, _, kind = rest.rpartition(".")
    if module not in _OF_BLOCK:
        raise UserError(f"the model's blocks have weights {rest!r}, for which CLIPModel of transformers has no place")
    yield f"{layer}.{_OF_BLOCK[module]}.{kind}", tensor


def image_processor(preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `preprocessor_config.json`. Raises `UserError` for resizing that transformers doesn't know."""
    mode, interpolation = preprocess_cfg.get("resize_mode", "shortest"), preprocess_cfg.get("interpolation", "bicubic")
    side = _side("preprocess_cfg.size", preprocess_cfg["size"])
    if mode not in ("shortest", "squash") or interpolation not in _RESAMPLE:
        raise UserError(f"CLIPImageProcessor of transformers can't resize by {mode!r} and {interpolation!r}")
    square = {"height": side, "width": side}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if mode == "shortest" else square,
        "resample": _RESAMPLE[interpolation],
        "do_center_crop": mode == "shortest",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess_cfg["mean"]),
        "image_std": list(preprocess_cfg["std"]),
    }


def tokenizer_files(vocabulary: Mapping[str, int], merges: list[str], context_length: int) -> dict[str, bytes]:
    """The files of a `CLIPTokenizer` with OpenCLIP's `vocabulary` and `merges`, by name."""
    named = {"<start_of_text>": START, "<end_of_text>": END}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    }
    return {
        "vocab.json": as_json({named.get(token, token): number for token, number in vocabulary.items()}, None),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "tokenizer_config.json": as_json(settings),
    }


def as_json(content: Any, indent: int | None = 2) -> bytes:
    """A JSON file's content."""
    return (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode()


def _refuse(model_cfg: Mapping[str, Any]) -> None:
    text, vision = model_cfg["text_cfg"], model_cfg["vision_cfg"]
    refused = {
        "a logit bias": model_cfg.get("init_logit_bias") is not None,
        "layers whose outputs are scaled (ls_init_value)": any(each.get("ls_init_value") for each in (text, vision)),
        "activations or norms with settings of their own": any(
            each.get(key) for each in (text, vision) for key in ("act_kwargs", "norm_kwargs")
        ),
        "a vision tower without a norm before its blocks": vision.get("no_ln_pre", False),
        "fixed positions in the vision tower": vision.get("pos_embed_type", "learnable") != "learnable",
        "a vision tower that is read as the mean of its patches": vision.get("pool_type", "tok") != "tok",
        "a text tower that is not causal": text.get("no_causal_mask", False),
        "a text tower that is not read at the end of the text": text.get("pool_type", "argmax")
        not in ("argmax", "eos"),
        "a text projection with a bias, or none": text.get("proj_bias", False)
        or text.get("proj_type", "linear") != "linear",
    }
    for what, is_so in refused.items():
        if is_so:
            raise UserError(f"the model has {what}, which CLIPModel of transformers can't express")


def _side(name: str, value: Any) -> int:
    """The side of a square, given as one number or two equal ones."""
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise UserError(f"{name}: CLIPModel of transformers needs a square, got {value}")
    return int(sides.pop())


def in_type(weights: StateLike, dtype: torch.dtype) -> State:
    """Weights as a file has them: in one type, contiguous."""
    return {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
