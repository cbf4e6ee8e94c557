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
            parts += ["", f"{field.name}: {_summary(type(field.default))}", *_options(type(field.default), 2)]
    for kind in sorted(kinds(), key=lambda kind: kind.__name__):
        parts += ["", f"{kind.__name__.upper()}: {_summary(kind)}"]
        for name, component in components(kind).items():
            parts += [f"  {name}: {_summary(component)}", *_options(component, 6)]
    parts += ["", "PRESETS: sets of values below an experiment's own"]
    for name in PRESETS:
        preset = presets.read_preset(name)
        parts += [f"  {name}: {preset.about}", *(f"      {line}" for line in presets.lines(preset))]
    return "\n".join(parts)


def _options(cls: type[Options], indent: int) -> list[str]:
    rows = []
    for field in dataclasses.fields(cls):
        bounds: Bounds = field.metadata["bounds"]
        allowed = f" [{bounds.describe()}]" if bounds != Bounds() else ""
        rows.append(f"{' ' * indent}{field.name}: {_default(field.default)}  {field.metadata['help']}{allowed}")
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


def _summary(cls: type[Options]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]
