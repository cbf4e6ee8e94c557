"""`python -m flora.export RUN FOLDER`: a run's adapter, merged into its backbone or by itself, as others load it."""

from __future__ import annotations

from flora.parsers import first_look

if __name__ == "__main__":
    first_look("export")  # what is imported from here on takes seconds

import json
import os
import shlex
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from PIL import Image

from flora import catalogue  # noqa: F401  (registers the components)
from flora.clip import huggingface
from flora.clip.adapters.files import peft_files
from flora.clip.adapters.lora import Lora
from flora.clip.backbone import EXPORT_METADATA, plain_model, vocabulary
from flora.clip.towers.tokens import AllTokens, TokenReduction
from flora.config.schema import ExperimentConfig
from flora.core.command_line import run_program
from flora.core.errors import UserError
from flora.core.files import write_whole
from flora.core.registry import name_of
from flora.core.rng import Rng
from flora.core.tree import State
from flora.parsers import export_parser
from flora.runs.finished import read_run

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS_NAME = "open_clip_model.safetensors"


@dataclass(frozen=True, eq=False)
class MergedModel:
    """A run's backbone with its adapter merged in: weights in fp32 on the CPU, and what OpenCLIP has to know of them.

    `model_cfg` and `preprocess_cfg` are as in OpenCLIP's `open_clip_config.json`; `backbone` is the `backbone.model`
    that the weights fit, an absolute path if it is one. `tokens` says with which tokens of an image the run's vision
    tower goes on, which the weights don't.
    """

    backbone: str
    weights: State
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    tokens: TokenReduction = AllTokens()


def merged_model(run: Path, client: str | None = None, overrides: Sequence[str] = ()) -> MergedModel:
    """Merge a finished run's adapter into its backbone: the server's, or the own one of a client, by its name or id.

    `overrides` (`backbone.weights=...`) say where things are now. Raises `UserError` if the run's files are missing,
    damaged or don't belong together, or if the client has no adapter of its own.
    """
    finished = read_run(run, overrides)
    config = finished.config
    clip = finished.load_backbone(torch.device("cpu"), "fp32")
    state_dict = dict(clip.model.state_dict())
    attached = config.attach(clip)
    if not attached.mergeable:
        raise UserError(f"{run}: its adapter works beside the model, and OpenCLIP's weights have no place for it")
    finished.check_fits(attached.initial_state(Rng(0)))
    named = Path(config.backbone.model)
    return MergedModel(
        backbone=str(named.resolve()) if named.exists() else config.backbone.model,
        weights=attached.merged_state_dict(state_dict, finished.adapter_of(client, attached)),
        model_cfg={key: value for key, value in clip.config.items() if key != "open_clip"},
        preprocess_cfg=dict(clip.preprocess_settings),
        tokens=clip.tokens,
    )


def load_adapted(
    run: str | Path, *, client: str | None = None, overrides: Sequence[str] = ()
) -> tuple[torch.nn.Module, Callable[[Image.Image], torch.Tensor], Callable[..., torch.Tensor]]:
    """Return a finished run's model as plain OpenCLIP, with its adapter merged in, its preprocessing and its tokenizer.

    `client` and `overrides` are as for `merged_model`, and so are the errors. What a run does beside the model
    (`evaluation.fusion`, `evaluation.patches`, `backbone.tokens`) is no part of it.
    """
    model = merged_model(Path(run), client, overrides)
    return plain_model(model.model_cfg, model.preprocess_cfg, model.weights)


def write_model(model: MergedModel, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that OpenCLIP loads by itself, or one `.safetensors` file with its settings in the metadata.

    Raises `UserError` if it can't be written, or is there already; nothing half-written stays behind.
    """
    settings = {"model_cfg": model.model_cfg, "preprocess_cfg": model.preprocess_cfg}
    metadata = {EXPORT_METADATA: json.dumps(settings)}
    content = safetensors.torch.save(huggingface.in_type(model.weights, dtype), metadata=metadata)
    if path.suffix != ".safetensors":
        write_folder(path, {"open_clip_config.json": huggingface.as_json(settings), WEIGHTS_NAME: content})
        return
    if path.exists():
        raise UserError(f"{path}: exists already")
    try:
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror or error}") from None


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder with `files`, by name, whole or not at all. Raises `UserError` if it can't be written."""
    if path.exists():
        raise UserError(f"{path}: exists already")
    part = path.with_name(f"{path.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed here
        part.mkdir()
        try:
            for name, content in files.items():
                write_whole(part / name, content)
            os.rename(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror or error}") from None


def huggingface_files(model: MergedModel, dtype: torch.dtype) -> dict[str, bytes]:
    """The files of a `CLIPModel` of transformers with its image processor and its tokenizer, by name.

    Raises `UserError` for what it can't express.
    """
    _refuse_tokens(model.tokens)
    settings = {**huggingface.clip_config(model.model_cfg), "dtype": str(dtype).removeprefix("torch.")}
    weights = huggingface.in_type(huggingface.clip_weights(model.weights), dtype)
    length = settings["text_config"]["max_position_embeddings"]
    return {
        "config.json": huggingface.as_json(settings),
        "model.safetensors": safetensors.torch.save(weights, metadata={"format": "pt"}),
        "preprocessor_config.json": huggingface.as_json(huggingface.image_processor(model.preprocess_cfg)),
        **huggingface.tokenizer_files(*vocabulary(), length),
    }


def _refuse_tokens(tokens: TokenReduction) -> None:
    if not tokens.is_idle:
        raise UserError(f"the run goes on with some tokens of an image ({tokens}), which CLIPModel can't")


def peft_adapter(
    run: Path, client: str | None = None, overrides: Sequence[str] = (), dtype: torch.dtype = torch.float32
) -> dict[str, bytes]:
    """The files of a finished run's adapter as PEFT has it for a `CLIPModel` of the run's backbone, by name.

    Raises `UserError` for an adapter or a backbone that can't be expressed so, and as `merged_model` does.
    """
    finished = read_run(run, overrides)
    options = finished.config.adapter
    if not isinstance(options, Lora):
        raise UserError(f"{run}: its adapter ({name_of(options)}) is no LoRA, and PEFT's LoRA has no place for it")
    clip = finished.load_backbone(torch.device("cpu"), "fp32")
    huggingface.clip_config(clip.config)
    _refuse_tokens(clip.tokens)
    attached = finished.config.attach(clip)
    finished.check_fits(attached.initial_state(Rng(0)))
    try:
        return peft_files(huggingface.in_type(finished.adapter_of(client, attached), dtype), options)
    except UserError as error:
        raise UserError(f"{run}: {error}") from None


def how_to_load(model: MergedModel, path: Path) -> list[str]:
    """Return what to type to use what was written: in Python with OpenCLIP alone, and as the backbone of a run."""
    where = str(path.resolve())
    if path.suffix == ".safetensors":
        overrides = [f"backbone.model={model.backbone}", f"backbone.weights={where}"]
        return [f"as a run's backbone: {shlex.join(overrides)}", "for OpenCLIP alone, export to a folder"]
    loaded = f"open_clip.create_model_and_transforms({f'local-dir:{where}'!r})"
    return [
        f"in Python: import open_clip; model, _, preprocess = {loaded}",
        f"as a run's backbone: {shlex.join([f'backbone.model={where}'])}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for anything that the user can mend."""
    return run_program(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    options = export_parser().parse(argv)
    if options.path.exists():
        raise UserError(f"{options.path}: exists already")
    if options.to != "openclip" and options.path.suffix == ".safetensors":
        raise UserError(f"{options.path}: --to {options.to} writes a folder, whose name can't end in .safetensors")
    notes = left_out(read_run(options.run, options.overrides).config)
    print("\n".join([*WRITERS[options.to](options), *notes]))
    return 0


def left_out(config: ExperimentConfig) -> list[str]:
    """Return the line about what a run predicts with besides its model, which no export has a place for, if it does."""
    is_used = {
        "evaluation.fusion": not config.evaluation.fusion.is_idle,
        "evaluation.patches": config.evaluation.patches is not None,
    }
    named = " and ".join(name for name, used in is_used.items() if used)
    return [f"left out: {named} of the run, which is no part of a model: its predictions differ"] if named else []


def _to_openclip(options: Namespace) -> list[str]:
    """Write what `--to openclip` asks for; return the lines to print."""
    model = merged_model(options.run, options.client, options.overrides)
    write_model(model, options.path, DTYPES[options.dtype])
    lines = [f"{options.path}: {len(model.weights)} tensors", *how_to_load(model, options.path)]
    if not model.tokens.is_idle:
        classes = ", classes" if model.tokens.reads_classes else ""
        call = f"flora.reduce_tokens(model, flora.{model.tokens}{classes})"
        lines.append(f"with the run's tokens, in Python: import flora; {call}")
    return lines


def _to_huggingface(options: Namespace) -> list[str]:
    model = merged_model(options.run, options.client, options.overrides)
    write_folder(options.path, huggingface_files(model, DTYPES[options.dtype]))
    loaded = f"transformers.CLIPModel.from_pretrained({str(options.path.resolve())!r})"
    return [
        f"{options.path}: {len(model.weights)} tensors",
        f"in Python: import transformers; model = {loaded}",
    ]


def _to_peft(options: Namespace) -> list[str]:
    files = peft_adapter(options.run, options.client, options.overrides, DTYPES[options.dtype])
    write_folder(options.path, files)
    where = str(options.path.resolve())
    return [
        f"{options.path}: {', '.join(files)}",
        f"in Python, with the backbone as a CLIPModel: import peft; peft.PeftModel.from_pretrained(model, {where!r})",
        f"as a run's beginning: {shlex.join([f'adapter.start={where}'])}",
    ]


WRITERS: dict[str, Callable[[Namespace], list[str]]] = {
    "openclip": _to_openclip,
    "peft": _to_peft,
    "huggingface": _to_huggingface,
}


if __name__ == "__main__":
    sys.exit(main())
