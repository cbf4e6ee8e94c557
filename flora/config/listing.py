"""`--list`: every component with its options, defaults and one line each, read off the classes themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

from flora import catalogue  # noqa: F401  (the catalogue registers the components)
from flora.config import presets
from flora.config.parse import config_to_dict
from flora.config.presets import PRESETS
from flora.config.schema import ExperimentConfig
from flora.core.registry import Bounds, Component, Options, components, kinds, name_of


def list_components() -> str:
    """The text that `--list` prints: the sections of a config, then the components by kind."""
    parts = ["SECTIONS of an experiment (key: default, what it is)", *_options(ExperimentConfig, 2)]
    for field in dataclasses.fields(ExperimentConfig):
        if isinstance(field.default, Options) and not isinstance(field.default, Component):
            parts += ["", f"{field.name}: {summary_of(type(field.default))}", *_options(type(field.default), 2)]
    for kind in sorted(kinds(), key=lambda kind: kind.__name__):
        parts += ["", f"{kind.__name__.upper()}: {summary_of(kind)}"]
        for name, component in components(kind).items():
            parts += [f"  {name}: {summary_of(component)}", *_options(component, 6)]
    parts += ["", "PRESETS: sets of values below an experiment's own"]
    for name in PRESETS:
        preset = presets.read_preset(name)
        parts += [f"  {name}: {preset.about}", *(f"      {line}" for line in presets.lines(preset))]
    return "\n".join(parts)


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
