"""`python -m flora.export RUN FOLDER`: a run's adapter merged into its backbone, as a model that OpenCLIP loads."""

from __future__ import annotations

from flora.parsers import first_look

if __name__ == "__main__":
    first_look("export")  # what is imported from here on takes seconds

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from flora import catalogue  # noqa: F401  (registers the components)
from flora.clip.backbone import EXPORT_METADATA
from flora.clip.prediction import PLAIN
from flora.clip.towers.tokens import AllTokens, TokenReduction
from flora.core.command_line import run_program
from flora.core.errors import UserError
from flora.core.files import write_whole
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
    is_fused: bool = False
    """Whether the run predicted with more than the adapted model's own logits."""


def merged_model(run: Path, client: str | None = None, overrides: Sequence[str] = ()) -> MergedModel:
    """Merge a finished run's adapter into its backbone: the server's, or the own one of a client, by its name or id.

    `overrides` (`backbone.weights=...`) say where things are now. Raises `UserError` if the run's files are missing,
    damaged or don't belong together, or if the client has no adapter of its own.
    """
    finished = read_run(run, overrides)
    config = finished.config
    clip = finished.load_backbone(torch.device("cpu"), "fp32")
    state_dict = dict(clip.model.state_dict())
    attached = config.adapter.attach(clip)
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
        is_fused=config.evaluation.prediction != PLAIN,
    )


def write_model(model: MergedModel, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that OpenCLIP loads by itself, or one `.safetensors` file with its settings in the metadata.

    Raises `UserError` if it can't be written, or is there already; nothing half-written stays behind.
    """
    settings = {"model_cfg": model.model_cfg, "preprocess_cfg": model.preprocess_cfg}
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in model.weights.items()}
    content = safetensors.torch.save(weights, metadata={EXPORT_METADATA: json.dumps(settings)})
    if path.exists():
        raise UserError(f"{path}: exists already")
    try:
        if path.suffix == ".safetensors":
            write_whole(path, content)
            return
        part = path.with_name(f"{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed here
        part.mkdir()
        try:
            write_whole(part / "open_clip_config.json", (json.dumps(settings, indent=2) + "\n").encode())
            write_whole(part / WEIGHTS_NAME, content)
            os.rename(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror or error}") from None


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
    model = merged_model(options.run, options.client, options.overrides)
    write_model(model, options.path, DTYPES[options.dtype])
    print(f"{options.path}: {len(model.weights)} tensors")
    print("\n".join(how_to_load(model, options.path)))
    if model.is_fused:
        print(
            "the run's evaluation.fusion or evaluation.patches are no part of the weights: predictions differ from its"
        )
    if not model.tokens.is_idle:
        classes = ", classes" if model.tokens.reads_classes else ""
        print(
            f"with the run's tokens, in Python: import flora; flora.reduce_tokens(model, flora.{model.tokens}{classes})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
