"""Runs side by side: those that differ in their seed alone are one group, named by what tells it from others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flora.report.reading import RunFiles

# Settings by which runs of one line may differ: their names, their seeds, and what decides no result, such as what else
# is measured. Where weights and data lie is compared: others may lie there.
NOT_COMPARED = ("name", "output", "seed", "preset", "scenario", "device", "threads", "clients.per_block", "cache",
                "checkpoints", "trackers", "data.download", "evaluation.every", "evaluation.clients_every",
                "evaluation.batch_size", "evaluation.num_local_only", "evaluation.centralized", "evaluation.templates",
                "evaluation.also", "evaluation.held_classes", "evaluation.auroc", "evaluation.predictions")  # fmt: skip
# Settings that a group is named by.
MAX_NAMED = 4
# What stands for a setting that a run does not have.
NONE = "–"


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but their seeds, under the name that tells them from others."""

    name: str
    runs: tuple[RunFiles, ...]
    settings: Mapping[str, Any]


def groups_of(runs: Sequence[RunFiles]) -> list[Group]:
    """Return the runs by what they differ in, in their order, each group named by it."""
    flat = {id(run): _compared(_flat(run.settings, "")) for run in runs}
    gathered: dict[str, list[RunFiles]] = {}
    for run in runs:
        gathered.setdefault(json.dumps(flat[id(run)], sort_keys=True, default=str), []).append(run)
    settings = [flat[id(members[0])] for members in gathered.values()]
    keys, first_names = naming(settings), [members[0].name for members in gathered.values()]
    names = [name_by(own, keys) or first for own, first in zip(settings, first_names, strict=True)]
    if len(keys) > MAX_NAMED or len(set(names)) < len(names):
        names = first_names
    return [
        Group(name, tuple(members), own) for name, members, own in zip(names, gathered.values(), settings, strict=True)
    ]


def _flat(nested: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _compared(flat: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat.items()
        if not any(key == name or key.startswith(f"{name}.") for name in NOT_COMPARED)
    }


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values are not the same in all."""
    keys = dict.fromkeys(key for own in settings for key in own)
    return [key for key in keys if len({plain(own.get(key, NONE)) for own in settings}) > 1]


def naming(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return few keys that tell all settings from each other: those of components first, then those that tell most."""
    keys = differing(settings)
    chosen: list[str] = []

    def worth(key: str) -> tuple[bool, int]:
        gain = _num_told(settings, [*chosen, key]) - _num_told(settings, chosen)
        return gain > 0 and key.endswith(".name"), gain

    while keys and worth(best := max(keys, key=worth))[1] > 0:
        chosen.append(best)
    return chosen


def _num_told(settings: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int:
    """Count the different combinations of values that settings have for `keys`."""
    return len({tuple(plain(own.get(key, NONE)) for key in keys) for own in settings})


def name_by(settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    """What settings are called by the values of `keys`: "lora, learning rate 0.01"."""
    parts = []
    for key in keys:
        section, _, last = key.rpartition(".")
        is_unique = [other.rpartition(".")[2] for other in keys].count(last) == 1
        short, value = last.replace("_", " ") if is_unique else key, settings.get(key, NONE)
        if key not in settings:  # a whole section, or an option of another component
            parts += [short] if any(other.startswith(f"{key}.") for other in settings) else []
        elif last == "name":
            parts.append(f"{section.rpartition('.')[2]} none" if value == "none" else plain(value))
        else:
            parts.append(f"no {short}" if value is None else f"{short} {plain(value)}")
    return ", ".join(parts)


def alike_but_for(groups: Sequence[Group], key: str) -> list[list[Group]]:
    """Return the groups that have a setting, those together that differ in nothing but this."""
    gathered: dict[str, list[Group]] = {}
    for group in groups:
        if key in group.settings:
            others = {name: value for name, value in group.settings.items() if name != key}
            gathered.setdefault(json.dumps(others, sort_keys=True, default=str), []).append(group)
    return list(gathered.values())


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
