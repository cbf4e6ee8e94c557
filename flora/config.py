"""YAML plus `key=value` overrides to an `ExperimentConfig`; anything wrong is one line that names the key."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flora.checkpoints import CheckpointOptions
from flora.clip.adapters import Adapter, Lora
from flora.clip.backbone import Backbone
from flora.clip.towers import SpeedOptions
from flora.data.datasets import Dataset
from flora.data.partition import Partitioner
from flora.data.prompts import PromptOptions
from flora.data.splits import Official, Splitter
from flora.errors import UserError
from flora.federated.aggregation import FedAvg, Strategy
from flora.federated.cache import CacheOptions
from flora.federated.combiners import Combiner, Mean
from flora.federated.communication import CommunicationOptions
from flora.federated.evaluation import EvaluationOptions
from flora.federated.local import LocalTraining
from flora.federated.network import Network, Patience
from flora.federated.personal import NoPersonalization, Personalization
from flora.federated.ranks import Ranks
from flora.federated.sampling import Sampler, Uniform
from flora.federated.screening import Screening
from flora.federated.server_optimizers import ServerOptimizer, ServerSgd
from flora.files import open_regular
from flora.protocols import DEFAULT, PROTOCOLS, with_protocol
from flora.registry import Component, OptionError, Options, components, name_of, option, suggest

MAX_CONFIG_BYTES = 1_000_000


class ConfigError(UserError):
    """A configuration that can't be used: `where: dotted.key: what was expected, what was found`."""


@dataclass(frozen=True)
class ClientOptions(Options):
    """The virtual clients."""

    number: int | None = option(
        "how many virtual clients there are; none, and the default of `natural`: as many as the data name",
        10,
        at_least=1,
        at_most=10_000_000,
    )
    pooled: bool = option("one client trains on what all of them would have: centralised training", False)
    cohort: Sampler = option("which of them take part in a round", Uniform())
    holdout_fraction: float = option("share of a client's examples kept for its own test", 0.2, at_least=0, below=1)
    ranks: tuple[int, ...] | Ranks | None = option(
        "a list of each client's rank, or how they are drawn; none: adapter.rank for all", None, at_least=1
    )
    per_block: int | None = option(
        "clients trained in one step; changes the speed only; none: automatic", None, at_least=1
    )

    @property
    def number_training(self) -> int | None:
        """How many clients there are to train: one where they are pooled, None if that is for the data to say."""
        return 1 if self.pooled else self.number


@dataclass(frozen=True)
class ServerOptions(Options):
    """What the server does with the updates."""

    strategy: Strategy = option("what of an adapter clients train and send", FedAvg())
    combiner: Combiner = option("how the cohort's deltas become one", Mean())
    optimizer: ServerOptimizer = option("how the server steps along that delta", ServerSgd())
    screening: Screening = option("what becomes of updates that must not be averaged", Screening())
    patience: Patience = option("for whom the server waits, where there is a network", Patience())


@dataclass(frozen=True)
class ExperimentConfig(Options):
    """A whole experiment."""

    data: Dataset = option("where the images come from")
    partition: Partitioner = option("how the training examples are dealt out to the clients")
    protocol: str = option("the set of values below this file's own", DEFAULT, choices=tuple(PROTOCOLS))
    name: str = option("the run's name, and its folder's below `output`; none: the file's name", "")
    seed: int = option("root of all random numbers", 0, at_least=0)
    rounds: int = option("rounds of federated training; 0: zero-shot only", 20, at_least=0)
    device: str = option("auto (cuda if there is one, else cpu), cpu, cuda or cuda:N", "auto")
    threads: int | None = option("threads of a CPU operation; none: PyTorch's choice", None, at_least=1, at_most=1024)
    output: str = option("folder that run directories are made in", "runs")
    split: Splitter = option("which images are trained on and which are the common test set", Official())
    backbone: Backbone = option("the frozen model", Backbone())
    adapter: Adapter = option("what the clients train", Lora())
    prompts: PromptOptions = option("the texts that stand for the classes", PromptOptions())
    clients: ClientOptions = option("the virtual clients", ClientOptions())
    local: LocalTraining = option("what a client does in a round", LocalTraining())
    personal: Personalization = option("what each client trains for itself alone", NoPersonalization())
    server: ServerOptions = option("what the server does with the updates", ServerOptions())
    network: Network | None = option("lines, machines and hours of the clients; none: all at once, always", None)
    communication: CommunicationOptions = option("how what travels is written", CommunicationOptions())
    cache: CacheOptions = option("where image features are kept between runs", CacheOptions())
    speed: SpeedOptions = option("exact ways to be faster", SpeedOptions())
    evaluation: EvaluationOptions = option("when and how results are measured", EvaluationOptions())
    checkpoints: CheckpointOptions = option("when the server's state is saved", CheckpointOptions())

    def check(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", self.device):
            raise OptionError("device", f"expected auto, cpu, cuda or cuda:N, got {self.device!r}")
        if self.clients.number is None and not self.partition.names_clients:
            raise OptionError(
                "clients.number", f"expected a number: {name_of(self.partition)} takes none from the data"
            )


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error."""


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a string", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a YAML file, apply `key=value` overrides, check everything.

    Raises `ConfigError` naming the file (or the command line) and the key.
    """
    raw = read_yaml(Path(path))
    for override in overrides:
        apply_override(raw, override)
    if raw.get("name") in (None, ""):
        raw["name"] = Path(path).stem
    try:
        return parse_config(raw)
    except OptionError as error:
        # An override of `local` is behind an error in `local.epochs`, and one of `rounds.x` behind one in `rounds`.
        keys = [_dotted(override.partition("=")[0].strip().split(".")) for override in overrides]
        found = f"{error.option}.".replace("[", ".")
        by_override = any(found.startswith(f"{key}.") or f"{key}.".startswith(found) for key in keys)
        raise ConfigError(f"{'command line' if by_override else path}: {error}") from None


def parse_config(raw: Mapping[str, Any], *, is_complete: bool = False) -> ExperimentConfig:
    """A checked config from nested mappings, over the values of the protocol that it names.

    `is_complete` says that those are in it already, as in a run's `config.yaml`: what a later version of the program
    adds to a protocol must not change a run that has begun. Raises `OptionError` naming the dotted key.
    """
    if not is_complete:
        raw = _with_clients_of_the_data(with_protocol(raw), raw)
    config: ExperimentConfig = _parse(ExperimentConfig, raw, "")
    name = config.name
    if name in (".", "..") or not name.isprintable() or name != name.strip() or "/" in name or "\\" in name:
        raise OptionError("name", f"expected a plain folder name, got {name!r}")
    return config


def _with_clients_of_the_data(values: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values` with `clients.number: null` where the data name the clients and `given` has no number of them."""
    partition, clients, own = values.get("partition"), values.get("clients") or {}, given.get("clients") or {}
    name = partition.get("name") if isinstance(partition, Mapping) else partition
    kind = components(Partitioner).get(name) if isinstance(name, str) else None
    names_clients = kind is not None and issubclass(kind, Partitioner) and kind.names_clients
    if not names_clients or not isinstance(own, Mapping) or "number" in own:
        return values
    return {**values, "clients": {**clients, "number": None}}


def config_to_dict(config: Any) -> Any:
    """The config with every default filled in, as plain YAML types; `parse_config` gives the same config back."""
    if isinstance(config, Options):
        own = {field.name: config_to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
        return {"name": name_of(config), **own} if isinstance(config, Component) else own
    if isinstance(config, tuple):
        return [config_to_dict(element) for element in config]
    return dict(config) if isinstance(config, Mapping) else config


# What PyYAML raises on text that is not YAML, and on a value that doesn't fit its tag (`!!bool 3`).
_YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError)


def _yaml_reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, yaml.YAMLError | ValueError):
        return "a value doesn't fit its tag"
    return " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked. Raises `ConfigError` if it can't be read or is no mapping."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes, which no experiment needs")
        raw = yaml.load(content.decode(), Loader=_Loader)  # noqa: S506  (derives from SafeLoader)
    except OSError as error:
        hint = ""
        if isinstance(error, FileNotFoundError):
            known = [str(other) for other in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
            hint = f"; {suggest(str(path), known)}" if known else ""
        raise ConfigError(f"{path}: {error.strerror}{hint}") from None
    except _YAML_ERRORS as error:
        raise ConfigError(f"{path}: not valid YAML: {_yaml_reason(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of options, got {_show(raw)}")
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key of `raw` as `key=value` says. Raises `ConfigError` if that is not possible."""
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key or "" in key.split("."):
        raise ConfigError(f"command line: expected key=value with a dotted key, got {override!r}")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506  (derives from SafeLoader)
    except _YAML_ERRORS as error:
        raise ConfigError(f"command line: {_dotted(key.split('.'))}: not valid YAML: {_yaml_reason(error)}") from None
    *parents, last = key.split(".")
    target = raw
    for depth, parent in enumerate(parents, start=1):
        inner = target.get(parent)
        if isinstance(inner, str):  # `partition: iid` is short for `partition: {name: iid}`
            inner = {"name": inner}
        if inner is not None and not isinstance(inner, dict):
            holder = _dotted(parents[:depth])
            raise ConfigError(f"command line: {_dotted([*parents, last])}: {holder} is {_show(inner)}, not a mapping")
        target[parent] = inner or {}
        target = target[parent]
    target[last] = value


def _parse(annotation: Any, raw: Any, path: str) -> Any:
    """`raw` as a value of the annotated type. Raises `OptionError` with the dotted key."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _parse_union(typing.get_args(annotation), raw, path)
    if typing.get_origin(annotation) is tuple:
        if not isinstance(raw, list | tuple):
            raise OptionError(path, f"expected a list, got {_show(raw)}")
        element = typing.get_args(annotation)[0]
        return tuple(_parse(element, item, f"{path}[{index}]") for index, item in enumerate(raw))
    if typing.get_origin(annotation) in (dict, Mapping):
        return _parse_mapping(raw, path)
    if inspect.isclass(annotation) and issubclass(annotation, Component):
        return _parse_component(annotation, raw, path)
    if inspect.isclass(annotation) and issubclass(annotation, Options):
        return _parse_options(annotation, raw, path)
    return _parse_scalar(annotation, raw, path)


def _parse_union(choices: tuple[Any, ...], raw: Any, path: str) -> Any:
    if raw is None and type(None) in choices:
        return None
    others = [choice for choice in choices if choice is not type(None)]
    fitting = [choice for choice in others if _container(choice) is _container_of(raw)]
    if not fitting and len(others) > 1:
        raise OptionError(path, f"expected a list or a mapping, got {_show(raw)}")
    return _parse((fitting or others)[0], raw, path)


def _container(annotation: Any) -> type | None:
    origin = typing.get_origin(annotation)
    if inspect.isclass(annotation) and issubclass(annotation, Component):
        return dict
    return list if origin is tuple else dict if origin in (dict, Mapping) else None


def _container_of(raw: Any) -> type | None:
    return list if isinstance(raw, list | tuple) else dict if isinstance(raw, dict) else None


def _parse_mapping(raw: Any, path: str) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(value, str) for pair in raw.items() for value in pair):
        raise OptionError(path, f"expected a mapping of text to text, got {_show(raw)}")
    return dict(raw)


def _parse_component(kind: type[Component], raw: Any, path: str) -> Component:
    known = components(kind)
    if isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, dict):
        raise OptionError(path, f"expected one of {', '.join(known)} (or a mapping with its `name`), got {_show(raw)}")
    if "name" not in raw:
        raise OptionError(f"{path}.name", f"missing; expected one of {', '.join(known)}")
    name = raw["name"]
    if not isinstance(name, str) or name not in known:
        raise OptionError(f"{path}.name", f"{_show(name)} is not known; {suggest(_show(name), known)}")
    options = {key: value for key, value in raw.items() if key != "name"}
    return typing.cast(Component, _parse_options(known[name], options, path))


def _parse_options(cls: type[Options], raw: Any, path: str) -> Options:
    prefix = f"{path}." if path else ""
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise OptionError(path, f"expected a mapping of options, got {_show(raw)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in raw:
        if key not in fields:
            known = f"; {suggest(_dotted([key]), fields)}" if fields else "; there are no options here"
            raise OptionError(f"{prefix}{_dotted([key])}", f"unknown key{known}")
    for name, field in fields.items():
        if name not in raw and field.default is dataclasses.MISSING:
            raise OptionError(f"{prefix}{name}", f"missing: {field.metadata['help']}")
    types_by_name = typing.get_type_hints(cls)
    values = {}
    for name, value in raw.items():
        default = fields[name].default
        if isinstance(default, Component) and isinstance(value, dict) and "name" not in value:
            value = {"name": name_of(default), **value}
        values[name] = _parse(types_by_name[name], value, f"{prefix}{name}")
    try:
        return cls(**values)
    except OptionError as error:
        raise OptionError(f"{prefix}{error.option}", error.message) from None


def _parse_scalar(annotation: Any, raw: Any, path: str) -> Any:
    if annotation is bool and isinstance(raw, bool):
        return raw
    if annotation is int and isinstance(raw, int) and not isinstance(raw, bool) and abs(raw) < 2**63:
        return raw
    if annotation is float and isinstance(raw, int | float | str) and not isinstance(raw, bool):
        # YAML 1.1 reads 1e-3, without a dot, as text.
        try:
            number = float(raw)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    if annotation is str and isinstance(raw, str) and "\0" not in raw:
        return raw
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise OptionError(path, f"expected {words.get(annotation, annotation)}, got {_show(raw)}")


class _Short(reprlib.Repr):
    """Limits the work too: a few lines of YAML aliases can stand for gigabytes of text."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**40 else "a number of more than 40 digits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 80


def _show(raw: Any) -> str:
    """A value as an error message shows it: short, on one line."""
    text = _SHORT.repr(raw)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _dotted(keys: Sequence[Any]) -> str:
    """Keys as an error message shows them; one that could not be a name is quoted."""
    return ".".join(key if isinstance(key, str) and key.isidentifier() else _show(key) for key in keys)
