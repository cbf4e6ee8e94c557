"""Presets: YAML files in `flora/presets` with values for what an experiment's own file doesn't say.

A preset is written like an experiment. Below `where` it has sections that count only where the component at a key is
the one named: `adapter=full: {local: {learning_rate: 1.0e-3}}`. One rule merges them: the experiment's own file lies
above what `where` adds, and that above the preset's other values. A component of another name takes nothing from the
one below.

A scenario (`flora/presets/scenarios`) is a set of values, too: it lies between the preset and the experiment's file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flora.config.plain_yaml import read_plain_yaml

Nested = Mapping[str, Any]

FOLDER = Path(__file__).parents[1] / "presets"
PRESETS = ("standard", *sorted({path.stem for path in FOLDER.glob("*.yaml")} - {"standard"}))
DEFAULT = "standard"
SCENARIO_FOLDER = FOLDER / "scenarios"
SCENARIOS = tuple(sorted(path.stem for path in SCENARIO_FOLDER.glob("*.yaml")))
NO_SCENARIO = "none"


@dataclass(frozen=True)
class Preset:
    """A preset: what it is for, its values, and what it adds where a component is chosen, by `KEY=NAME`."""

    about: str
    values: Nested
    where: Mapping[str, Nested]


@dataclass(frozen=True)
class Scenario:
    """A scenario: what it is, its values, the settings that it needs beside them, and the figures that are its result.

    These are names of figures in a run's summary.
    """

    about: str
    values: Nested
    needs: tuple[str, ...]
    results: tuple[str, ...]


@cache
def read_scenario(name: str) -> Scenario:
    """The scenario of this name, one of `SCENARIOS`."""
    raw = dict(read_plain_yaml((SCENARIO_FOLDER / f"{name}.yaml").read_text()))
    about, needs, results = raw.pop("about"), tuple(raw.pop("needs", ())), tuple(raw.pop("results"))
    return Scenario(about, raw, needs, results)


@cache
def read_preset(name: str) -> Preset:
    """The preset of this name, one of `PRESETS`."""
    raw = dict(read_plain_yaml((FOLDER / f"{name}.yaml").read_text()))
    return Preset(about=raw.pop("about"), where=raw.pop("where", {}), values=raw)


def with_preset(raw: Nested) -> Nested:
    """`raw` over the values of the scenario and the preset that it names; unchanged if it names none that is known.

    What `raw` gives always wins, a null in place of a value included. Weights belong to their model: whoever names
    another one gets none from the preset.
    """
    name, scenario = raw.get("preset", DEFAULT), raw.get("scenario", NO_SCENARIO)
    if name not in PRESETS or scenario not in (NO_SCENARIO, *SCENARIOS):
        return raw
    if scenario != NO_SCENARIO:
        raw = _over(read_scenario(scenario).values, raw)
    preset = read_preset(name)
    backbone = raw.get("backbone")
    names_model = isinstance(backbone, Mapping) and "model" in backbone
    values: Any = {key: each for key, each in preset.values.items() if not (key == "backbone" and names_model)}
    chosen = _over(values, raw)
    for condition, added in preset.where.items():
        key, _, component = condition.partition("=")
        if component_name(_at(chosen, key)) == component:
            values = _over(values, _named(added, key.split("."), component))
    return dict(_over(values, raw))


def lines(preset: Preset | Scenario) -> Iterator[str]:
    """A preset's or a scenario's values as `key: value` with dotted keys."""
    yield from _flat(preset.values)
    for condition, added in getattr(preset, "where", {}).items():
        yield from (f"{line}  (where {condition.replace('=', ' is ')})" for line in _flat(added))


def _flat(values: Nested, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}: {'none' if value is None else value}"


def component_name(component: Any) -> str | None:
    """The name of a component as YAML gives it."""
    name = component.get("name") if isinstance(component, Mapping) else component
    return name if isinstance(name, str) else None


def _at(values: Any, key: str) -> Any:
    """Return what nested values have at a dotted key; None if that is nothing."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _named(values: Nested, path: list[str], name: str) -> Nested:
    """The values with the component's name among its options at `path`, if they have any."""
    inner = values.get(path[0])
    if not isinstance(inner, Mapping):
        return values
    return {**values, path[0]: _named(inner, path[1:], name) if len(path) > 1 else {"name": name, **inner}}


def _over(below: Any, above: Any) -> Any:
    """`above` where it says something, else `below`. Options without a name belong to the component `below`."""
    if isinstance(below, str) and isinstance(above, Mapping) and ("name" not in above or above["name"] == below):
        below = {"name": below}
    if isinstance(above, str) and isinstance(below, Mapping) and below.get("name") == above:
        return below
    if isinstance(below, Mapping) and above is None:  # a section without a line
        return below
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    if "name" in below and "name" in above and below["name"] != above["name"]:
        return above
    return {**below, **{key: _over(below.get(key), value) for key, value in above.items()}}
