"""What `key=value` on the command line does to the file's options."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from flora.config.overrides import apply_overrides
from flora.config.parse import changes_by_overrides, load_config
from flora.config.schema import ExperimentConfig
from flora.core.errors import ConfigError
from flora.simulate import main

BASE: dict[str, Any] = {"data": "patterns", "partition": "iid"}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(**sections: Any) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(BASE | sections))
        return path

    return write


@pytest.mark.parametrize("adapter", [{"rank": 4, "alpha": 8.0}, {"name": "lora", "rank": 4, "alpha": 8.0}])
def test_the_component_that_is_there_already_keeps_its_options(write: Any, adapter: dict[str, Any]) -> None:
    path = write(adapter=adapter)
    plain = load_config(path)
    assert load_config(path, ["adapter=lora"]) == plain
    changed: Any = load_config(path, ["adapter={name: lora, rank: 2}"]).adapter
    assert (changed.rank, changed.alpha) == (2, 8.0)


def test_another_component_starts_from_its_defaults(write: Any) -> None:
    path = write(partition={"name": "dirichlet", "concentration": 0.1, "minimum_examples": 7})
    config: Any = load_config(path, ["partition=pathological"])
    assert config.partition == type(config.partition)()


def test_the_name_may_be_the_preset_s_or_an_option_of_an_option(write: Any) -> None:
    path = write(preset="paper", adapter={"alpha": 3.0}, local={"optimizer": {"weight_decay": 0.5}})
    plain = load_config(path)
    names = [f"adapter={name}" for name in ("lora",)] + ["local.optimizer=adam"]
    assert type(plain.local.optimizer).__name__ == "Adam"
    assert load_config(path, names) == plain


def test_the_order_of_overrides_is_of_no_matter(write: Any) -> None:
    path = write()
    overrides = ["local.optimizer=sgd", "local.optimizer.momentum=0.5", "local={epochs: 3}", "preset=paper"]
    configs = [load_config(path, order) for order in itertools.permutations(overrides)]
    assert all(config == configs[0] for config in configs)
    assert configs[0].local.epochs == 3
    assert configs[0].local.optimizer.momentum == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize("overrides", [["rounds=7", "rounds=8"], ["rounds=7", "seed=1", " rounds =7"]])
def test_one_key_twice_is_an_error(write: Any, overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^command line: rounds is given twice$"):
        load_config(write(), overrides)


def test_nothing_is_set_if_one_override_is_wrong() -> None:
    raw = dict(BASE)
    with pytest.raises(ConfigError):
        apply_overrides(raw, ["rounds=3", "seed=["], ExperimentConfig)
    assert raw == BASE


def test_what_overrides_change_is_said(write: Any) -> None:
    path = write(rounds=5, adapter={"rank": 4})
    assert changes_by_overrides(path, ["rounds=7", "adapter=lora", "adapter.rank=4", "seed=0"]) == ["rounds: 5 -> 7"]
    lines = changes_by_overrides(path, ["partition={name: dirichlet, concentration: 0.5}"])
    assert "partition.name: 'iid' -> 'dirichlet'" in lines
    assert "partition.concentration: null -> 0.5" in lines
    path.write_text("data: image_folder\npartition: iid\n")  # can't be used without the override
    assert changes_by_overrides(path, ["data.root=x"]) == ["data.root=x"]


def test_all_mistakes_are_found_at_once_and_each_is_said_where_it_is(write: Any) -> None:
    path = write(rounds=-1, adapter={"rank": "x", "alpah": 3}, local={"epochs": 0})
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["local.batch_size=0", "nonsense=1"])
    found = [mistake.split(": expected")[0].split("; ")[0] for mistake in caught.value.mistakes]
    assert sorted(found) == sorted(
        [
            f"{path}: rounds",
            f"{path}: adapter.rank",
            f"{path}: adapter.alpah: unknown key",
            f"{path}: local.epochs",
            "command line: local.batch_size",
            "command line: nonsense: unknown key",
        ]
    )
    assert str(caught.value) == caught.value.mistakes[0]


def test_check_says_all_of_it_and_goes_on_with_the_next_file(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = write(clients={"number": 3, "ranks": [1, 2]}, adapter="linear_head", evaluation={"num_local_only": 7})
    good = wrong.with_name("good.yaml")
    good.write_text(yaml.safe_dump(BASE))
    broken = wrong.with_name("broken.yaml")
    broken.write_text("[")
    assert main(["--check", str(broken), str(wrong), str(good)]) == 2
    captured = capsys.readouterr()
    assert captured.out == f"{good}: ok\n"
    lines = captured.err.splitlines()
    assert lines[0].startswith(f"{broken}: not valid YAML")
    assert [line.split(": ")[:2] for line in lines[1:]] == [
        [str(wrong), "clients.ranks"],
        [str(wrong), "evaluation.num_local_only"],
    ]
