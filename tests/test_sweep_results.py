"""What a sweep of a scenario comes to: means over domains, one table of results, settings that a search chose."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from flora.config.schema import ExperimentConfig
from flora.core.errors import UserError
from flora.report.curves import _figure
from flora.report.dots import Dot, draw_dots
from flora.report.groups import groups_of
from flora.report.reading import read_files, runs_below
from flora.report.several_runs import _means
from flora.simulate import simulate
from flora.sweep import __main__ as sweep
from flora.sweep.choosing import Choice, Choices, choose, read_choices, to_json
from flora.sweep.outcomes import Outcome, Point, columns
from flora.sweep.over_values import pictures_over_values
from flora.sweep.results import dots_of, to_latex, to_results, with_domain_means
from flora.sweep.runs import Outcomes
from flora.sweep.table import Row, to_csv, to_curves


def outcome(last: float, **changes: Any) -> Outcome:
    figures: dict[str, Any] = dict.fromkeys(columns()) | {"last_accuracy": last, "zero_shot_accuracy": 0.25}
    return Outcome((Point(0, 0, 0.25), Point(1, 100, last)), figures | changes)


def domain(name: str, *lasts: float, method: str = "lora", seeds: str = "01") -> Row:
    outcomes = tuple(outcome(last, client_accuracy_mean=None if last > 0.8 else last) for last in lasts)
    return Row({"experiment": method, "split.domain": name}, outcomes, seeds=tuple(seeds[: len(lasts)]))


def test_the_mean_over_domains_is_of_each_seed_and_its_deviation_over_seeds() -> None:
    rows = [domain("ink", 0.2, 0.4), domain("oil", 0.6, 0.8), domain("ink", 0.5, 0.5, method="norm")]
    found = with_domain_means(rows)
    assert [row.labels["split.domain"] for row in found] == ["ink", "oil", "mean of 2", "ink"]
    mean = found[2]
    assert mean.labels["experiment"] == "lora" and mean.seeds == ("0", "1")
    assert [each.figures["last_accuracy"] for each in mean.outcomes] == pytest.approx([0.4, 0.6])
    assert mean.mean("last_accuracy") == pytest.approx(0.5)
    assert mean.deviation("last_accuracy") == pytest.approx(0.1 * 2**0.5)
    line = dict(zip(*list(csv.reader(to_csv(found).splitlines()))[0:4:3], strict=True))
    assert (line["split.domain"], line["runs"]) == ("mean of 2", "2")
    assert float(line["last_accuracy"]) == pytest.approx(0.5)
    assert len(to_curves(found)) == 6  # of runs alone


def test_a_seed_without_all_domains_and_a_figure_that_one_lacks_have_no_mean() -> None:
    found = with_domain_means([domain("ink", 0.2, 0.4), domain("oil", 0.6), domain("pen", 0.9)])
    assert found[-1].seeds == ("0",)
    assert found[-1].outcomes[0].figures["client_accuracy_mean"] is None
    assert with_domain_means([domain("ink", 0.2), domain("oil")]) == [domain("ink", 0.2), domain("oil")]
    plain = [Row({"experiment": "lora"}, (outcome(0.5),), seeds=("0",))]
    assert with_domain_means(plain) == plain


def test_results_are_one_table_with_what_they_cost() -> None:
    def row(method: str, data: str, *lasts: float, **changes: Any) -> Row:
        costs = {"trainable_parameters": 100, "uplink_bytes_per_client_round": 4000.0, "step_seconds": 0.002}
        outcomes = tuple(outcome(last, harmonic_mean=last / 2, **costs | changes) for last in lasts)
        return Row({"experiment": method, "data": data}, outcomes, seeds=("0", "1")[: len(lasts)])

    rows = [
        row("lora", "eurosat", 0.5, 0.7),
        row("lora", "digits", 0.9, 0.9),
        row("head", "eurosat", 0.4, 0.4),
        row("head", "digits", 0.3, trainable_parameters=200),
        Row({"experiment": "norm", "data": "digits"}, ()),
    ]
    table = to_results(rows, ("last_accuracy", "harmonic_mean"))
    assert table[0] == [
        "method", "eurosat: last round", "eurosat: harmonic mean", "digits: last round", "digits: harmonic mean",
        "trained", "up per client and round", "ms per client step",
    ]  # fmt: skip
    assert table[1] == ["zero-shot", "25.0 ± 0.0 %", "-", "25.0 ± 0.0 %", *["-"] * 4]
    assert table[2] == ["lora", "60.0 ± 14.1 %", "30.0 ± 7.1 %", "90.0 ± 0.0 %", "45.0 ± 0.0 %", "100", "4.0 KB", "2"]
    assert table[3] == ["head", "40.0 ± 0.0 %", "20.0 ± 0.0 %", "30.0 %", "15.0 %", "100 to 200", "4.0 KB", "2"]
    assert table[4] == ["norm"] + ["-"] * 7
    one = to_results([row("lora", "eurosat", 0.5)], ("last_accuracy",))
    assert one[0][:3] == ["method", "last round", "trained"]
    panels = [dot.panel for dot in dots_of(rows, ("last_accuracy",))]
    assert panels == ["eurosat", "digits", "eurosat", "digits", "eurosat", "digits"]  # as in the table
    assert dots_of(rows[:1], ("last_accuracy", "harmonic_mean"))[:2] == [
        Dot("eurosat", "zero-shot", "last round", 0.25, 0.0),
        Dot("eurosat", "lora", "last round", pytest.approx(0.6), pytest.approx(0.1 * 2**0.5)),
    ]


def test_results_are_a_latex_table() -> None:
    lines = [
        ["method", "a_b: last round", "up & down"],
        ["zero-shot", "25.0 %", "-"],
        ["lora", "60.0 ± 14.1 %", "4.0 KB"],
        ["head", "-", "1 KB"],
    ]
    assert to_latex(lines).splitlines() == [
        r"% Mean and standard deviation (n - 1) over the seeds, last round. It needs \usepackage{booktabs}.",
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"method & a\_b: last round (\%) & up \& down \\",
        r"\midrule",
        r"zero-shot & 25.0 & - \\",
        r"\midrule",
        r"lora & 60.0 $\pm$ 14.1 & 4.0 KB \\",
        r"head & - & 1 KB \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert r"\textbackslash{}x\textasciicircum{}\{\}\#\$" in to_latex([["method"], ["zero-shot"], [r"\x^{}#$"]])


def test_results_are_drawn(tmp_path: Path) -> None:
    assert draw_dots([], tmp_path / "none.png") == []
    dots = [
        Dot(panel, method, figure, 0.5, deviation)
        for panel in ("eurosat", "digits")
        for method, deviation in (("lora", 0.1), ("norm", None))
        for figure in ("last round", "new")
    ]
    (path,) = draw_dots(dots, tmp_path / "results.png")
    with Image.open(path) as picture:
        assert min(picture.size) > 200
    first = path.read_bytes()
    assert draw_dots(dots, tmp_path / "again.png")[0].read_bytes() == first
    assert draw_dots(dots[:1], tmp_path / "other.png")[0].read_bytes() != first


def shots(method: str, number: str, *lasts: float, data: str = "eurosat", zero_shot: float = 0.25) -> Row:
    outcomes = tuple(outcome(last, zero_shot_accuracy=zero_shot, harmonic_mean=last / 2) for last in lasts)
    return Row({"experiment": method, "data": data, "partition.shots": number}, outcomes)


def test_results_over_a_setting_that_is_a_number() -> None:
    rows = [shots(method, number, 0.25 + i / 10, 0.35 + i / 10) for i, method in enumerate(("lora", "norm"))
            for number in ("16", "1", "4")]  # fmt: skip
    rows += [shots("lora", "1", 0.5, data="digits"), shots("lora", "2", data="digits")]
    rows += [shots("lora", "null", 0.9, data="digits"), shots("lora", "4", 0.7, 0.7, data="digits", zero_shot=0.3)]
    ((name, (panels, axis)),) = pictures_over_values(rows, ("last_accuracy", "auroc")).items()
    assert (name, axis.x_title) == ("results_over_partition.shots", "partition.shots")
    assert {panel: list(lines) for panel, lines in panels.items()} == {
        "eurosat: last round": ["lora", "norm"], "digits: last round": ["lora"],
    }  # fmt: skip
    line, other = panels["eurosat: last round"]["norm"], panels["digits: last round"]["lora"]
    assert line.xs == (1, 4, 16) and line.means == pytest.approx((0.4,) * 3)
    assert line.deviation == pytest.approx((0.1 / 2**0.5,) * 3) and line.zero_shot == pytest.approx(0.25)
    assert other.xs == (1, 4) and other.means == pytest.approx((0.5, 0.7))
    assert other.deviation == (0, 0) and other.zero_shot is None  # of one seed, and of several levels
    panels, _ = pictures_over_values(rows, ("harmonic_mean",))[name]
    assert panels["digits: harmonic mean"]["lora"].means == pytest.approx((0.25, 0.35))


def test_two_numbers_and_names_are_not_drawn_over() -> None:
    assert pictures_over_values([shots("lora", number, 0.5) for number in ("1", "2")], ("last_accuracy",)) == {}
    assert pictures_over_values([domain(name, 0.5) for name in ("ink", "oil", "nan")], ("last_accuracy",)) == {}
    assert pictures_over_values([], ("last_accuracy",)) == {}


@pytest.mark.parametrize(("numbers", "scale"), [("1 2 4 8 16", "log"), ("1 2 4", "linear"), ("0 1 16", "linear")])
def test_ticks_are_at_the_numbers(numbers: str, scale: str) -> None:
    rows = [shots("lora", number, 0.5, 0.6) for number in numbers.split()]
    ((panels, axis),) = pictures_over_values(rows, ("last_accuracy",)).values()
    figure = _figure(panels, ["lora"], axis)
    (axes,) = figure.subfigs[0].axes
    assert axes.get_xscale() == scale
    figure.draw_without_rendering()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == numbers.split()


def test_many_numbers_have_few_ticks() -> None:
    ((panels, axis),) = pictures_over_values(
        [shots("lora", str(number), 0.5) for number in range(1, 40)], ("last_accuracy",)
    ).values()
    figure = _figure(panels, ["lora"], axis)
    figure.draw_without_rendering()
    labels = [tick.get_text() for tick in figure.subfigs[0].axes[0].get_xticklabels()]
    assert 1 <= len(labels) < 12 and "$" not in "".join(labels)


# Choosing


@pytest.fixture
def config_file(tmp_path: Path, raw_config: dict[str, Any]) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**raw_config, "rounds": 1}))
    return str(path)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs one after the other, without a process for each, which takes seconds to begin."""

    def run_all(runs: Sequence[ExperimentConfig], outcomes: Outcomes, **options: Any) -> None:
        for config in runs:
            simulate(config)
            outcomes[config.name] = None

    monkeypatch.setattr(sweep, "run_all", run_all)
    monkeypatch.setattr(sweep, "draw_curves", lambda curves, folder: [])


def run(config_file: str, folder: Path, *arguments: str) -> int:
    return sweep.main([config_file, *arguments, "--output", str(folder)])


def finished(folder: Path, last: float, personal: float | None = None) -> Path:
    folder.mkdir(parents=True)
    summary = {
        "num_clients": 2, "rounds": 1, "last_accuracy": last, "personal_accuracy_mean": personal, "train_seconds": 1.0,
        "peak_memory_bytes": 1, "total_downlink_bytes": 1,
    }  # fmt: skip
    records = [
        {"round": round, "accuracy": last, "uplink_bytes": 1, "downlink_bytes": 1, "num_clients": 2, "num_steps": 1}
        for round in range(2)
    ]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "rounds.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder


def test_the_best_value_is_chosen_for_each_method_and_data_set(tmp_path: Path) -> None:
    def runs(method: str, data: str, *accuracies: tuple[str, str, float | None, float | None]) -> list[Any]:
        return [
            (
                None if last is None else finished(tmp_path / method / data / rate / seed, last, personal),
                f"a/{method}.yaml",
                {"data": data, "local.learning_rate": rate, "seed": seed},
            )
            for rate, seed, last, personal in accuracies
        ]

    found = choose(
        "local.learning_rate",
        [
            *runs("lora", "digits", ("0.1", "0", 0.5, None), ("0.1", "1", 0.7, None), ("1", "0", 0.9, None),
                  ("1", "1", None, None), ("2", "0", 0.6, None), ("2", "1", 0.6, None)),
            *runs("ditto", "digits", ("0.1", "0", 0.9, 0.1), ("1", "0", 0.1, 0.9)),
            *runs("norm", "digits", ("0.1", "0", None, None)),
        ],
    )  # fmt: skip
    assert found.choices == (
        Choice({"experiment": "lora", "data": "digits"}, "0.1", {"0.1": pytest.approx(0.6), "2": 0.6}),
        Choice({"experiment": "ditto", "data": "digits"}, "1", {"0.1": 0.1, "1": 0.9}),
    )
    (tmp_path / "chosen.json").write_text(to_json(found))
    again = read_choices(tmp_path / "chosen.json")
    assert again.override("b/lora.yaml", {"data": "digits", "seed": "3"}) == "local.learning_rate=0.1"
    assert again.override("b/lora.yaml", {"data": "digits", "local.learning_rate": "7"}) is None
    assert again.override("b/lora.yaml", {"data": "glyphs"}) is None
    assert again.override("b/norm.yaml", {"data": "digits"}) is None


def test_a_search_is_written_down_and_used(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axis, search = "local.learning_rate=0.00001,0.05", tmp_path / "search"
    assert run(config_file, search, axis, "--choose", "local.learning_rate", "--set", "split=validation") == 0
    choices = read_choices(search / "chosen.json")
    rows = {
        row["local.learning_rate"]: float(row["last_accuracy"]) for row in csv.DictReader((search / "table.csv").open())
    }
    (choice,) = choices.choices
    assert choice.value == max(rows, key=lambda value: rows[value])
    assert dict(choice.tried) == pytest.approx(rows, abs=1e-4)
    folder = tmp_path / "runs"
    assert run(config_file, folder, "seed=1", "--chosen", str(search / "chosen.json")) == 0
    saved = yaml.safe_load((folder / "tiny_seed=1" / "config.yaml").read_text())
    assert saved["local"]["learning_rate"] == float(choice.value)
    capsys.readouterr()
    other = tmp_path / "other.yaml"
    other.write_text(Path(config_file).read_text())
    assert run(str(other), tmp_path / "others", "--chosen", str(search / "chosen.json")) == 0
    assert "has no local.learning_rate for other: the value in their own files is used" in capsys.readouterr().err


def test_a_later_search_leaves_other_methods_their_choice(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = Choice({"experiment": "lora"}, "0.3", {"0.3": 0.5})
    chosen = tmp_path / "rates.json"
    search = ("--choose", "local.learning_rate", "--chosen", str(chosen), "--set", "split=validation")
    assert run(config_file, tmp_path / "a", "local.learning_rate=0.00001", *search) == 0
    (first,) = read_choices(chosen).choices
    assert first.where == {"experiment": "tiny"} and first.value == "0.00001"
    chosen.write_text(to_json(Choices("local.learning_rate", (first, lora))))
    assert run(config_file, tmp_path / "a", "local.learning_rate=0.05,0.00002", *search) == 0
    kept, again = read_choices(chosen).choices
    assert kept == lora
    assert set(again.tried) == {"0.05", "0.00002"}
    capsys.readouterr()
    chosen.write_text(to_json(Choices("local.steps", ())))
    assert run(config_file, tmp_path / "b", "local.learning_rate=0.05", *search) == 2
    assert "--chosen: expected choices of local.learning_rate" in capsys.readouterr().err


def test_nothing_is_chosen_on_test_images(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choose_rate = ("--choose", "local.learning_rate")
    assert run(config_file, tmp_path / "a", "local.learning_rate=0.1,0.2", *choose_rate) == 2
    assert "--choose: expected split validation" in capsys.readouterr().err
    assert run(config_file, tmp_path / "a", "seed=0,1", *choose_rate, "--set", "split=validation") == 2
    assert "--choose: local.learning_rate is not swept" in capsys.readouterr().err
    assert not list(tmp_path.rglob("summary.json"))
    for content in ("{}", '{"key": "x", "chosen": [1]}', "nonsense"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=r"bad\.json: not what --choose writes"):
            read_choices(tmp_path / "bad.json")
    with pytest.raises(UserError, match=r"gone\.json: No such file"):
        read_choices(tmp_path / "gone.json")
    assert Choices("x", ()).override("a.yaml", {}) is None


def test_what_the_rules_refuse_is_left_out_and_named(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("adapter=norm,linear_head", "--set", "split=base_to_new", "--set", "data.num_classes=4")
    folder = tmp_path / "sweep"
    assert run(config_file, folder, *arguments) == 2
    assert not list(folder.rglob("summary.json"))
    assert run(config_file, folder, *arguments, "--skip-refused", "--set", "scenario=base_to_new") == 0
    assert "left out: " in capsys.readouterr().err
    lines = [line.strip("| ").split(" | ") for line in (folder / "table.md").read_text().splitlines()]
    assert lines[0][:4] == ["method", "last round", "classes set aside", "harmonic mean"]
    assert lines[4] == ["linear_head"] + ["-"] * (len(lines[0]) - 1)
    assert (folder / "results.png").exists()


def test_a_sweep_over_domains_has_their_mean_in_table_and_page(tmp_path: Path, raw_config: dict[str, Any]) -> None:
    for place, domain in enumerate(("ink", "oil", "pen")):
        for label in range(2):
            (tmp_path / "images" / domain / f"thing {label}").mkdir(parents=True)
            for index in range(6):
                grey = (place * 60 + label * 120 + index * 3) % 256
                Image.new("L", (8, 8), grey).save(tmp_path / "images" / domain / f"thing {label}" / f"{index}.png")
    raw = {key: value for key, value in raw_config.items() if key not in ("partition", "clients")}
    raw |= {"rounds": 1, "data": {"name": "image_folder", "root": str(tmp_path / "images"), "groups": "folder"}}
    raw |= {"partition": {"of": "iid", "clients_per_group": 1}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw))
    folder = tmp_path / "sweep"
    arguments = ("split.domain=ink,oil,pen", "seed=0,1", "--set", "scenario=cross_domain")
    assert run(str(tmp_path / "tiny.yaml"), folder, *arguments) == 0
    *rows, mean = csv.DictReader((folder / "table.csv").open())
    assert (mean["split.domain"], mean["runs"]) == ("mean of 3", "2")
    assert float(mean["last_accuracy"]) == pytest.approx(sum(float(row["last_accuracy"]) for row in rows) / 3)
    assert "domain mean of 3" in (folder / "table.md").read_text()
    page = str(_means(groups_of([read_files(path) for path in runs_below(folder)])))
    assert "mean of 3 domains" in page and f"{100 * float(mean['last_accuracy']):.1f} %" in page
