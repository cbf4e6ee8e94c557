"""The frozen OpenCLIP model: found, checked, loaded. The only file that imports `open_clip`.

It does so where it is used: OpenCLIP and torchvision take two seconds, and configurations are read without them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from flora.clip.frozen import Architecture, FrozenClip, TowerShape, use_own_attention, use_own_gelu
from flora.clip.towers.tokens import AllTokens, TokenReduction
from flora.clip.weights import check_sizes, pair, read_config, read_state, reason_of, weights_in
from flora.core.errors import UserError
from flora.core.registry import Options, option, suggest
from flora.core.rng import Rng
from flora.data.rgb import to_rgb

if TYPE_CHECKING:
    from open_clip import SimpleTokenizer
    from open_clip.transform import PreprocessCfg

# Beside the code that runs: in the folder that holds a clone, `flora` alone would be the clone.
ASSETS = Path(__file__).parents[1] / "assets"
END_OF_TEXT = 49407  # in OpenCLIP's own tokenizer
OPENAI_SCALARS = ("input_resolution", "context_length", "vocab_size")  # beside the weights in OpenAI's own archives
EXPORT_METADATA = "flora_export"  # where a safetensors file that this program exported has its model's settings
HOW_FROM_A_HUB = (
    "fetch its open_clip_config.json and open_clip_model.safetensors into a folder, and name that in backbone.model"
)
SUPPORTED = "supported are OpenCLIP's own ViT with its own text transformer (classes CLIP and CustomTextCLIP)"


@dataclass(frozen=True)
class Backbone(Options):
    """Which OpenCLIP model all clients share."""

    model: str = option(
        "an OpenCLIP model name, the built-in `quickstart`, a JSON config, or a folder with open_clip_config.json",
        "quickstart",
    )
    weights: str | None = option(
        "a pretrained tag (downloaded by OpenCLIP), a .safetensors file, `builtin`, or `random`; "
        "none: builtin for quickstart, a folder's own for a folder. A file doesn't say which GELU and preprocessing "
        "it was trained with: one with OpenAI's weights needs a model called ...-quickgelu",
        None,
    )
    precision: str = option(
        "arithmetic of the towers: fp32; bf16, with adapters in fp32; or fp64, for all there is: slow, for proofs",
        "fp32",
        choices=("fp32", "bf16", "fp64"),
    )
    tokens: TokenReduction = option("which tokens of an image the vision tower goes on with", AllTokens())

    def architecture(self) -> Architecture:
        """The model's sizes, from its config alone. Raises `UserError` if it is unknown or not supported."""
        return _architecture(self.model, _find_config(self.model)[0])

    def load(self, device: torch.device, rng: Rng) -> FrozenClip:
        """Build the model on `device`, in evaluation mode, without gradients. `rng` draws weights that are `random`.

        Raises `UserError` if model or weights are unknown, can't be had, or don't fit each other.
        """
        import open_clip

        config, preprocess = _find_config(self.model)
        architecture = _architecture(self.model, config)
        weights_file, weights_preprocess = self._find_weights(config)
        model = _build(self.model, config, rng)
        if weights_file is not None:
            _load_weights(model, weights_file, quick_gelu=bool(config.get("quick_gelu")))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        use_own_attention(getattr(model, "text", model))
        use_own_gelu(model.visual)
        if self.precision == "bf16" or not self.tokens.is_idle:
            # PyTorch's own copies frozen weights at every call in bf16 (3 x slower on a CPU than fp32), and hides keys.
            use_own_attention(model.visual)
        model.eval().to(device)
        if self.precision == "fp64":
            model.double()
        given = {**preprocess, **weights_preprocess, "size": architecture.image_size}
        settings, transform = _preprocessing(self.model, given)
        if weights_file is not None and weights_file.suffix == ".safetensors":
            _check_exported(weights_file, config, asdict(settings))
        tokenizer = _tokenizer(architecture.context_length)
        return FrozenClip(
            model=model,
            architecture=architecture,
            preprocess=lambda image: transform(to_rgb(image)),
            preprocess_settings=asdict(settings),
            config={**config, "open_clip": open_clip.__version__},
            tokenize=lambda texts: tokenizer(list(texts)),
            num_tokens=lambda text: len(tokenizer.encode(text)) + 2,
            device=device,
            precision=self.precision,
            tokens=self.tokens,
        )

    def fetch(self) -> None:
        """Have OpenCLIP download the weights, unless they are there. Raises `UserError` as `load` does."""
        self._find_weights(_find_config(self.model)[0])

    def check_weights(self) -> None:
        """Raise `UserError` for what is wrong with the weights, as far as it shows before they are fetched or read."""
        config, _ = _find_config(self.model)
        self._find_weights(config, fetch=False)

    def _find_weights(self, config: dict[str, Any], *, fetch: bool = True) -> tuple[Path | None, dict[str, Any]]:
        """The weights file (None: random weights, or not fetched) and what a tag says about preprocessing."""
        import open_clip

        folder, builtin = Path(self.model), Path(str(ASSETS / f"{self.model}.safetensors"))
        weights = self.weights
        if weights is None and folder.is_dir():
            return weights_in(folder), {}
        if weights is None and self.model == "quickstart":
            weights = "builtin"
        if weights is None:
            tags = open_clip.list_pretrained_tags_by_model(self.model)
            known = f" (tags of {self.model}: {', '.join(tags)})" if tags else ""
            raise UserError(f"backbone.weights: needed: a pretrained tag, a .safetensors file or `random`{known}")
        if weights == "random":
            return None, {}
        if weights == "builtin":
            if not builtin.is_file():
                raise UserError(f"backbone.weights: there are no built-in weights for model {self.model!r}")
            return builtin, {}
        if open_clip.is_pretrained_cfg(self.model, weights):
            settings = _pretrained_settings(self.model, weights, config)
            return (_download(self.model, weights, settings) if fetch else None), settings
        path = Path(weights)
        if _names_a_hub(weights):
            raise UserError(f"backbone.weights: {weights!r} is a repository of a hub; {HOW_FROM_A_HUB}")
        if not path.is_file():
            known_tags = [*open_clip.list_pretrained_tags_by_model(self.model), "random", "builtin"]
            raise UserError(
                f"backbone.weights: {weights!r} is neither a file nor a tag of {self.model}; "
                f"{suggest(weights, known_tags)}"
            )
        if path.suffix != ".safetensors":
            mended = path.with_suffix(".safetensors").name
            raise UserError(
                f"backbone.weights: {path}: only .safetensors files are read (pickled weights can run code); convert "
                "it: import torch, safetensors.torch; "
                f"state = torch.load({path.name!r}, weights_only=True); "
                f"safetensors.torch.save_file(state.get('state_dict', state), {mended!r})"
            )
        return path, {}


def _names_a_hub(name: str) -> bool:
    """Whether `hf-hub:owner/name`, `https://...` or the like stands where a name or a path is expected."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+-]*:(?!\\)", name)) and not Path(name).exists()


def _find_config(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model config and preprocessing settings that `name` leads to."""
    import open_clip

    builtin = ASSETS / f"{name}.json"
    path = Path(name)
    if os.path.isdir(path):
        path = path / "open_clip_config.json"
        if not path.is_file():
            raise UserError(f"backbone.model: {name!r} is a folder without open_clip_config.json")
    if path.suffix == ".json":
        return read_config(path)
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors", ".ckpt"):
        raise UserError(
            f"backbone.model: {name!r} names weights, which belong to backbone.weights; expected an OpenCLIP model "
            "name, a JSON config or a folder with open_clip_config.json"
        )
    if name.startswith("local-dir:"):
        raise UserError(f"backbone.model: name the folder itself: {name.removeprefix('local-dir:')}")
    if _names_a_hub(name):
        raise UserError(f"backbone.model: {name!r} is a repository of a hub; {HOW_FROM_A_HUB}")
    if "/" not in name and os.path.isfile(str(builtin)):
        return read_config(Path(str(builtin)))
    config = open_clip.get_model_config(name) if ":" not in name else None
    if config is None:
        known = [*open_clip.list_models(), "quickstart"]
        raise UserError(f"backbone.model: {name!r} is not known; {suggest(name, known)}".rstrip())
    return config, {}


def _architecture(name: str, config: dict[str, Any]) -> Architecture:
    """Check that the model is one we know how to cut and adapt, and read off its sizes."""
    import open_clip

    try:
        vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
        text = open_clip.CLIPTextCfg(**config["text_cfg"])
    except TypeError as error:
        raise UserError(f"backbone.model: {name}: {error}") from None
    custom = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
    refused = {
        "a timm vision tower": bool(vision.timm_model_name),
        "a ResNet vision tower": isinstance(vision.layers, tuple | list),
        "an attentional pooler": bool(vision.attentional_pool),
        "a Hugging Face text tower": bool(text.hf_model_name),
        "a Hugging Face tokenizer": bool(text.hf_tokenizer_name) or "siglip" in name.lower(),
        "a class token in the text tower": text.embed_cls,
        "a multimodal decoder (CoCa)": "multimodal_cfg" in config,
        "tokenizer settings of its own": bool(text.tokenizer_kwargs),
        f"vision pooling {vision.pool_type!r}": vision.pool_type not in ("tok", "avg"),
        f"text pooling {text.pool_type!r}": text.pool_type not in ("argmax", "eos", "first", "last"),
        f"end-of-text token {text.eos_id}": text.pool_type == "eos" and text.eos_id != END_OF_TEXT,
        "no text projection": text.proj_type == "none" and text.width != config["embed_dim"],
        "custom attention blocks": any(
            tower.block_type == "custom" or any(getattr(tower, key) for key in custom) for tower in (vision, text)
        ),
    }
    for what, found in refused.items():
        if found:
            raise UserError(f"backbone.model: {name} has {what}, which is not supported; {SUPPORTED}")
    check_sizes(name, config, vision, text)
    return Architecture(
        name=name,
        vision=TowerShape(vision.width, int(vision.width * vision.mlp_ratio), vision.layers),
        text=TowerShape(text.width, int(text.width * text.mlp_ratio), text.layers),
        embed_dim=config["embed_dim"],
        image_size=pair(vision.image_size),
        context_length=text.context_length,
        has_vision_pre_norm=not vision.no_ln_pre,
        reads_class_token=vision.pool_type == "tok",
        reads_text_end=text.pool_type in ("argmax", "eos"),
    )


def _build(name: str, config: dict[str, Any], rng: Rng) -> nn.Module:
    """A model with random weights drawn from `rng`; the process-wide generator is left as it was."""
    import open_clip

    arguments = dict(config)
    model_class = open_clip.CustomTextCLIP if arguments.pop("custom_text", False) else open_clip.CLIP
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(rng.seed64() >> 1)
    try:
        model = model_class(**arguments)
    except Exception as error:  # torch and open_clip raise types of their own for sizes that don't go together
        raise UserError(f"backbone.model: {name} can't be built: {reason_of(error)}") from None
    finally:
        torch.default_generator.set_state(before)
    assert isinstance(model, nn.Module)
    return model


@lru_cache(maxsize=8)
def _tokenizer(context_length: int) -> SimpleTokenizer:
    import open_clip

    return open_clip.SimpleTokenizer(context_length=context_length)


def plain_model(
    model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[nn.Module, Callable[[Image.Image], Tensor], SimpleTokenizer]:
    """A model as OpenCLIP builds it, in evaluation mode, with these weights, its preprocessing and its tokenizer."""
    model = _build("the model", dict(model_cfg), Rng(0))
    model.load_state_dict(dict(weights))
    _, transform = _preprocessing("the model", dict(preprocess_cfg))
    return model.eval(), transform, _tokenizer(model_cfg["text_cfg"].get("context_length", 77))


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """The tokens of OpenCLIP's tokenizer with their numbers, and the pairs that it merges, in order."""
    tokenizer = _tokenizer(77)
    return dict(tokenizer.encoder), [" ".join(pair) for pair in tokenizer.bpe_ranks]


def _preprocessing(name: str, given: dict[str, Any]) -> tuple[PreprocessCfg, Callable[[Image.Image], Tensor]]:
    """OpenCLIP's settings from what a config and a tag say, and the transform that they describe."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    known = set(PreprocessCfg.__dataclass_fields__)
    chosen = {key: value for key, value in given.items() if key in known and value is not None}
    try:
        settings = PreprocessCfg(**chosen)
        return settings, image_transform_v2(settings, is_train=False)
    except Exception:  # OpenCLIP asserts, without a message
        raise UserError(f"backbone.model: {name}: preprocess_cfg: not known to OpenCLIP: {chosen}") from None


def _load_weights(model: nn.Module, path: Path, *, quick_gelu: bool) -> None:
    """Fill the model with the weights in a file. Raises `UserError` if they can't be read or don't fit.

    Not by `open_clip.load_checkpoint`: to another image size or context length it stretches the weights without a word.
    """
    try:
        state = read_state(path)
        openai = [name for name in OPENAI_SCALARS if state.pop(name, None) is not None]
        if openai and not quick_gelu:
            raise UserError(
                f"backbone.model: the weights in {path} are OpenAI's, trained with another GELU; "
                "use a model with quick_gelu, such as ViT-B-32-quickgelu"
            )
        model.load_state_dict(_as_in(model, state), strict=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"backbone.weights: {path}: {error.strerror or error}") from None
    except Exception as error:  # torch, safetensors and open_clip each raise types of their own here
        raise UserError(f"backbone.weights: {path} doesn't fit the model: {reason_of(error)}") from None


def _check_exported(path: Path, config: dict[str, Any], preprocess: dict[str, Any]) -> None:
    """Raise `UserError` naming what differs if the file was exported from another model or preprocessing."""
    with safetensors.safe_open(path, framework="pt") as file:
        content = (file.metadata() or {}).get(EXPORT_METADATA)
    if content is None:
        return
    try:
        exported = json.loads(content)
        theirs = {**_canonical(exported["model_cfg"]), **exported["preprocess_cfg"]}
    except (ValueError, RecursionError, TypeError, KeyError):
        raise UserError(f"backbone.weights: {path}: its metadata {EXPORT_METADATA} are damaged") from None
    ours = json.loads(json.dumps({**_canonical(config), **preprocess}))
    for key in ours:
        if key in theirs and theirs[key] != ours[key]:
            raise UserError(
                f"backbone.weights: {path} was exported from a model with {key} {theirs[key]}; backbone.model has "
                f"{ours[key]}"
            )


def _canonical(config: dict[str, Any]) -> dict[str, Any]:
    """Return what of a model's config decides what it computes, with OpenCLIP's defaults filled in, as dotted keys."""
    import open_clip

    parts = {"vision_cfg": open_clip.CLIPVisionCfg, "text_cfg": open_clip.CLIPTextCfg}
    flat = {"embed_dim": config["embed_dim"], "quick_gelu": bool(config.get("quick_gelu"))}
    for name, kind in parts.items():
        flat |= {f"{name}.{key}": value for key, value in asdict(kind(**config[name])).items()}
    return flat


def _as_in(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The weights under the names, and the two scalars in the shape, that the model has for them."""
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_to_custom_text_state_dict(state) if hasattr(model, "text") else dict(state)
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in [name for name in own if name in state]:
        if name in ("logit_scale", "logit_bias"):
            state[name] = state[name].reshape(own[name])
        elif name.endswith("positional_embedding") and state[name].shape != own[name]:
            raise ValueError(f"{name} is {list(state[name].shape)}, the model's {list(own[name])}")
    return state


def _pretrained_settings(model: str, tag: str, config: dict[str, Any]) -> dict[str, Any]:
    """Look a pretrained tag up. Raises `UserError` if its weights were trained with another GELU."""
    import open_clip

    settings = open_clip.get_pretrained_cfg(model, tag)
    if bool(settings.get("quick_gelu")) != bool(config.get("quick_gelu")):
        other = f"{model}-quickgelu" if settings.get("quick_gelu") else model.removesuffix("-quickgelu")
        raise UserError(f"backbone.model: the weights {tag!r} were trained with another GELU; use model {other}")
    return dict(settings)


def _download(model: str, tag: str, settings: dict[str, Any]) -> Path:
    """Fetch a pretrained tag's weights."""
    import open_clip

    try:
        return Path(open_clip.download_pretrained(settings))
    except Exception as error:  # the hub's client, urllib and the file system each raise types of their own
        reason = reason_of(error, after="Last error: ", limit=220)
        raise UserError(
            f"backbone.weights: {tag!r} of {model} can't be downloaded: {reason.rstrip('.')}; weights that are on this "
            "machine: backbone.weights=FILE.safetensors"
        ) from None
