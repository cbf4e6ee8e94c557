"""Runs of a sweep that train together: each comes to what it would alone, and what ends one leaves the others alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import TOLERANCE, assert_states_close, comparable, load_clip
from safetensors.torch import load, save_file

from flora.config.parse import parse_config
from flora.config.schema import ExperimentConfig
from flora.core.hooks import Hooks
from flora.core.interrupts import Interrupted
from flora.engine import training
from flora.engine.together import Member
from flora.runs.loop import resume, simulate
from flora.sweep import __main__ as sweep
from flora.sweep.folding import described, foldable, why_alone
from flora.sweep.runs import bring_to_their_end


@pytest.fixture
def base(raw_config: dict[str, Any], tiny_model: str, tmp_path: Path) -> dict[str, Any]:
    """A configuration in double precision whose weights are the same for each seed."""
    weights = tmp_path / "weights.safetensors"
    save_file(load_clip(tiny_model, "cpu", "fp32").model.state_dict(), weights)
    backbone = {"model": tiny_model, "weights": str(weights), "precision": "fp64"}
    return {**raw_config, "backbone": backbone, "rounds": 3}


def changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with some values, by `a.b` keys, replaced."""
    raw = json.loads(json.dumps(base))
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = raw
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = value
    return raw


def runs_of(base: dict[str, Any], folder: Path, changes: Sequence[dict[str, Any]]) -> list[ExperimentConfig]:
    return [
        parse_config({**changed(base, each), "output": str(folder), "name": f"run-{number}"})
        for number, each in enumerate(changes)
    ]


def assert_close(left: Any, right: Any) -> None:
    """Assert that JSON content is the same, numbers to the tolerance of double precision."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key, each in left.items():
            assert_close(each, right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_close(*pair)
    elif isinstance(left, float):
        assert left == pytest.approx(right, abs=TOLERANCE, rel=TOLERANCE, nan_ok=True)
    else:
        assert left == right


def assert_same_runs(left: Path, right: Path) -> None:
    ours, alone = comparable(left), comparable(right)
    assert ours.keys() == alone.keys()
    for name, content in ours.items():
        if name.endswith(".safetensors"):
            assert_states_close(load(content), load(alone[name]))
        elif isinstance(content, bytes):
            assert name == "config.yaml" or content == alone[name], name
        elif not name.endswith("manifest.json"):  # digests of what is compared above
            assert_close(content, alone[name])


SWEEPS: dict[str, list[dict[str, Any]]] = {
    "rates and seeds": [{"local.learning_rate": rate, "seed": seed} for rate in (0.01, 0.003) for seed in (0, 1)],
    "partition, cohort, rounds": [
        {"partition": "iid", "rounds": 4, "evaluation": {"every": 2}},
        {"clients.cohort": {"name": "uniform", "number": 1}, "seed": 3},
        {"clients.number": 3, "local.epochs": 2, "local.schedule": "cosine"},
    ],
    "server": [
        {"server.strategy": "ffa_lora"},
        {"server.optimizer": "adam", "seed": 1},
        {"server.aggregator": "median"},
        {"communication.upload": {"name": "top_k", "fraction": 0.5}, "communication.error_feedback": True},
        {"local.correction": {"name": "fedprox", "mu": 0.1}},
        {"local.correction": "feddyn"},
    ],
    "scaffold": [
        {"local.optimizer": "sgd", "local.correction": "scaffold", "local.learning_rate": rate, "seed": seed}
        for rate, seed in ((0.01, 0), (0.003, 1))
    ],
    "own adapters": [
        {"personal": {"name": "fine_tuning"}, "evaluation": {"num_local_only": 2}},
        {"personal": {"name": "ditto"}, "evaluation": {"num_local_only": 4}},
        {"seed": 1, "evaluation": {"clients_every": 1}},
    ],
    "phases and clusters": [
        {"server.strategy": {"name": "fedrep", "stay": ["*.lora_A"]}},
        {"server.strategy": {"name": "ifca"}},
        {"server.strategy": {"name": "ifca"}, "seed": 1},
    ],
    "copies": [{"personal": {"name": "apfl"}, "seed": seed} for seed in (0, 1)],
    "residuals": [{"server.strategy": "fedex_lora", "seed": seed} for seed in (0, 1)],
}


@pytest.mark.parametrize("changes", SWEEPS.values(), ids=SWEEPS)
def test_runs_together_come_to_what_each_does_alone(
    base: dict[str, Any], tmp_path: Path, changes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    together, alone = (runs_of(base, tmp_path / name, changes) for name in ("together", "alone"))
    blocks = watch_blocks(monkeypatch)
    assert bring_to_their_end(together, Hooks()) == {config.name: None for config in together}
    number = len(blocks)
    for config in alone:
        simulate(config)
    shares_steps = changes is not SWEEPS["residuals"]  # a residual has no axis for clients of several runs
    assert (number < len(blocks) - number) == shares_steps
    for ours, theirs in zip(together, alone, strict=True):
        assert_same_runs(Path(ours.output, ours.name), Path(theirs.output, theirs.name))
        environment = json.loads(Path(ours.output, ours.name, "environment.json").read_text())
        assert environment["runs_in_one_step"] == len(changes)


def watch_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of clients of all blocks that are trained from now on."""
    sizes: list[int] = []
    before = training.FlatStack.__init__

    def counted(self: Any, stack: Any, *arguments: Any) -> None:
        sizes.append(len(next(iter(stack.values()))))
        before(self, stack, *arguments)

    monkeypatch.setattr(training.FlatStack, "__init__", counted)
    return sizes


def test_a_run_that_fails_leaves_the_others_alone(base: dict[str, Any], tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"local.learning_rate": 1e200}, {"seed": 2}, {"seed": 1}]
    together, alone = (runs_of(base, tmp_path / name, changes) for name in ("together", "alone"))
    blocked = Path(together[2].output, together[2].name)
    blocked.mkdir(parents=True)
    (blocked / "notes.txt").write_text("mine")
    outcomes = bring_to_their_end(together, Hooks())
    assert [outcomes[config.name] is None for config in together] == [True, False, False, True]
    assert "not finite" in str(outcomes["run-1"])
    assert "notes.txt" in str(outcomes["run-2"]) or str(blocked) in str(outcomes["run-2"])
    for place in (0, 3):
        simulate(alone[place])
        ours, theirs = together[place], alone[place]
        assert_same_runs(Path(ours.output, ours.name), Path(theirs.output, theirs.name))


def test_runs_that_are_stopped_go_on_together_or_alone(base: dict[str, Any], tmp_path: Path) -> None:
    changes = [{"seed": 0, "rounds": 5}, {"seed": 1, "rounds": 6}, {"seed": 2, "rounds": 4}]
    together, whole = (runs_of(base, tmp_path / name, changes) for name in ("together", "whole"))
    calls = 0

    def stop(round: int, clients: Sequence[int]) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Interrupted(2)

    outcomes = bring_to_their_end(together, Hooks(before_block=stop))
    assert set(outcomes.values()) == {"stopped by SIGINT"}
    for config in together:
        assert "to go on: " in Path(config.output, config.name, "log.txt").read_text()
    resume(Path(together[0].output, together[0].name))
    assert set(bring_to_their_end(together, Hooks()).values()) == {None}
    for ours, theirs in zip(together, whole, strict=True):
        simulate(theirs)
        assert_same_runs(Path(ours.output, ours.name), Path(theirs.output, theirs.name))


def test_what_is_stopped_before_it_began_leaves_nothing(base: dict[str, Any], tmp_path: Path) -> None:
    together = runs_of(base, tmp_path / "together", [{"seed": seed} for seed in range(3)])

    def stop(round: int, clients: Sequence[int]) -> None:
        raise AssertionError("no step is taken")

    original = Member.call

    def interrupted(self: Member, function: Callable[[], Any]) -> Any:
        def signalled() -> Any:
            raise Interrupted(15)

        return original(self, signalled if self.number == 1 else function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Member, "call", interrupted)
        outcomes = bring_to_their_end(together, Hooks(before_block=stop))
    assert set(outcomes.values()) == {"stopped by SIGTERM"}
    assert not list((tmp_path / "together").glob("*/rounds.jsonl"))
    assert set(bring_to_their_end(together, Hooks()).values()) == {None}


def test_who_trains_together(base: dict[str, Any], tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"seed": 0},
        {"seed": 1, "local.learning_rate": 0.1},
        {"adapter.rank": 4},
        {"local.augmentation": "crop_flip"},
        {"adapter": "full"},
        {"partition": "iid"},
    ]
    configs = runs_of(base, tmp_path, changes)
    groups = [[config.name for config in group] for group in foldable(configs, most=64, jobs=1)]
    assert groups == [["run-0", "run-1", "run-5"], ["run-2"], ["run-3"], ["run-4"]]
    assert why_alone(configs[0]) is None
    lines = described(foldable(configs, most=64, jobs=1))
    assert lines == [
        "3 runs train together: run-0 ... run-5",
        "by itself: run-2: no other one here has the same steps",
        "by itself: run-3: local.augmentation changes images at each use",
        "by itself: run-4: adapter is as large as the model",
    ]
    assert [len(group) for group in foldable(configs, most=2, jobs=1)] == [2, 1, 1, 1, 1]
    assert [len(group) for group in foldable(configs, most=1, jobs=1)] == [1] * 6
    assert [len(group) for group in foldable(configs[:2], most=64, jobs=2)] == [1, 1]
    random = dataclasses.replace(configs[0].backbone, weights="random", model="ViT-B-32")
    seeds = [dataclasses.replace(config, backbone=random) for config in configs[:2]]
    assert len(foldable(seeds, most=64, jobs=1)) == 2


def test_folding_from_the_command_line(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(base))
    arguments = [str(path), "local.learning_rate=0.01,0.02", "seed=0,1"]
    assert sweep.main([*arguments, "--output", str(tmp_path / "together")]) == 0
    assert "4 runs train together: " in capsys.readouterr().err
    assert sweep.main([*arguments, "--output", str(tmp_path / "alone"), "--fold", "off"]) == 0
    assert "together" not in capsys.readouterr().err
    names = sorted(path.parent.name for path in (tmp_path / "together").glob("*/summary.json"))
    assert len(names) == 4
    for name in names:
        assert_same_runs(tmp_path / "together" / name, tmp_path / "alone" / name)
    for wrong in ("0", "on", "-1"):
        assert sweep.main([*arguments, "--fold", wrong]) == 2
        error = capsys.readouterr().err
        assert error == f"--fold: expected auto, off or a whole number of at least 1, got {wrong!r}\n"


def test_seconds_of_runs_together_add_up(base: dict[str, Any], tmp_path: Path) -> None:
    """Each run's clock runs for its share alone, so that none is told that it took what others did."""
    together = runs_of(base, tmp_path, [{"seed": seed} for seed in range(4)])
    bring_to_their_end(together, Hooks())
    summaries = [json.loads(Path(each.output, each.name, "summary.json").read_text()) for each in together]
    own = sum(each["train_seconds"] + each["eval_seconds"] for each in summaries)
    assert 0 < own <= max(each["wall_seconds"] for each in summaries)
    assert all(math.isfinite(each["train_seconds"]) for each in summaries)
    assert np.all([each["train_seconds"] > 0 for each in summaries])
