"""`--list`: every component with its options, defaults and one line each, read off the classes themselves."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from typing import Any

from flora import catalogue  # noqa: F401  (the catalogue registers the components)
from flora.config import presets
from flora.config.parse import config_to_dict
from flora.config.presets import PRESETS, SCENARIOS
from flora.config.schema import ExperimentConfig
from flora.core.registry import Bounds, Component, Options, components, kinds, name_of


def list_components() -> str:
    """The text that `--list` prints: the sections of a config, then the components by kind."""
    parts = ["SECTIONS of an experiment (key: default, what it is)", *_options(ExperimentConfig, 2)]
    for path, section in sections():
        parts += ["", f"{path}: {summary_of(section)}", *_options(section, 2)]
    for kind in sorted(kinds(), key=lambda kind: kind.__name__):
        parts += ["", f"{kind.__name__.upper()}: {summary_of(kind)}"]
        for name, component in components(kind).items():
            parts += [f"  {name}: {summary_of(component)}", *_options(component, 6)]
    parts += ["", "PRESETS: sets of values below an experiment's own"]
    for name in PRESETS:
        preset = presets.read_preset(name)
        parts += [f"  {name}: {preset.about}", *(f"      {line}" for line in presets.lines(preset))]
    parts += ["", "SCENARIOS: sets of values between an experiment's own and its preset's"]
    for name in SCENARIOS:
        scenario = presets.read_scenario(name)
        parts += [f"  {name}: {scenario.about}", *(f"      {line}" for line in presets.lines(scenario))]
    return "\n".join(parts)


def sections(cls: type[Options] = ExperimentConfig, prefix: str = "") -> Iterator[tuple[str, type[Options]]]:
    """The mappings of a configuration that are no components, with their dotted paths: those that may be none, too."""
    for name, annotation in typing.get_type_hints(cls).items():
        for kind in typing.get_args(annotation) or (annotation,):
            if inspect.isclass(kind) and issubclass(kind, Options) and not issubclass(kind, Component):
                yield f"{prefix}{name}", kind
                yield from sections(kind, f"{prefix}{name}.")


def _options(cls: type[Options], indent: int) -> list[str]:
    return [
        f"{' ' * indent}{key}: {default}  {about}" + (f" [{allowed}]" if allowed else "")
        for key, default, about, allowed in option_rows(cls)
    ]


def option_rows(cls: type[Options]) -> list[tuple[str, str, str, str]]:
    """The options of a class: key, default, what it is, what is allowed (empty: whatever its type allows)."""
    rows = []
    for field in dataclasses.fields(cls):
        bounds: Bounds = field.metadata["bounds"]
        allowed = bounds.describe() if bounds != Bounds() else ""
        rows.append((field.name, _default(field.default), field.metadata["help"], allowed))
    return rows


def _default(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "(required)"
    if isinstance(default, Component):
        return name_of(default)
    if isinstance(default, Options):
        return "(see below)"
    if default is None or isinstance(default, bool):
        return {None: "none", True: "true", False: "false"}[default]
    return str(config_to_dict(default)) if default != "" else '""'


def summary_of(cls: type[Options]) -> str:
    """The first line of what a class says of itself."""
    return (cls.__doc__ or "").strip().splitlines()[0]
