"""Presets: named sets of values for what an experiment's own file doesn't say.

`PRESETS[name]` is a preset. Its `values` are nested like a YAML file's. Its `options` say, by the dotted key of a
component and by the component's name, what that component's options are wherever it is chosen. Its `methods` are
values too, by what clients train (`adapter`), and lie above `values`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

Nested = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """What an experiment is where its own file doesn't say."""

    about: str
    values: Nested = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Nested]] = field(default_factory=dict)
    methods: Mapping[str, Nested] = field(default_factory=dict)


_PAPER = Preset(
    about="as FLoRA's released code (arXiv:2404.15182)",
    values={
        "rounds": 50,
        "backbone": {"model": "ViT-B-32-quickgelu", "weights": "openai"},
        "split": "merged",
        "adapter": "lora",
        "clients": {"number": 10, "cohort": "uniform", "holdout_fraction": 0.0},
        "local": {
            "learning_rate": 5e-5,
            "epochs": 1,
            "batch_size": 128,
            "optimizer": "adam",
            "optimizer_state": "kept",
            "schedule": "constant",
            "clip_norm": None,
            "objective": "contrastive",
            "augmentation": "none",
        },
        "server": {"strategy": "fedavg"},
    },
    options={
        "adapter": {
            "lora": {
                "towers": ["text"],
                "targets": ["out"],
                "layers": None,
                "rank": 2,
                "alpha": 32.0,
                "scaling": "alpha",
                "dropout": 0.0,
                "init": "normal",
            }
        },
        "split": {"merged": {"test_fraction": 0.2}},
        "partition": {
            "dirichlet": {"concentration": 0.1, "minimum_examples": 1, "cap": 1.0},
            "pathological": {"classes_per_client": 4},
            "few_shot_overlapping": {"shots": 16},
            "few_shot_chunks": {"shots": 16},
        },
        "local.optimizer": {"adam": {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.2}},
        "server.strategy": {"fedavg": {"weighting": "examples"}},
    },
)

# Learning rates were chosen on validation images; docs/results.md says how.
_SMALL = Preset(
    about="what the table in docs/results.md compares methods with: few images, few rounds",
    values={
        "rounds": 10,
        "split": "sample",
        "adapter": "lora",
        "clients": {"holdout_fraction": 0.0},
        "local": {"learning_rate": 1e-2, "batch_size": 16, "schedule": "cosine"},
        "evaluation": {"every": 2},
    },
    options={"split": {"sample": {"num_train": 600, "num_test": 1000}}},
    methods={
        "full": {"local": {"learning_rate": 3e-4}},
        "linear_head": {"local": {"learning_rate": 3e-2}},
        "vision_and_head": {"local": {"learning_rate": 1e-3}},
        "clip_adapter": {"local": {"learning_rate": 1e-1}},
        "prompt_context": {"local": {"learning_rate": 3e-2}},
        "norm": {"local": {"learning_rate": 1e-1}},
    },
)

_AVERAGING = Preset(
    about="what the tables in docs/averaging.md compare ways of averaging with: twenty unlike clients, twenty rounds",
    values={
        "rounds": 20,
        "split": "sample",
        "adapter": "lora",
        "clients": {"number": 20},
        "local": {"learning_rate": 3e-2, "batch_size": 16, "schedule": "cosine"},
        "evaluation": {"every": 5},
        "checkpoints": {"every": None},
    },
    options={"split": {"sample": {"num_train": 4000, "num_test": 2000}}},
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "standard": Preset(
            about="official splits, cross-entropy over all classes, alpha/r: the default",
            values={"adapter": "lora"},
            # Chosen on validation images; docs/results.md says how.
            methods={method: {"local": {"learning_rate": 3e-3}} for method in ("lora", "dual_lora")},
        ),
        "paper": _PAPER,
        "small": _SMALL,
        "averaging": _AVERAGING,
    }
)
DEFAULT = "standard"


def with_preset(raw: Nested) -> Nested:
    """`raw` over the values of the preset that it names; unchanged if it names none that is known.

    What `raw` gives always wins, a null in place of a value included. Weights belong to their model: whoever names
    another one gets none from the preset. A component of another name takes nothing from the preset's choice.
    """
    name = raw.get("preset", DEFAULT)
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        return raw
    backbone = raw.get("backbone")
    if isinstance(backbone, Mapping) and "model" in backbone:
        preset = replace(preset, values={key: each for key, each in preset.values.items() if key != "backbone"})
    method = component_name(_over(preset.values, raw).get("adapter"))
    merged = _over(_over(preset.values, preset.methods.get(method or "", {})), raw)
    for key, by_name in preset.options.items():
        merged = _filled(merged, key.split("."), by_name)
    return dict(merged)


def lines(preset: Preset) -> Iterator[str]:
    """A preset's values as `key: value` with dotted keys."""
    yield from _flat(preset.values)
    for key, by_name in preset.options.items():
        for name, options in by_name.items():
            yield from (f"{line}  (where {key} is {name})" for line in _flat(options, f"{key}."))
    for method, values in preset.methods.items():
        yield from (f"{line}  (where adapter is {method})" for line in _flat(values))


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


def _over(below: Any, above: Any) -> Any:
    """`above` where it says something, else `below`. Options without a name belong to the component `below`."""
    if isinstance(below, str) and isinstance(above, Mapping) and "name" not in above:
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


def _filled(values: Any, path: list[str], by_name: Mapping[str, Nested]) -> Any:
    """`values` with the options of the component at `path` below those that it has, if `by_name` knows its name."""
    if not isinstance(values, Mapping) or path[0] not in values:
        return values
    inner = values[path[0]]
    if len(path) > 1:
        return {**values, path[0]: _filled(inner, path[1:], by_name)}
    options = by_name.get(component_name(inner) or "", {})
    return {**values, path[0]: _over({"name": component_name(inner), **options}, inner)} if options else values
