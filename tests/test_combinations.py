"""Every pair of options either runs for two rounds or is refused in one line: `make stress` tries all of them."""

from __future__ import annotations

import itertools
import math
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, load_clip

from flora.client.corrections import Correction
from flora.client.objectives import Objective
from flora.client.optimizers import Optimizer
from flora.client.penalties import Penalty
from flora.client.personalization import Personalization
from flora.client.sampling import LocalSampling
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.files import peft_files
from flora.clip.adapters.lora import Lora
from flora.clip.towers.tokens import TokenReduction
from flora.communication.compressors import Compressor
from flora.communication.sampling import Sampler
from flora.config.combinations.table import RULES
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.errors import UserError
from flora.core.registry import Component, components
from flora.core.rng import Rng
from flora.data.augmentation import Augmentation
from flora.data.partition import Partitioner
from flora.data.splits import Splitter
from flora.evaluation.metrics import METRICS
from flora.experiment.build import build_experiment
from flora.federated.round import run_round
from flora.privacy.canaries import Canaries
from flora.privacy.mechanisms import Privacy
from flora.runs.measure import measure, measure_centralized, measure_local_only
from flora.server.aggregators import Aggregator
from flora.server.optimizers import ServerOptimizer
from flora.server.strategies.base import Strategy

START = Path(tempfile.mkdtemp(prefix="flora-start-"))
THINGS = str(Path(__file__).with_name("things.json"))
NETWORK = {"network": {"name": "drawn", "dropout": 0.1, "availability": 0.9}}
# What a component can't do without.
NEEDS: dict[str, dict[str, Any]] = {
    "scaffold": {"local": {"optimizer": "sgd"}},
    "feddyn": {"local": {"optimizer": "sgd"}},
    "few_shot_chunks": {"clients": {"number": 3}},
    "poisson": {"clients": {"cohort": {"fraction": 0.7}}},
    **{name: {"privacy": {"clip_norm": 0.1, "noise_multiplier": 0.5}} for name in ("central", "local", "tree")},
    "banded": {
        "privacy": {"clip_norm": 0.1, "noise_multiplier": 0.5, "bands": 2},
        "clients": {"cohort": {"name": "in_turn", "number": 2}},
    },
    "distributed_discrete_gaussian": {
        "privacy": {"clip_norm": 0.1, "noise_multiplier": 0.5, "encoding": "rotated"},
        "server": {"secure_sum": "pairwise_masks"},
    },
    "directions": {"canaries": {"number": 3}},
    "clients": {"canaries": {"number": 3}},
    "examples": {"canaries": {"number": 6}},
    "leave_domain_out": {"split": {"domain": "x"}},
    "given_sizes": {"partition": {"sizes": [5, 6, 7, 8]}},
    "within_groups": {"partition": {"of": "iid"}},
    "fedper": {"server": {"strategy": {"stay": ["*.lora_B", "*.weight"]}}},
    "fedrep": {"server": {"strategy": {"stay": ["*.lora_B"]}}},
}
KINDS: dict[str, type[Component]] = {
    "adapter": Adapter,
    "partition": Partitioner,
    "split": Splitter,
    "local.objective": Objective,
    "local.sampling": LocalSampling,
    "local.optimizer": Optimizer,
    "local.penalty": Penalty,
    "local.correction": Correction,
    "local.augmentation": Augmentation,
    "backbone.tokens": TokenReduction,
    "personal": Personalization,
    "clients.cohort": Sampler,
    "server.strategy": Strategy,
    "server.aggregator": Aggregator,
    "server.optimizer": ServerOptimizer,
    "communication.upload": Compressor,
    "communication.broadcast": Compressor,
    "canaries": Canaries,
    "privacy": Privacy,
}
OTHERS: dict[str, dict[str, Any]] = {
    "local.optimizer_state=kept": {"local": {"optimizer_state": "kept"}},
    "local.schedule=cosine": {"local": {"schedule": {"name": "cosine", "warmup_rounds": 1}}},
    "local.clip_norm": {"local": {"clip_norm": 0.5}},
    "adapter.start": {"adapter": {"name": "lora", "start": str(START)}},
    "evaluation.auroc": {"evaluation": {"auroc": True}},
    "evaluation.also": {"evaluation": {"also": ["digits"]}},
    "evaluation.held_classes": {"evaluation": {"held_classes": True}},
    "clients.held_out_fraction": {"clients": {"held_out_fraction": 0.3}},
    "evaluation.centralized": {"evaluation": {"centralized": True}},
    "local.privacy": {"local": {"privacy": {"accountant": "rdp"}}},
    "privacy.clip_norm=adaptive": {
        "privacy": {"name": "central", "clip_norm": {"name": "adaptive"}, "noise_multiplier": 0.5}
    },
    "privacy.publish=false": {
        "privacy": {"name": "central", "clip_norm": 0.1, "noise_multiplier": 0.5, "publish": False},
        "evaluation": {"num_local_only": 0},
    },
    "local.steps": {"local": {"steps": 2}},
    "server.screening=clip": {"server": {"screening": {"policy": "clip", "max_norm_ratio": 1.5}}},
    "communication.error_feedback": {"communication": {"error_feedback": True, "upload": "top_k"}},
    "clients.ranks": {"clients": {"ranks": {"name": "drawn", "values": [1, 2]}}},
    "server.synthetic": {"server": {"synthetic": {"data": "patterns", "steps": 2}}},
    "server.text_rounds": {"server": {"text_rounds": {"descriptions": THINGS, "steps": 2}}},
    "server.distillation": {"server": {"distillation": {"data": "patterns", "num_images": 9, "steps": 2}}},
    "server.secure_sum": {"server": {"secure_sum": {"name": "pairwise_masks", "dropout": [0, 0, 0.1, 0.1]}}},
    "evaluation.fusion": {"evaluation": {"fusion": "entropy", "patches": {"alpha": 0.5}}},
    "clients.labelled_fraction": {"clients": {"labelled_fraction": 0.5}},
    "local.self_training": {
        "local": {"self_training": {"threshold": 0.3, "preference": "dpo"}},
        "clients": {"labelled_fraction": 0.5},
    },
    "cache.views": {"cache": {"views": 2}, "local": {"augmentation": "crop_flip"}},
    "clients.centralized": {"clients": {"centralized": True}},
    "network": NETWORK,
    "server.stragglers": {"server": {"stragglers": {"over_selection": 1.5, "deadline_seconds": 2.0}}, **NETWORK},
    "server.schedule=buffered": {"server": {"schedule": {"name": "buffered", "buffer": 2}}, **NETWORK},
    "prompts.descriptions": {"prompts": {"descriptions": THINGS}},
    "local.prompts=random": {"local": {"prompts": "random"}, "prompts": {"templates": ["a {}", "the {}"]}},
    "evaluation.templates": {"evaluation": {"templates": ["a {}", "the {} itself"]}},
    "cache.storage=bfloat16": {"cache": {"storage": "bfloat16"}},
    "data.jpeg_side": {"data": {"jpeg_side": 16}},
    "cache.enabled=false": {"cache": {"enabled": False}},
    "trackers": {"trackers": ["csv"]},
    "backbone.precision=bf16": {"backbone": {"precision": "bf16"}},
}


def nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the second one's values in the first one's places; a component's name alone gives way to its mapping."""
    result = dict(one)
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), str):
            result[key] = {"name": result[key], **value}
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and is_same(result[key], value):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two mappings may be options of one component."""
    return "name" not in one or "name" not in other or one["name"] == other["name"]


@cache
def settings() -> dict[str, tuple[str, dict[str, Any]]]:
    """Each choice that is not the default: the setting that it is of, and what to write."""
    default = parse_config({"data": "patterns", "partition": "iid"})
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for key, kind in KINDS.items():
        value: Any = default
        for part in key.split("."):
            value = getattr(value, part)
        for name, component in components(kind).items():
            if type(value) is not component and component.__module__.startswith("flora."):
                written = merged(nested(key, {"name": name}), NEEDS.get(name, {}))
                found[f"{key}={name}"] = (key, written)
    return found | {name: (name, written) for name, written in OTHERS.items()}


def pairs() -> Iterator[tuple[str, str]]:
    known = settings()
    yield from ((one, other) for one, other in itertools.combinations(known, 2) if known[one][0] != known[other][0])


def raw_of(base: Mapping[str, Any], pair: tuple[str, str]) -> dict[str, Any]:
    known = settings()
    return merged(merged(base, known[pair[0]][1]), known[pair[1]][1])


@pytest.fixture(autouse=True, scope="module")
def start(tiny_model: str) -> Iterator[None]:
    """The adapter that `adapter.start` names."""
    options = Lora(rank=2)
    state = options.attach(load_clip(tiny_model, precision="fp32")).initial_state(Rng(0))
    for name, content in peft_files(state, options).items():
        (START / name).write_bytes(content)
    yield
    shutil.rmtree(START)


def two_rounds(raw: Mapping[str, Any]) -> str | None:
    """Run two rounds and look at everything that comes of them; return what refuses the configuration, if something."""
    try:
        config = parse_config(raw)
        check_experiment(config)
        experiment = build_experiment(config)
    except UserError as error:
        return str(error)
    state = experiment.initial_state()
    for _ in range(2):
        state, result = run_round(experiment.federation, state)
        record, _ = measure(experiment, state, result)
        assert record.metrics.keys() == METRICS.keys()
        assert tree.is_finite(state.adapter) and math.isfinite(record.accuracy)
        assert not result.rejected_clients
    if config.evaluation.centralized:
        measure_centralized(experiment, advance=lambda done: None)
    if config.evaluation.num_local_only:
        measure_local_only(experiment, state, advance=lambda done: None)
    return None


ALL_PAIRS = list(pairs())
SAMPLE = random.Random(0).sample(ALL_PAIRS, 48)


@pytest.mark.parametrize("group", [SAMPLE[start::4] for start in range(4)], ids=range(4))
def test_a_pair_of_options_runs_or_is_refused(raw_config: dict[str, Any], group: list[tuple[str, str]]) -> None:
    try_all(raw_config, group)


@pytest.mark.stress
@pytest.mark.parametrize("group", [ALL_PAIRS[start::16] for start in range(16)], ids=range(16))
def test_every_pair_of_options_runs_or_is_refused(raw_config: dict[str, Any], group: list[tuple[str, str]]) -> None:
    try_all(raw_config, group)


def try_all(raw_config: dict[str, Any], group: list[tuple[str, str]]) -> None:
    base = merged(raw_config, {"partition": {"name": "iid"}, "evaluation": {"num_local_only": 1}})
    for pair in group:
        raw = raw_of(base, pair)
        try:
            reason = two_rounds(raw)
        except Exception as error:
            raise AssertionError(f"{pair}: {type(error).__name__}: {error}") from error
        if reason is not None:
            assert "\n" not in reason and ": " in reason, (pair, reason)


def test_every_rule_refuses_something_and_names_its_setting(raw_config: dict[str, Any]) -> None:
    """No rule is dead: for each there is a pair of options, or three, that it alone stands against."""
    used: set[int] = set()
    for pair in ALL_PAIRS:
        try:
            config = parse_config(raw_of(raw_config, pair))
        except UserError:
            continue
        used |= {place for place, rule in enumerate(RULES) if rule.refuses(config)}
    never = [rule.what for place, rule in enumerate(RULES) if place not in used]
    assert never == [
        "and a strategy that weighs each client by itself (a method `weight`, not `weights`)",  # no shipped one has
        "and no table of predictions, which are one model's",  # no pair here has one
        "a policy for stragglers needs a network",  # all pairs here have one
        "a buffered schedule needs a network",  # all pairs here have one
        "and rounds enough to have one",  # every is 1
        "synthetic images, on which the server trains before round 1, need a round",  # all pairs here have two
        "prompts can be drawn where classes have several",  # the pairs have descriptions then
        "images that are augmented have no features to keep, unless a number of views of each is kept (cache.views)",
        "self-training needs images without a label",  # all pairs here have some
        "and no run that one client's update ends",  # all pairs here skip or clip
        "noise of several bands (privacy banded) needs cohorts in turn (clients.cohort in_turn)",  # its pairs have them
        "and no dropout",  # no adapter here has any
        "noise that clients share (distributed_discrete_gaussian) needs a secure sum",  # its pairs have one
    ]


def test_the_model_of_the_pairs_is_tiny() -> None:
    assert TINY["embed_dim"] == 16 and torch.get_num_threads() == 1
