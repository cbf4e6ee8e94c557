"""`python -m flora.export RUN FOLDER`: a run's adapter merged into its backbone, as a model that OpenCLIP loads."""

from __future__ import annotations

from flora.parsers import first_look

if __name__ == "__main__":
    first_look("export")  # what is imported from here on takes seconds

import dataclasses
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from flora import catalogue  # noqa: F401  (registers the components)
from flora.clip.backbone import EXPORT_METADATA
from flora.clip.frozen import FrozenClip
from flora.clip.prediction import PLAIN
from flora.clip.towers.tokens import AllTokens, TokenReduction
from flora.config.overrides import apply_overrides
from flora.config.parse import config_to_dict, parse_config
from flora.config.plain_yaml import read_yaml
from flora.config.schema import ExperimentConfig
from flora.core.command_line import run_program
from flora.core.errors import UserError
from flora.core.files import open_regular, write_whole
from flora.core.registry import OptionError, suggest
from flora.core.rng import Rng
from flora.core.tree import State, fits, is_finite, state_digest
from flora.parsers import export_parser
from flora.runs.checkpoints import CheckpointFolder
from flora.runs.run_directory import ADAPTER_FORMAT, read_json

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


def read_adapter(path: Path) -> tuple[State, dict[str, Any]]:
    """The tensors of an `adapter.safetensors`, verified, and what it says that they belong to.

    Raises `UserError` if it is missing, damaged, something else, or not finite.
    """
    try:
        open_regular(path).close()
        with safetensors.safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("flora", "{}"))
            if not isinstance(description, dict) or description.get("format") != ADAPTER_FORMAT:
                raise UserError(f"{path}: not an adapter of this program (format {ADAPTER_FORMAT})")
            adapter = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())}") from None
    if state_digest(adapter) != description.get("sha256"):
        raise UserError(f"{path}: its numbers are not those that the run wrote (SHA-256)")
    if not is_finite(adapter):
        raise UserError(f"{path}: its numbers are not finite: the run has diverged")
    return adapter, description


def merged_model(run: Path, client: str | None = None, overrides: Sequence[str] = ()) -> MergedModel:
    """Merge a finished run's adapter into its backbone: the server's, or the own one of a client, by its name or id.

    `overrides` (`backbone.weights=...`) say where things are now. Raises `UserError` if the run's files are missing,
    damaged or don't belong together, or if the client has no adapter of its own.
    """
    adapter, description = read_adapter(run / "adapter.safetensors")
    config = _config(run, description, overrides)
    clip = _backbone(run, config)
    state_dict = dict(clip.model.state_dict())
    attached = config.adapter.attach(clip)
    if not attached.mergeable:
        raise UserError(f"{run}: its adapter works beside the model, and OpenCLIP's weights have no place for it")
    expected = config.server.strategy.initial(attached.initial_state(Rng(0)))
    if config.backbone.precision == "fp64":
        expected = {name: tensor.double() for name, tensor in expected.items()}
    if expected.keys() != adapter.keys() or not all(fits(adapter[name], expected[name]) for name in expected):
        raise UserError(f"{run / 'adapter.safetensors'}: doesn't fit the adapter that config.yaml describes")
    if client is not None and not config.communication.broadcast.is_identity:
        raise UserError(f"{run}: its broadcast is quantised: no client has the server's adapter as this run keeps it")
    if client is not None:
        adapter = dict(attached.models({**adapter, **_own_tensors(run, client)})[-1])
    named = Path(config.backbone.model)
    return MergedModel(
        backbone=str(named.resolve()) if named.exists() else config.backbone.model,
        weights=attached.merged_state_dict(state_dict, adapter),
        model_cfg={key: value for key, value in clip.config.items() if key != "open_clip"},
        preprocess_cfg=dict(clip.preprocess_settings),
        tokens=clip.tokens,
        is_fused=config.evaluation.prediction != PLAIN,
    )


def _config(run: Path, description: Mapping[str, Any], overrides: Sequence[str]) -> ExperimentConfig:
    """The run's configuration, changed by `overrides`; its own must be that which its adapter was written with."""
    stored = read_yaml(run / "config.yaml")
    try:
        as_stored = config_to_dict(parse_config(stored, is_complete=True))
        parts = ("adapter", "backbone", "prompts")
        described = {**stored, **{key: description.get(key) for key in parts}}
        written = config_to_dict(parse_config(described, is_complete=True))
        for key in parts:
            if as_stored[key] != written[key]:
                raise UserError(f"{run}: `{key}` in config.yaml is not what its adapter was trained with")
        apply_overrides(stored, overrides, ExperimentConfig)
        return parse_config(stored, is_complete=True)
    except OptionError as error:
        raise UserError(f"{run / 'config.yaml'}: {error}") from None


def _backbone(run: Path, config: ExperimentConfig) -> FrozenClip:
    """The run's backbone in fp32 on the CPU. Raises `UserError` if its weights are not those that the run had."""
    recorded = read_json(run / "environment.json")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("backbone_sha256"), str):
        raise UserError(f"{run / 'environment.json'}: missing or damaged")
    # The same stream as in the run, in case that its backbone had random weights.
    device, rng = torch.device("cpu"), Rng(config.seed).child("backbone")
    clip = config.backbone.load(device, rng)
    if state_digest(clip.model.state_dict()) != recorded["backbone_sha256"]:
        raise UserError(f"{run}: the backbone's weights are not those that the run was made with (SHA-256)")
    if config.backbone.precision == "fp32":
        return clip
    return dataclasses.replace(config.backbone, precision="fp32").load(device, rng)


def _own_tensors(run: Path, client: str) -> State:
    """Return what of its adapter a client kept for itself until the run's last checkpoint."""
    checkpoints, index = CheckpointFolder(run / "checkpoints"), _client_id(run, client)
    rounds = checkpoints.rounds()
    own = checkpoints.client(rounds[0], index).own if rounds else {}
    if not own:
        raise UserError(f"{run}: client {client} has kept no adapter of its own in this run")
    return own


def _client_id(run: Path, client: str) -> int:
    """The id of the client of this name or, where there is none, of this id. Raises `UserError` if there is neither."""
    partition = read_json(run / "partition.json")
    try:
        names = [each.get("name", str(index)) for index, each in enumerate(partition["clients"])]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{run / 'partition.json'}: missing or damaged") from None
    if client in names:
        return names.index(client)
    if client.isdecimal() and int(client) < len(names):
        return int(client)
    raise UserError(f"{run}: there is no client {client!r}; {suggest(client, names)}")


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
