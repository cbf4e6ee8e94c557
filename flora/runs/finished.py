"""Read a finished run: its configuration, its adapter, its classes and its backbone, which must belong together."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flora.clip.adapters.base import AttachedAdapter
from flora.clip.adapters.files import read_adapter
from flora.clip.frozen import FrozenClip
from flora.config.overrides import apply_overrides, override_key
from flora.config.parse import config_to_dict, parse_config
from flora.config.plain_yaml import read_yaml
from flora.config.schema import ExperimentConfig
from flora.core.clusters import clusters_of
from flora.core.errors import ConfigError, UserError
from flora.core.registry import OptionError, suggest
from flora.core.rng import Rng
from flora.core.tree import State, StateLike, fits, state_digest
from flora.runs.checkpoints import CheckpointFolder
from flora.runs.resume import TRACES, finished_rounds
from flora.runs.run_directory import read_json


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes of a run as its prompts name them, and those that it set aside; more sentences for some of them."""

    names: tuple[str, ...]
    new_names: tuple[str, ...]
    descriptions: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A finished run: where it is, its configuration as overrides change it, and the server's last adapter."""

    path: Path
    config: ExperimentConfig
    adapter: State

    @property
    def num_rounds(self) -> int:
        """How many rounds it has. Raises `UserError` if that can't be read."""
        rounds = finished_rounds(self.path)
        if rounds is None:
            raise UserError(f"{self.path / 'summary.json'}: missing or damaged")
        return rounds

    @property
    def value_range(self) -> tuple[float, float] | None:
        """The lowest and the highest value of images of more than 8 bits, as they were scaled; None without any."""
        limits = self._environment().get("value_range")
        return None if limits is None else (float(limits[0]), float(limits[1]))

    def load_backbone(self, device: torch.device, precision: str) -> FrozenClip:
        """The backbone with arithmetic in `precision`. Raises `UserError` if its weights are not those of the run."""
        recorded = self._environment().get("backbone_sha256")
        if not isinstance(recorded, str):
            raise UserError(f"{self.path / 'environment.json'}: missing or damaged")
        # The same stream as in the run, in case that its backbone had random weights.
        rng, backbone = Rng(self.config.seed).child("backbone"), self.config.backbone
        clip = backbone.load(device, rng)
        if state_digest(clip.model.state_dict()) != recorded:
            raise UserError(f"{self.path}: the backbone's weights are not those that the run was made with (SHA-256)")
        if backbone.precision == precision:
            return clip
        return dataclasses.replace(backbone, precision=precision).load(device, rng)

    def check_fits(self, initial: State) -> None:
        """Raise `UserError` unless the adapter has the tensors that the configuration describes, as `initial` has."""
        expected = self.config.server.strategy.initial(initial)
        if self.config.backbone.precision == "fp64":
            expected = {name: tensor.double() for name, tensor in expected.items()}
        if expected.keys() != self.adapter.keys() or not all(
            fits(self.adapter[name], expected[name]) for name in expected
        ):
            raise UserError(f"{self.path / 'adapter.safetensors'}: doesn't fit the adapter that config.yaml describes")

    def adapter_of(self, client: str | None, attached: AttachedAdapter) -> StateLike:
        """The tensors to bind for the server's adapter or, by its name or id, a client's own, without a client axis.

        Where the server keeps several models, a client's is its cluster's. Raises `UserError` if there is no such
        client, if it has no adapter of its own, or if none is named where there are several models.
        """
        clusters = clusters_of(self.adapter)
        if client is None:
            if len(clusters) > 1:
                raise UserError(f"{self.path}: its server keeps {len(clusters)} models: name a client, for its own")
            return attached.models(self.adapter)[0]
        index = self.client_id(client)
        if not self.config.communication.broadcast.is_identity:
            raise UserError(
                f"{self.path}: its broadcast is quantised: no client has the server's adapter as this run keeps it"
            )
        if len(clusters) > 1:
            return attached.models(clusters[self._cluster(index, len(clusters))])[-1]
        checkpoints = CheckpointFolder(self.path / "checkpoints")
        rounds = checkpoints.rounds()
        own = checkpoints.client(rounds[0], index).own if rounds else {}
        if not own:
            raise UserError(f"{self.path}: client {client} has kept no adapter of its own in this run")
        return attached.models({**self.adapter, **own})[-1]

    def _cluster(self, client: int, number: int) -> int:
        """The cluster of a client, one of `number`. Raises `UserError` if clients.csv is missing or damaged."""
        file = self.path / "clients.csv"
        try:
            with file.open(newline="", encoding="utf-8") as lines:
                cluster = int(list(csv.DictReader(lines))[client]["cluster"])
        except (OSError, ValueError, LookupError, csv.Error):
            cluster = -1
        if not 0 <= cluster < number:
            raise UserError(f"{file}: missing or damaged")
        return cluster

    def client_id(self, client: str) -> int:
        """The id of the client of this name or, where there is none, of this id. Raises `UserError` without either."""
        partition = read_json(self.path / "partition.json")
        try:
            names = [each.get("name", str(index)) for index, each in enumerate(partition["clients"])]
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{self.path / 'partition.json'}: missing or damaged") from None
        if client in names:
            return names.index(client)
        if client.isdecimal() and int(client) < len(names):
            return int(client)
        raise UserError(f"{self.path}: there is no client {client!r}; {suggest(client, names)}")

    def classes(self) -> Classes:
        """The classes as `prompts.json` has them. Raises `UserError` if it is missing or damaged."""
        content = read_json(self.path / "prompts.json")
        try:
            number = len(content["templates"])
            listed = [content["classes"], content.get("new_classes", [])]
            names, new_names = (tuple(str(each["name"]) for each in some) for some in listed)
            sentences = {
                str(each["name"]): tuple(map(str, each["prompts"][number:])) for some in listed for each in some
            }
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{self.path / 'prompts.json'}: missing or damaged") from None
        return Classes(names, new_names, {name: more for name, more in sentences.items() if more})

    def _environment(self) -> Mapping[str, Any]:
        recorded = read_json(self.path / "environment.json")
        if not isinstance(recorded, dict):
            raise UserError(f"{self.path / 'environment.json'}: missing or damaged")
        return recorded


def read_run(path: Path, overrides: Sequence[str] = ()) -> FinishedRun:
    """Read a finished run; `overrides` change its configuration, and say where things are now.

    Raises `UserError` if its files are missing, damaged, of a run that is not finished, or don't belong together.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no such run directory")
    if not (path / "adapter.safetensors").exists():
        if not any((path / name).exists() for name in TRACES):
            raise UserError(f"{path}: not a run directory: it has no adapter.safetensors")
        raise UserError(
            f"{path}: this run is not finished, so it has no adapter.safetensors; python -m flora.simulate --resume "
            "goes on with it"
        )
    adapter, description = read_adapter(path / "adapter.safetensors")
    return FinishedRun(path, _config(path, description, overrides), adapter)


def check_overrides(overrides: Sequence[str], allowed: Sequence[str]) -> None:
    """Raise `ConfigError` for one that changes something else than the `allowed` keys, or what is below them."""
    for key in map(override_key, overrides):
        if not any(key == each or key.startswith(f"{each}.") for each in allowed):
            raise ConfigError(
                f"command line: {key}: a finished run stays what it is; expected one of {', '.join(allowed)}"
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
