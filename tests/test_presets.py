"""A preset lies below an experiment's own values, shows in the resolved config, and says what it promises."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from flora.client.objectives import Contrastive, CrossEntropy
from flora.client.optimizers import Adam, Constant, Sgd
from flora.clip.adapters.full import FullFineTuning
from flora.clip.adapters.lora import Lora
from flora.config import presets
from flora.config.listing import list_components
from flora.config.parse import config_to_dict, load_config, parse_config
from flora.config.presets import PRESETS, Preset, read_preset, with_preset
from flora.config.schema import ExperimentConfig
from flora.core.errors import ConfigError
from flora.data.datasets.digits import Digits
from flora.data.few_shot import FewShotChunks, FewShotOverlapping
from flora.data.partition import Dirichlet, Iid, Pathological
from flora.data.splits import Merged, Official
from flora.runs.resume import resumed_config
from flora.server.strategies.averaging import FedAvg
from flora.simulate import simulate

GIVEN: dict[str, Any] = {"name": "x", "preset": "paper", "data": "digits", "partition": "iid"}


def test_the_papers_preset_is_what_its_code_does() -> None:
    config = parse_config(GIVEN)
    assert config.adapter == Lora(
        towers=("text",), targets=("out",), layers=None, rank=2, alpha=32.0, scaling="alpha", dropout=0.0, init="normal"
    )
    assert (config.backbone.model, config.backbone.weights) == ("ViT-B-32-quickgelu", "openai")
    assert config.split == Merged(test_fraction=0.2)
    assert config.local.optimizer == Adam(beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.2)
    assert (config.local.learning_rate, config.local.optimizer_state) == (5e-5, "kept")
    assert (config.local.batch_size, config.local.epochs, config.rounds) == (128, 1, 50)
    assert config.local.objective == Contrastive()
    assert config.local.schedule == Constant()
    assert config.server.strategy == FedAvg(weighting="examples")
    assert (config.clients.number, config.clients.holdout_fraction) == (10, 0.0)
    assert config.clients.cohort.cohort_size(10) == 10


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("iid", Iid()),
        ("dirichlet", Dirichlet(concentration=0.1, cap=1.0)),
        ({"name": "dirichlet", "concentration": 0.5}, Dirichlet(concentration=0.5, cap=1.0)),
        ({"name": "dirichlet", "cap": None}, Dirichlet(concentration=0.1, cap=None)),
        ("pathological", Pathological(classes_per_client=4)),
        ("few_shot_overlapping", FewShotOverlapping(shots=16)),
        ({"name": "few_shot_chunks", "shots": 8}, FewShotChunks(shots=8)),
    ],
)
def test_options_follow_the_component_that_is_chosen(given: Any, expected: object) -> None:
    assert parse_config({**GIVEN, "partition": given}).partition == expected


def test_what_the_file_says_wins() -> None:
    config = parse_config(
        {
            **GIVEN,
            "split": "official",
            "adapter": {"rank": 4},
            "local": {"optimizer": {"beta2": 0.9}, "objective": {"name": "cross_entropy"}, "clip_norm": 1.0},
        }
    )
    assert config.split == Official()
    assert config.adapter == Lora(targets=("out",), rank=4, alpha=32.0, scaling="alpha", init="normal")
    assert config.local.optimizer == Adam(beta2=0.9, eps=1e-6, weight_decay=0.2)
    assert config.local.objective == CrossEntropy()
    assert config.local.batch_size == 128
    other = parse_config({**GIVEN, "adapter": "full", "local": {"optimizer": {"name": "sgd"}}})
    assert other.adapter == FullFineTuning()
    assert other.local.optimizer == Sgd()  # nothing of Adam's


@pytest.mark.parametrize("preset", PRESETS)
def test_the_resolved_config_shows_all_and_means_the_same(preset: str) -> None:
    config = parse_config({**GIVEN, "preset": preset})
    resolved = yaml.safe_load(yaml.safe_dump(config_to_dict(config)))
    assert resolved["preset"] == preset
    assert parse_config(resolved) == config


def test_overrides_from_the_command_line_win(tmp_path: Any) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(GIVEN))
    config = load_config(path, ["partition=dirichlet", "local.optimizer.weight_decay=0", "adapter.rank=3"])
    assert config.partition == Dirichlet(concentration=0.1, cap=1.0)
    assert config.local.optimizer == Adam(beta2=0.98, eps=1e-6, weight_decay=0.0)
    assert isinstance(config.adapter, Lora) and (config.adapter.rank, config.adapter.alpha) == (3, 32.0)
    assert load_config(path, ["preset=standard"]).local.objective == CrossEntropy()


@pytest.mark.parametrize("preset", ["papper", 3, None, ["paper"]])
def test_an_unknown_preset_is_one_line(tmp_path: Any, preset: Any) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({**GIVEN, "preset": preset}))
    with pytest.raises(
        ConfigError,
        match=r"x\.yaml: preset: expected (one of standard, averaging, flip, flip_small, paper, small|text), got",
    ):
        load_config(path)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, preset: Preset) -> None:
    """Have `preset` stand for that of a name."""
    monkeypatch.setattr(presets, "PRESETS", (name,))
    monkeypatch.setattr(presets, "read_preset", lambda asked: preset)


def test_values_by_method_lie_between(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = Preset(
        about="a test",
        values={"adapter": "lora", "rounds": 3, "local": {"learning_rate": 0.1, "batch_size": 4}},
        where={"adapter=full": {"local": {"learning_rate": 0.2}}, "adapter=lora": {"rounds": 7}},
    )
    stand_in(monkeypatch, "test", preset)
    below = {"preset": "test"}
    assert with_preset(below)["rounds"] == 7
    full = with_preset({**below, "adapter": {"name": "full"}})
    assert (full["rounds"], full["local"]) == (3, {"learning_rate": 0.2, "batch_size": 4})
    own = with_preset({**below, "adapter": "full", "local": {"learning_rate": 0.3}})
    assert own["local"] == {"learning_rate": 0.3, "batch_size": 4}
    assert with_preset({**below, "adapter": {"rank": 3}})["adapter"] == {"name": "lora", "rank": 3}


def test_an_empty_section_says_nothing() -> None:
    assert parse_config({**GIVEN, "local": None, "clients": None, "server": None}) == parse_config(GIVEN)


def test_another_model_gets_no_weights_from_the_preset() -> None:
    config = parse_config({**GIVEN, "backbone": {"model": "quickstart"}})
    assert (config.backbone.model, config.backbone.weights) == ("quickstart", None)
    config = parse_config({**GIVEN, "backbone": {"precision": "bf16"}})
    assert (config.backbone.model, config.backbone.weights) == ("ViT-B-32-quickgelu", "openai")


def test_what_is_added_to_a_preset_later_does_not_change_a_run(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    simulate(parse_config({**raw_config, "rounds": 1}))
    path = tmp_path / "runs" / "test"
    stored = yaml.safe_load((path / "config.yaml").read_text())
    del stored["local"]["clip_norm"]  # as if the option had not existed then
    (path / "config.yaml").write_text(yaml.safe_dump(stored))
    later = Preset(about="later", values={"adapter": "lora", "local": {"clip_norm": 1e-9}}, where={})
    stand_in(monkeypatch, "standard", later)
    assert resumed_config(path, []).local.clip_norm is None


def test_nothing_given_is_changed() -> None:
    raw = {**GIVEN, "local": {"optimizer": {"beta2": 0.9}}, "partition": {"name": "dirichlet"}}
    before = yaml.safe_dump(raw)
    with_preset(raw)
    assert yaml.safe_dump(raw) == before
    assert read_preset("paper").where["partition=dirichlet"] == {
        "partition": {"concentration": 0.1, "minimum_examples": 1, "cap": 1.0}
    }


def test_a_run_the_classes_and_the_list_agree_on_every_default() -> None:
    config = parse_config({"data": "digits", "partition": "iid"})
    assert config == ExperimentConfig(data=Digits(), partition=Iid())
    listed = list_components()
    for key, value in (("learning_rate", config.local.learning_rate), ("rounds", config.rounds)):
        assert re.search(rf"^  {key}: {value}  ", listed, re.MULTILINE)


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_of_a_preset_is_one_that_there_is(name: str) -> None:
    preset = read_preset(name)
    for condition in ("", *preset.where):
        key, _, component = condition.partition("=")
        raw: dict[str, Any] = {"data": "digits", "partition": "iid", "preset": name}
        if key and key != "partition":
            *sections, last = key.split(".")
            raw |= {sections[0]: {last: component}} if sections else {last: component}
        elif key:
            raw["partition"] = component
        assert parse_config(raw).preset == name


def test_values_that_are_no_mappings_reach_the_checks() -> None:
    for value in (3, None, "x", [1]):
        with_preset({**GIVEN, "local": value, "adapter": value, "partition": value})
