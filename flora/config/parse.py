"""YAML plus `key=value` overrides to an `ExperimentConfig`; each mistake is one line that names the key."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from flora import catalogue  # noqa: F401  (registers the components)
from flora.config.overrides import apply_overrides, override_key
from flora.config.plain_yaml import read_yaml, shipped
from flora.config.presets import with_preset
from flora.config.schema import ExperimentConfig
from flora.core.errors import ConfigError
from flora.core.registry import (
    Component,
    OptionError,
    Options,
    components,
    dotted,
    name_of,
    out_of_bounds,
    show,
    suggest,
)
from flora.data.partition import Partitioner

# What keys and components were called before: said, never read.
RENAMED = {
    "protocol": "preset",
    "combiner": "aggregator",
    "patience": "stragglers",
    "pooled": "centralized",
    "decaying": "dynamic",
    "num_alone": "num_local_only",
}
MOVED = {
    "fedbuff": "it is a schedule now: server.schedule={name: buffered, buffer: 10}, with strategy.weighting=uniform"
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a YAML file, apply `key=value` overrides, check everything.

    A name such as `quickstart` that is no file stands for the experiment that the package ships under it. Raises
    `ConfigError` naming the file (or the command line) and the key of each mistake.
    """
    raw = read_yaml(shipped(Path(path)))
    apply_overrides(raw, overrides, ExperimentConfig)
    if raw.get("name") in (None, ""):
        raw["name"] = Path(path).stem
    try:
        return parse_config(raw)
    except OptionError as error:
        # An override of `local` is behind an error in `local.epochs`, and one of `rounds.x` behind one in `rounds`.
        keys = [dotted(override_key(override).split(".")) for override in overrides]
        mistakes = []
        for mistake in (error, *error.others):
            found = f"{mistake.option}.".replace("[", ".")
            by_override = any(found.startswith(f"{key}.") or f"{key}.".startswith(found) for key in keys)
            mistakes.append(f"{'command line' if by_override else path}: {mistake}")
        raise ConfigError(*mistakes) from None


def changes_by_overrides(path: str | Path, overrides: Sequence[str]) -> list[str]:
    """Return what the experiment in `path` becomes with `overrides`, a line for each setting that is not what it was.

    Where the file can't be used without them, they are returned themselves.
    """
    try:
        before, after = flat_settings(load_config(path)), flat_settings(load_config(path, overrides))
    except ConfigError:
        return list(overrides)
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [f"{key}: {show(before.get(key))} -> {show(after.get(key))}" for key in keys]


def flat_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Every setting's value, defaults included, as plain YAML types under its dotted key."""
    return _flat(config_to_dict(config), "")


def _flat(nested: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def parse_config(raw: Mapping[str, Any], *, is_complete: bool = False) -> ExperimentConfig:
    """A checked config from nested mappings, over the values of the preset that it names.

    `is_complete` says that those are in it already, as in a run's `config.yaml`: what a later version of the program
    adds to a preset must not change a run that has begun. Raises `OptionError` naming the dotted key.
    """
    if not is_complete:
        raw = _with_clients_of_the_data(with_preset(raw), raw)
    try:
        config: ExperimentConfig = _parse(ExperimentConfig, raw, "")
    except OptionError as error:
        # What is missing may be what a preset or a scenario of the right name has.
        named = [each for each in (error, *error.others) if each.option in ("preset", "scenario")]
        raise (OptionError(named[0].option, named[0].message, named[1:]) if named else error) from None
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


def _parse(annotation: Any, raw: Any, path: str) -> Any:
    """`raw` as a value of the annotated type. Raises `OptionError` with the dotted key."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _parse_union(typing.get_args(annotation), raw, path)
    if typing.get_origin(annotation) is tuple:
        if not isinstance(raw, list | tuple):
            raise OptionError(path, f"expected a list, got {show(raw)}{_as_list(raw)}")
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
        raise OptionError(path, f"expected a list or a mapping, got {show(raw)}")
    return _parse((fitting or others)[0], raw, path)


def _as_list(raw: Any) -> str:
    """Return how to write as a list what words with commas mean."""
    words = [word.strip() for word in raw.split(",")] if isinstance(raw, str) else []
    return f"; write [{', '.join(words)}]" if words and all(word.isidentifier() for word in words) else ""


def _container(annotation: Any) -> type | None:
    origin = typing.get_origin(annotation)
    if inspect.isclass(annotation) and issubclass(annotation, Component):
        return dict
    return list if origin is tuple else dict if origin in (dict, Mapping) else None


def _container_of(raw: Any) -> type | None:
    return list if isinstance(raw, list | tuple) else dict if isinstance(raw, dict) else None


def _parse_mapping(raw: Any, path: str) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(value, str) for pair in raw.items() for value in pair):
        raise OptionError(path, f"expected a mapping of text to text, got {show(raw)}")
    return dict(raw)


def _parse_component(kind: type[Component], raw: Any, path: str) -> Component:
    known = components(kind)
    if isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, dict):
        raise OptionError(path, f"expected one of {', '.join(known)} (or a mapping with its `name`), got {show(raw)}")
    if "name" not in raw:
        raise OptionError(f"{path}.name", f"missing; expected one of {', '.join(known)}")
    name = raw["name"]
    if isinstance(name, str) and RENAMED.get(name) in known:
        raise OptionError(f"{path}.name", f"{name!r} is not known; it is called {RENAMED[name]!r} now")
    if isinstance(name, str) and name in MOVED and name not in known:
        raise OptionError(f"{path}.name", f"{name!r} is not known; {MOVED[name]}")
    if not isinstance(name, str) or name not in known:
        raise OptionError(f"{path}.name", f"{show(name)} is not known; {suggest(show(name), known)}")
    options = {key: value for key, value in raw.items() if key != "name"}
    return typing.cast(Component, _parse_options(known[name], options, path))


@cache
def _types_of(cls: type[Options]) -> dict[str, Any]:
    """The types of a class's options by name."""
    return typing.get_type_hints(cls)


def _parse_options(cls: type[Options], raw: Any, path: str) -> Options:
    prefix = f"{path}." if path else ""
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise OptionError(path, f"expected a mapping of options, got {show(raw)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    mistakes = [OptionError(f"{prefix}{dotted([key])}", _unknown(key, cls)) for key in raw if key not in fields]
    for name, field in fields.items():
        if name not in raw and field.default is dataclasses.MISSING:
            mistakes.append(OptionError(f"{prefix}{name}", f"missing: {field.metadata['help']}"))
    types_by_name = _types_of(cls)  # type: ignore[arg-type]  # mypy takes `__hash__` of its instances for its own
    values = {}
    for name in (name for name in raw if name in fields):
        value, default = raw[name], fields[name].default
        if isinstance(default, Component) and isinstance(value, dict) and "name" not in value:
            value = {"name": name_of(default), **value}
        try:
            values[name] = _parse(types_by_name[name], value, f"{prefix}{name}")
        except OptionError as error:
            mistakes += [error, *error.others]
    if not mistakes:
        try:
            return cls(**values)
        except OptionError as error:
            error = error.in_section(path)
            mistakes += [error, *error.others]
    else:
        mistakes += [error.in_section(path) for error in out_of_bounds(cls, values)]
    raise OptionError(mistakes[0].option, mistakes[0].message, mistakes[1:])


def _unknown(key: Any, cls: type[Options]) -> str:
    """Return what to say of a key that a `cls` has no option for."""
    names = [field.name for field in dataclasses.fields(cls)]
    if RENAMED.get(key) in names:
        return f"unknown key; it is called {RENAMED[key]!r} now"
    elsewhere = next(_options_called(key, cls), None)
    if elsewhere is not None:
        return f"unknown key; did you mean {elsewhere!r}?"
    return f"unknown key; {suggest(dotted([key]), names)}" if names else "unknown key; there are no options here"


def _options_called(key: Any, cls: type[Options]) -> Iterator[str]:
    """The dotted keys of all options called `key` in the groups below a `cls` as it is by default, nearest first."""
    groups = [(field.name, field.default) for field in dataclasses.fields(cls)]
    for name, group in groups:  # grows in the loop
        if isinstance(group, Options):
            inner = [field.name for field in dataclasses.fields(group)]
            yield from (f"{name}.{key}" for each in inner if each == key)
            groups += [(f"{name}.{each}", getattr(group, each)) for each in inner]


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
    if annotation is int and isinstance(raw, int) and not isinstance(raw, bool):
        words[int] = "a whole number of less than 64 bits"
    raise OptionError(path, f"expected {words.get(annotation, annotation)}, got {show(raw)}")
