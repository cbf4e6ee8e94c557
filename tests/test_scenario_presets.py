"""A scenario is a set of plain settings between an experiment's own and its preset's, which its configuration shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flora.config.listing import list_components
from flora.config.parse import config_to_dict, flat_settings, load_config, parse_config
from flora.config.presets import SCENARIOS, lines, read_scenario
from flora.config.rules import check_experiment
from flora.core.registry import OptionError
from flora.data.few_shot import FewShotOverlapping
from flora.data.mixtures import WithinGroups
from flora.data.partition import Dirichlet, Iid
from flora.data.splits import BaseToNew, LeaveDomainOut, Official, Sample
from flora.evaluation.metrics import FIGURES
from flora.simulate import main, simulate

GIVEN: dict[str, Any] = {"name": "x", "data": "digits"}
NEEDED: dict[str, dict[str, Any]] = {
    "cross_domain": {"split": {"domain": "sketch"}},
    "cross_data_set": {"evaluation": {"also": ["glyphs"]}},
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_is_what_its_settings_are(name: str) -> None:
    """Written out in full the resolved configuration gives the same again, but for the scenario's name."""
    config = parse_config({**GIVEN, **NEEDED.get(name, {}), "scenario": name})
    check_experiment(config)
    plain = {**config_to_dict(config), "scenario": "none"}
    again = flat_settings(parse_config(plain, is_complete=True))
    assert {key for key, value in flat_settings(config).items() if again[key] != value} == {"scenario"}
    assert parse_config(config_to_dict(config), is_complete=True) == config
    shown = dict(line.split(": ", 1) for line in lines(read_scenario(name)))
    flat = flat_settings(config)
    for key, value in shown.items():
        key = key if key in flat else f"{key}.name"
        assert str(flat[key]).lower() == value.lower(), key


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_a_scenarios_result_is_has_a_column_in_sweeps(name: str) -> None:
    scenario = read_scenario(name)
    assert scenario.results and all(FIGURES[figure].column for figure in scenario.results)
    assert f"  {name}: {scenario.about}" in list_components()


def test_scenarios_are_what_the_benchmark_has() -> None:
    def scenario(name: str) -> Any:
        return parse_config({**GIVEN, **NEEDED.get(name, {}), "scenario": name})

    assert scenario("global").partition == Dirichlet(concentration=0.1)
    assert scenario("few_shot").partition == FewShotOverlapping(shots=16)
    assert scenario("base_to_new").split == BaseToNew()
    assert scenario("base_to_new_clients").evaluation.held_classes
    assert scenario("cross_domain").split == LeaveDomainOut(domain="sketch")
    multi = scenario("multi_domain")
    assert multi.partition == WithinGroups(of=Dirichlet(concentration=0.1), clients_per_group=4)
    assert multi.clients.number is None
    assert (scenario("dual").clients.holdout_fraction, scenario("global").clients.holdout_fraction) == (0.2, 0.0)
    assert scenario("unseen_clients").clients.number_training == 15


def test_what_a_file_or_the_command_line_says_wins(tmp_path: Path) -> None:
    config = parse_config({**GIVEN, "scenario": "base_to_new", "partition": "iid", "split": {"of": "sample"}})
    assert (config.partition, config.split) == (Iid(), BaseToNew(of=Sample()))
    file = tmp_path / "x.yaml"
    file.write_text("data: digits\nscenario: global\n")
    config = load_config(file, ["scenario=few_shot", "partition.shots=2"])
    assert (config.scenario, config.partition) == ("few_shot", FewShotOverlapping(shots=2))


def test_a_part_that_takes_the_place_of_a_scenarios_is_warned_of(
    raw_config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check", "quickstart", "scenario=few_shot"]) == 0
    warning, ok = capsys.readouterr().out.splitlines()
    assert ok == "quickstart: ok"
    assert warning.startswith("quickstart: warning: partition: dirichlet in place of few_shot_overlapping, which the ")
    assert main(["--check", "quickstart", "scenario=few_shot", "partition=few_shot_overlapping"]) == 0
    assert capsys.readouterr().out == "quickstart: ok\n"
    lines: list[str] = []
    simulate(parse_config({**raw_config, "scenario": "few_shot", "rounds": 0}), echo=lines.append)
    assert lines[0].startswith("warning: partition: ") and lines[0].endswith("=few_shot_overlapping is the scenario's")


def test_a_scenario_lies_above_the_preset(tmp_path: Path) -> None:
    few = parse_config({**GIVEN, "preset": "flip", "scenario": "few_shot"})
    assert (few.split, few.rounds) == (Official(), 50)
    new = parse_config({**GIVEN, "preset": "flip", "scenario": "base_to_new"})
    assert new.split == BaseToNew(of=Sample(shots=8, num_test=1_000_000))
    dual = parse_config({**GIVEN, "preset": "flip", "scenario": "dual"})
    assert dual.split == Sample(shots=100, num_test=1_000_000)
    plain = parse_config({**GIVEN, "preset": "flip", "scenario": "global"})
    assert plain.split == Sample(shots=8, num_test=1_000_000)


def test_what_a_scenario_needs_is_said() -> None:
    with pytest.raises(OptionError, match=r"evaluation\.also: missing: the scenario cross_data_set needs it"):
        parse_config({**GIVEN, "scenario": "cross_data_set"})
    with pytest.raises(OptionError, match=r"split\.domain: missing"):
        parse_config({**GIVEN, "scenario": "cross_domain"})
    with pytest.raises(OptionError, match=r"scenario: expected one of none, base_to_new"):
        parse_config({**GIVEN, "partition": "iid", "scenario": "glob"})
    with pytest.raises(OptionError, match=r"^scenario: expected one of none, base_to_new") as caught:
        parse_config({**GIVEN, "scenario": "glob"})
    assert not caught.value.others  # not the partition, which a known scenario has


def domains_tree(folder: Path) -> Path:
    """`folder/DOMAIN/CLASS/*.png` of three domains and two classes, one domain larger than the others."""
    for place, (domain, number) in enumerate((("ink", 10), ("oil", 20), ("pen", 10))):
        for label in range(2):
            (folder / domain / f"thing {label}").mkdir(parents=True)
            for index in range(number):
                grey = (place * 60 + label * 120 + index * 3) % 256
                Image.new("L", (8, 8), grey).save(folder / domain / f"thing {label}" / f"{index}.png")
    return folder


def test_domains_are_averaged_alike(raw_config: dict[str, Any], tmp_path: Path) -> None:
    raw = {key: value for key, value in raw_config.items() if key not in ("partition", "clients")}
    raw |= {"data": {"name": "image_folder", "root": str(domains_tree(tmp_path / "images")), "groups": "folder"}}
    partition = {"of": "iid", "clients_per_group": 1}
    result = simulate(parse_config({**raw, "scenario": "multi_domain", "partition": partition}))
    figures = result.summary.figures
    by_domain = figures["domain_accuracy"]
    assert len(by_domain) == 3
    assert figures["domain_accuracy_mean"] == pytest.approx(sum(by_domain.values()) / 3)
