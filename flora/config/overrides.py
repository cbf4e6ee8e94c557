"""`key=value` from the command line, set in the nested mapping that a YAML file gave."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flora.config.plain_yaml import YAML_ERRORS, read_plain_yaml, yaml_reason
from flora.config.presets import component_name, with_preset
from flora.core.errors import ConfigError
from flora.core.registry import Component, Options, dotted, name_of, show


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str], root: type[Options]) -> None:
    """Set in `raw`, the options of a `root`, what `overrides` say.

    Their order is of no matter: `adapter=lora` comes before `adapter.rank=4`. Who names the component that is there
    already keeps its options. Raises `ConfigError` if an override can't be read or applied, or if two have one key.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        key = override_key(override)
        shown = dotted(key.split("."))
        if key in values:
            raise ConfigError(f"command line: {shown} is given twice")
        try:
            values[key] = read_plain_yaml(override.partition("=")[2])
        except YAML_ERRORS as error:
            raise ConfigError(f"command line: {shown}: not valid YAML: {yaml_reason(error)}") from None
    for key in sorted(values, key=lambda key: (key.count("."), key not in ("preset", "scenario"), key)):
        _set(raw, key.split("."), values[key], root)


def override_key(override: str) -> str:
    """The dotted key of `key=value`. Raises `ConfigError` if there is none."""
    key, separator, _ = override.partition("=")
    key = key.strip()
    if not separator or not key or "" in key.split("."):
        raise ConfigError(f"command line: expected key=value with a dotted key, got {override!r}")
    return key


def _set(raw: dict[str, Any], keys: Sequence[str], value: Any, root: type[Options]) -> None:
    *parents, last = keys
    target = raw
    for depth, parent in enumerate(parents, start=1):
        inner = target.get(parent)
        if isinstance(inner, str):  # `partition: iid` is short for `partition: {name: iid}`
            inner = {"name": inner}
        if inner is not None and not isinstance(inner, dict):
            holder = dotted(parents[:depth])
            raise ConfigError(f"command line: {dotted(keys)}: {holder} is {show(inner)}, not a mapping")
        target[parent] = inner or {}
        target = target[parent]
    before, name = target.get(last), component_name(value)
    if isinstance(before, dict) and name is not None and name == _name_there(raw, keys, root):
        value = {**before, **(value if isinstance(value, dict) else {"name": name})}
    target[last] = value


def _name_there(raw: Mapping[str, Any], keys: Sequence[str], root: type[Options]) -> str | None:
    """The name of the component at `keys`: as `raw` gives it, as its preset does, or the default's."""
    value: Any = with_preset(raw)
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if component_name(value) is not None:
        return component_name(value)
    default: Any = {field.name: field.default for field in dataclasses.fields(root)}.get(keys[0])
    for key in keys[1:]:
        default = getattr(default, key, None)
    return name_of(default) if isinstance(default, Component) else None
