"""The page of a run, and of several: what it says, what it escapes, and what it does without."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flora.config.parse import parse_config
from flora.core.hooks import Hooks
from flora.core.records import RoundRecord
from flora.evaluate import main as evaluate_main
from flora.evaluation.summary import percent
from flora.report import several_runs
from flora.report.__main__ import main
from flora.report.charts import gini, other_metrics
from flora.report.elements import Cell, Html, bars, element, joined, table
from flora.report.groups import groups_of, naming
from flora.report.live import LivePage
from flora.report.one_run import evaluations, settings
from flora.report.over_settings import _lines, over_settings
from flora.report.page import page
from flora.report.pictures import Line, heat_map, lines_picture
from flora.report.reading import RunFiles, read_files
from flora.report.several_runs import averaged
from flora.runs.sinks import Sink
from flora.simulate import main as simulate_main
from flora.simulate import simulate

Capture = pytest.CaptureFixture[str]
EVIL = "<script>alert('thing 1')</script>"


@pytest.fixture(scope="module")
def folder(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three finished runs: two that differ in their seed alone, and one with another adapter."""
    output = tmp_path_factory.mktemp("page") / "runs"
    raw = {
        "output": str(output),
        "rounds": 2,
        "backbone": {"model": tiny_model, "weights": "random"},
        "data": {"name": "patterns"},
        "partition": {"name": "dirichlet", "concentration": 0.5, "minimum_examples": 3},
        "prompts": {"class_names": {"thing 1": EVIL}},
        "clients": {"number": 4, "cohort": {"fraction": 0.5}},
        "network": {"name": "drawn"},
        "local": {"learning_rate": 0.01, "batch_size": 8},
        "evaluation": {"num_local_only": 4, "clients_every": 1, "centralized": True},
    }
    for name, seed, adapter in (("one & two", 0, "lora"), ("second", 1, "lora"), ("third", 0, "linear_head")):
        simulate(parse_config({**raw, "name": name, "seed": seed, "adapter": adapter}))
    return output


@pytest.fixture(scope="module")
def shown(folder: Path) -> Callable[..., str]:
    """The page of runs by their names, drawn once: drawing takes most of the time."""
    return cache(lambda *names: page([read_files(folder / name) for name in names]))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the first run, to be damaged."""
    return Path(shutil.copytree(folder / "one & two", tmp_path / "copy"))


def without_pictures(run: Path) -> Path:
    """Take from a run what its page has pictures of, for tests that look at none: drawing takes most of the time."""
    for name in ("clients.csv", "confusion.csv", "reliability.csv", "partition.json"):
        (run / name).unlink()
    return without_curves(run)


def without_curves(run: Path) -> Path:
    """Leave a run its last record alone, so that nothing can be drawn over rounds."""
    (run / "rounds.jsonl").write_text((run / "rounds.jsonl").read_text().splitlines()[-1] + "\n")
    return run


@pytest.fixture
def bare(copied: Path) -> Path:
    """A copy of the first run without what its page has pictures of."""
    return without_pictures(copied)


def text_of(content: str) -> str:
    """What a page says, without its elements."""
    content = re.sub(r"<(style|script|svg).*?</\1>", " ", content, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", content)).split())


class Balance(HTMLParser):
    """Says of each element that is not closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for key, value in attributes if key == "id"]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for key, value in attributes if key == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()


def test_the_page_of_a_run_says_what_it_was_and_what_came_out(folder: Path, shown: Callable[..., str]) -> None:
    run, content = read_files(folder / "one & two"), shown("one & two")
    assert "On other data" not in content
    text, summary = text_of(content), json.loads((run.path / "summary.json").read_text())
    assert text.count("one & two") > 2
    assert "2 rounds of fedavg between 4 clients that train lora" in text
    for figure in ("zero_shot_accuracy", "local_only_accuracy_mean", "last_accuracy", "client_accuracy_worst_decile"):
        assert percent(summary[figure]) in text
    for figure in ("centralized_accuracy", "held_out_centralized_accuracy"):
        assert f"all images in one place {percent(summary[figure])}" in text
    assert f"Gini coefficient {gini_of(run.path):.3f}" in text
    for title in (
        "Accuracy over rounds",
        "Accuracy over bytes",
        "Accuracy over simulated time",
        "Loss over rounds",
        "Who has what",
        "Who took part how often",
        "Who is taken for whom",
        "Is its confidence to be believed?",
        "Aggregation error",
        "Client drift",
        "Delta norm",
    ):
        assert f"<figure><h3>{title}</h3><svg " in content, title
    for line in (run.path / "config.yaml").read_text().splitlines():
        assert html.escape(line) in content
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["backbone_sha256"] in text and environment["packages"]["torch"] in text
    assert f"python -m flora.export '{run.path}' adapted" in text


def gini_of(path: Path) -> float:
    import csv

    with (path / "clients.csv").open(newline="") as file:
        values = [float(row["accuracy"]) for row in csv.DictReader(file) if row["accuracy"]]
    mean, number = sum(values) / len(values), len(values)
    return sum(abs(one - other) for one in values for other in values) / (2 * number**2 * mean)


@pytest.mark.parametrize("names", [["one & two"], ["one & two", "second", "third"]], ids=["one", "several"])
def test_a_page_is_one_whole_file_that_fetches_nothing_and_escapes_what_users_write(
    folder: Path, shown: Callable[..., str], names: list[str]
) -> None:
    content = shown(*names)
    assert html.escape(EVIL[:14]) in content and EVIL[:14] not in content
    assert len(re.findall("<script", content)) == 1
    parser = Balance()
    parser.feed(content)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert not re.findall(r'(?:src|href|action)="(?!#|data:)[^"]*"|url\((?!#)|@import', content)
    pictures = re.findall(r"<svg.*?</svg>", content, re.DOTALL)
    assert len(pictures) > 10
    assert not re.findall(r"(?:fill|stroke): #\w+|DejaVu", "".join(pictures))
    assert content == page([read_files(folder / name) for name in names])


def test_several_runs_are_overlaid_and_those_of_one_experiment_are_one_line(
    folder: Path, shown: Callable[..., str]
) -> None:
    names = ("one & two", "second", "third")
    runs = [read_files(folder / name) for name in names]
    groups = groups_of(runs)
    assert [(group.name, len(group.runs)) for group in groups] == [("lora", 2), ("linear_head", 1)]
    content = shown(*names)
    text = text_of(content)
    first, second = (run.figure("last_accuracy") for run in runs[:2])
    assert percent((first + second) / 2) in text
    assert percent(runs[2].figure("last_accuracy")) in text
    assert "<td><code>adapter.name</code></td><td>lora</td><td>linear_head</td>" in content
    assert "<code>local.learning_rate</code>" not in content  # the same in all
    assert all(run.name in text for run in runs)
    assert content.count('<table class="sortable">') == 2
    for title in ("Accuracy over rounds", "Accuracy over bytes", "Accuracy over simulated time", "Loss over rounds"):
        assert f"<figure><h3>{title}</h3><svg " in content, title


def test_the_frozen_model_has_a_bar_for_each_data_set_and_bars_that_are_left_out_are_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = (read_files(folder / name) for name in ("second", "third"))
    assert "zero-shot, " not in text_of(several_runs.sections([run, other])["Results"])
    other = replace(other, settings={**other.settings, "data": {"name": "elsewhere"}})
    monkeypatch.setattr(several_runs, "MAX_BARS", 1)
    text = text_of(several_runs.sections([run, other])["Results"])
    for each in (run, other):
        assert f"zero-shot, {each.setting('data.name')} {percent(each.figure('zero_shot_accuracy'))}" in text
    assert "The first 1; 1 more are in the table." in text


def test_a_line_is_the_mean_of_its_seeds_with_a_band() -> None:
    line = averaged("x", [{0: (0.0, 0.5), 1: (1.0, 0.6), 2: (2.0, 0.9)}, {0: (0.0, 0.5), 2: (4.0, 0.7)}], 3)
    assert line is not None and line.low is not None and line.high is not None
    assert (list(line.xs), line.style) == ([0.0, 3.0], 3)
    assert list(line.ys) == pytest.approx([0.5, 0.8])
    assert list(line.high) == pytest.approx([0.5, 0.8 + 0.2 / 2**0.5])
    assert list(line.low) == pytest.approx([0.5, 0.8 - 0.2 / 2**0.5])
    alone = averaged("x", [{0: (0.0, 0.5)}], 0)
    assert alone is not None and alone.low is None
    assert averaged("x", [{0: (0.0, 0.5)}, {1: (0.0, 0.5)}], 0) is None


def test_results_over_a_setting_are_means_of_seeds_with_a_band() -> None:
    def run(method: str, rank: Any, seed: int, last: float | None) -> RunFiles:
        settings = {"adapter": {"name": method, "rank": rank}, "seed": seed}
        return RunFiles(Path(f"runs/{method} {rank} {seed}"), settings, None, (), {"last_accuracy": last})

    runs = [run(method, rank, seed, (0.5 if method == "lora" else 0.3) + rank / 100 + seed / 10)
            for method in ("lora", "dual_lora") for rank in (16, 1, 4) for seed in (0, 1)]  # fmt: skip
    runs += [run("lora", None, 0, 0.9), run("norm", 4, 0, 0.2), run("norm", 1, 0, None)]
    groups = groups_of(runs)
    lora, dual, norm = _lines(
        [group for group in groups if group.settings["adapter.rank"]], "adapter.rank", "last_accuracy"
    )
    assert (lora.name, lora.xs, dual.name, dual.style, norm.name) == ("lora", [1, 4, 16], "dual_lora", 1, "norm")
    assert lora.ys == pytest.approx([0.56, 0.59, 0.71])
    assert lora.low is not None and lora.low[0] == pytest.approx(0.56 - 0.1 / 2**0.5)
    assert (norm.xs, norm.ys, norm.low) == ([4], [0.2], None)
    content = over_settings(groups)
    assert content.count("<figure>") == 1 and "<h3>Accuracy over adapter.rank</h3><svg " in content
    assert re.findall(r">(1|4|16)</text>", content) == ["1", "4", "16"]
    few = [each for each in groups if each.settings["adapter.rank"] in (1, 4)]
    assert over_settings(few) == over_settings([]) == ""


def test_runs_are_named_by_what_tells_them_apart() -> None:
    settings = [
        {"adapter.name": "lora", "adapter.rank": 4, "rounds": 5, "local.epochs": 1},
        {"adapter.name": "lora", "adapter.rank": 8, "rounds": 5, "local.epochs": 1},
        {"adapter.name": "norm", "rounds": 5, "local.epochs": 1},
    ]
    assert naming(settings) == ["adapter.name", "adapter.rank"]
    assert naming([settings[0], settings[2]]) == ["adapter.name"]
    assert naming([settings[0]]) == []
    assert naming([settings[0], settings[0]]) == []


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"adapter": {"name": "lora", "rank": 4}}, ["lora, rank 2", "lora, rank 4", "norm"]),
        ({"network": {"name": "drawn", "spread": 0.1}}, ["lora", "lora, drawn", "norm"]),
        ({"local": {"learning_rate": 1.0, "steps": None}}, ["lora", "lora, no steps", "norm"]),
        ({"data": {"root": "elsewhere"}}, ["lora", "lora, root elsewhere", "norm"]),
        ({"cache": {"folder": "elsewhere"}, "seed": 5, "name": "x"}, ["lora", "norm"]),
        ({"trackers": ["csv"], "evaluation": {"auroc": True, "centralized": True}}, ["lora", "norm"]),
        ({"local": {"learning_rate": 0.1}, "server": {"optimizer": {"learning_rate": 2.0}}}, None),
    ],
)
def test_groups_are_named_by_settings(changes: dict[str, Any], names: list[str] | None) -> None:
    base = {"adapter": {"name": "lora", "rank": 2}, "network": None, "local": {"learning_rate": 1.0}, "seed": 0}
    base |= {"server": {"optimizer": {"learning_rate": 1.0}}, "cache": {"folder": "here"}, "name": "first"}
    settings = [base, {**base, **changes}, {**base, "adapter": {"name": "norm"}}]
    runs = [RunFiles(Path(f"runs/{place}"), each, None, (), None) for place, each in enumerate(settings)]
    found = [group.name for group in groups_of(runs)]
    if names is None:
        assert found == ["lora, learning rate 1.0", "lora, learning rate 0.1", "norm, learning rate 1.0"]
    else:
        assert found == names


def test_gini_is_0_for_equals_and_near_1_where_one_has_all() -> None:
    assert gini(np.array([0.3, 0.3, 0.3])) == pytest.approx(0)
    assert gini(np.array([0.0] * 99 + [1.0])) == pytest.approx(0.99)
    assert gini(np.array([1.0, 3.0, np.nan])) == pytest.approx(0.25)
    assert np.isnan(gini(np.array([np.nan])))
    assert gini(np.zeros(3)) == 0


def test_text_is_escaped_wherever_it_goes() -> None:
    assert element("p", "<b>", Html("<i></i>"), title='"x"') == '<p title="&quot;x&quot;">&lt;b&gt;<i></i></p>'
    assert "<td>&lt;b&gt;</td>" in table(["<a>"], [["<b>"]]) and "&lt;a&gt;" in table(["<a>"], [])
    assert '<td class="number" data-value="0.5">&lt;</td>' in table(["x"], [[Cell("<", 0.5)]])
    assert "&lt;c&gt;" in bars([("<c>", 0.5, "50 %", "")])
    names = ["<b>$x$</b>", "&amp;"]
    picture = heat_map(np.ones((2, 2)), names, names, "<about>", ("<one>", "<other>"))
    assert not re.findall("<b>|<about>|<one>|&amp;amp(?!;)", picture) and "&lt;b&gt;$x$&lt;/b&gt;" in picture
    drawn = lines_picture([Line("<b>", [0, 1], [0, 1]), Line("c", [0, 1], [1, 0], 1)], "about", "<x>")
    assert "<b>" not in drawn and "&lt;b&gt;" in drawn and "<x>" not in drawn


MISSING = [
    ("clients.csv", "Accuracy on each client's own held-out images: clients.csv is not in the run directory"),
    ("confusion.csv", "Who is taken for whom: confusion.csv is not in the run directory"),
    ("reliability.csv", "Is its confidence to be believed?: reliability.csv is not in the run directory"),
    ("partition.json", "Who has what: partition.json is not in the run directory"),
    ("environment.json", "config.yaml: every setting"),
]


@pytest.fixture(scope="module")
def num_pictures(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many pictures the page of the run has that is whole but for its curves."""
    whole = Path(shutil.copytree(folder / "one & two", tmp_path_factory.mktemp("whole") / "copy"))
    return page([read_files(without_curves(whole))]).count("<figure>")


@pytest.mark.parametrize(("name", "sentence"), MISSING)
def test_what_is_missing_leaves_its_pictures_out(copied: Path, name: str, sentence: str, num_pictures: int) -> None:
    (copied / name).unlink()
    content = page([read_files(without_curves(copied))])
    assert sentence in text_of(content).replace(" : ", ": ")
    assert num_pictures - 3 < content.count("<figure>") <= num_pictures - (name != "environment.json")


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"client,num_train\n1\n", b'{"clients": [1]}', b"a,a\nb,c\n"])
def test_damaged_files_leave_their_pictures_out(copied: Path, damage: bytes, num_pictures: int) -> None:
    for name, _ in MISSING:
        (copied / name).write_bytes(damage)
    content = page([read_files(without_curves(copied))])
    assert num_pictures - 8 < content.count("<figure>") < num_pictures - 3
    assert content.count('<p class="absent">') >= 4 and "damaged" in content


def test_an_old_run_without_the_figures_of_today_has_a_page(copied: Path) -> None:
    keep = ("round", "accuracy", "loss", "uplink_bytes", "downlink_bytes", "rejected_clients")
    lines = [json.loads(line) for line in (copied / "rounds.jsonl").read_text().splitlines()]
    old = [json.dumps({key: line[key] for key in keep}) for line in lines]
    (copied / "rounds.jsonl").write_text("\n".join(old) + "\n")
    (copied / "summary.json").write_text(json.dumps({"rounds": 2, "last_accuracy": 0.5}))
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config + "of_another_time: 1\n")
    text = text_of(page([read_files(copied)]))
    assert "between 4 clients that train lora" in text and "50.0 %" in text
    assert "No round says who took part" in text
    assert "4 clients" in text_of(page([read_files(copied), read_files(copied)]))


def test_the_page_of_a_run_without_rounds_promises_nothing(bare: Path) -> None:
    record = json.loads((bare / "rounds.jsonl").read_text())
    (bare / "rounds.jsonl").write_text(json.dumps({**record, "round": 0}) + "\n")
    summary = {"rounds": 0, "zero_shot_accuracy": 0.5, "last_accuracy": 0.5, "best_accuracy": 0.5, "best_round": 0}
    (bare / "summary.json").write_text(json.dumps({**summary, "client_accuracy_mean": 0.25}))
    text = text_of(page([read_files(bare)]))
    assert "50.0 % zero-shot; nothing was trained." in text and "the frozen model 25.0 %" in text
    assert "together" not in text and "best round" not in text
    assert "flora.predict" not in text and "flora.export" in text and "rounds=4" in text


def test_passwords_of_trackers_are_not_shown(bare: Path) -> None:
    config = (bare / "config.yaml").read_text()
    address = "trackers:\n- name: mlflow\n  tracking_uri: https://me:se-cret@host:5000/a@b\n"
    (bare / "config.yaml").write_text(config.replace("trackers: []\n", address))
    for shown in (settings(read_files(bare)), several_runs.sections([read_files(bare)])["Differences in settings"]):
        assert "se-cret" not in shown
    assert "https://me:...@host:5000/a@b" in settings(read_files(bare))


def test_many_clients_and_classes_make_no_large_page(copied: Path) -> None:
    number, classes = 20_000, [f"类 {place}" for place in range(120)]
    clients = [{"client": place, "class_counts": {classes[place % 120]: 5}} for place in range(number)]
    (copied / "partition.json").write_text(json.dumps({"class_names": classes, "clients": clients}))
    rows = [f"{place},5,3,1,{place / number}" for place in range(number)]
    (copied / "clients.csv").write_text("\n".join(["client,num_train,num_held_out,num_rounds,accuracy", *rows]))
    counts = [",".join(["1"] * 119 + ["9"])] * 120
    lines = [",".join(["label", *classes]), *(f"{name},{row}" for name, row in zip(classes, counts, strict=True))]
    (copied / "confusion.csv").write_text("\n".join(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = page([read_files(copied)])
    assert len(content) < 1_000_000
    assert "The first 500 of 20000 rows" in content and "the first 1,500 clients" in content
    assert 'class="absent"' not in content


def test_a_metric_of_the_users_own_has_a_picture_though_nothing_declares_it(copied: Path) -> None:
    records = [json.loads(line) for line in (copied / "rounds.jsonl").read_text().splitlines()]
    lines = [json.dumps({**record, "width_of_all": record["round"] / 7}) for record in records]
    (copied / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    rejected = {**records[-1], "rejected_clients": [{"client": 1, "step": 2, "reason": "not finite"}]}
    assert "<h3>Width of all</h3><svg" in joined(other_metrics(read_files(copied)))
    (copied / "rounds.jsonl").write_text("\n".join(map(json.dumps, [*records[:-1], rejected])) + "\n")
    assert "<h3>Rejected updates</h3><svg" in joined(other_metrics(read_files(copied)))


def test_the_command_line_writes_the_page_into_the_run(bare: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main([str(bare)]) == 0
    assert capsys.readouterr().out == f"written to {bare / 'report.html'}\n"
    first = (bare / "report.html").read_text()
    assert main([str(bare)]) == 0  # its own page is written anew
    assert (bare / "report.html").read_text() == first
    assert main([str(bare), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == first
    assert not list(tmp_path.glob("**/*.part"))


def test_a_folder_of_runs_stands_for_the_finished_ones(
    folder: Path, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    sweep = tmp_path / "sweep"
    for name in ("second", "third"):
        without_pictures(Path(shutil.copytree(folder / name, sweep / name)))
    shutil.copytree(folder / "third", sweep / "stopped")
    (sweep / "stopped" / "summary.json").unlink()
    (sweep / "pictures").mkdir()
    (sweep / "table.csv").write_text("")
    assert main([str(sweep)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"written to {sweep / 'report.html'}\n"
    assert printed.err.count("\n") == 1 and f"left out: {sweep / 'stopped'}: this run is not finished" in printed.err
    text = text_of((sweep / "report.html").read_text())
    assert text.startswith("2 runs FLoRA 2 runs second, third")
    monkeypatch.chdir(tmp_path)
    assert main([str(sweep / "second"), str(bare), str(sweep / "second")]) == 0
    assert "2 runs" in (tmp_path / "report.html").read_text()  # the same run twice is one


def test_mistakes_are_one_line_and_nothing_is_written(bare: Path, tmp_path: Path, capsys: Capture) -> None:
    def refused(*arguments: Path | str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main([*map(str, arguments)]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return printed.err

    assert "there is no such run directory" in refused(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "not a run directory" in refused(tmp_path / "empty")
    assert "not a run directory" in refused(bare / "checkpoints")
    sweep = tmp_path / "sweeps" / "first"
    shutil.copytree(bare, sweep / "run")
    assert refused(sweep.parent).endswith(f"name one of these, or several: {sweep}\n")
    (tmp_path / "mine.html").write_text("<p>my own page</p>")
    assert "is there already" in refused(bare, "--output", tmp_path / "mine.html")
    assert "irectory" in refused(bare, "--output", tmp_path / "empty")
    assert "can't be written" in refused(bare, "--output", tmp_path / "no" / "page.html")
    records = (bare / "rounds.jsonl").read_bytes()
    for content, reason in (
        (b"", "no rounds yet"),
        (b"{}\n", "damaged"),
        (b"\xff\n", "damaged"),
        (b"[1]\n", "damaged"),
    ):
        (bare / "rounds.jsonl").write_bytes(content)
        assert reason in refused(bare)
    (bare / "rounds.jsonl").write_bytes(records)
    (bare / "summary.json").write_text('{"rounds"')
    assert "this run is not finished" in refused(bare)
    assert (tmp_path / "mine.html").read_text() == "<p>my own page</p>"


def test_without_matplotlib_one_line_names_the_extra(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(copied)]) == 2
    assert "pip install 'flora-clip[report]'" in capsys.readouterr().err
    assert simulate_main(["quickstart", "--report", f"output={tmp_path / 'runs'}"]) == 2
    assert "pip install 'flora-clip[report]'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_run_writes_its_page_at_its_end(raw_config: dict[str, Any], tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(raw_config))
    assert simulate_main([str(path), "--report"]) == 0
    written = tmp_path / "runs" / "test" / "report.html"
    assert capsys.readouterr().out.endswith(f"to look at: {written}\n")
    assert "On its way" not in written.read_text() and 'http-equiv="refresh"' not in written.read_text()
    assert simulate_main([str(path)]) == 0
    assert not (tmp_path / "runs" / "test-2" / "report.html").exists()


def test_live_the_page_is_written_anew_after_each_round(
    raw_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flora.report.live.PAUSE", 0)
    path, seen = tmp_path / "x.yaml", []
    path.write_text(json.dumps(raw_config))
    written = tmp_path / "runs" / "test" / "report.html"

    def after_round(record: RoundRecord, state: object) -> None:
        seen.append(re.search(r"On its way: round \d of \d", text_of(written.read_text()))[0])  # type: ignore[index]
        assert 'http-equiv="refresh"' in written.read_text()

    assert simulate_main([str(path), "--live"], hooks=Hooks(after_round=after_round)) == 0
    assert seen == ["On its way: round 1 of 2", "On its way: round 2 of 2"]
    assert "On its way" not in written.read_text()
    assert (
        simulate_main(["--resume", str(written.parent), "rounds=3", "--live"], hooks=Hooks(after_round=after_round))
        == 0
    )
    assert seen[2:] == ["On its way: round 3 of 3"]


def test_the_page_of_a_run_that_stops_says_so_and_how_to_go_on(
    raw_config: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(raw_config))
    written = tmp_path / "runs" / "test" / "report.html"

    def stop(round: int, clients: tuple[int, ...]) -> None:
        if round == 2:
            raise KeyboardInterrupt

    # Rounds are too short for the page to be written after each; in the end it is, all the same.
    assert simulate_main([str(path), "--live"], hooks=Hooks(before_block=stop)) == 130
    content = written.read_text()
    text = text_of(content)
    assert "Interrupted after round 1 of 2; how to go on is below." in text
    assert f"Go on python -m flora.simulate --resume {written.parent}" in text
    assert "On its way" not in text and 'http-equiv="refresh"' not in content
    assert simulate_main(["--resume", str(written.parent), "--live"]) == 0
    assert "Interrupted" not in written.read_text()
    # A run that stops before its first record has no page, and no directory.
    assert simulate_main([str(path), "--live", "name=broken", "backbone.weights=no.safetensors"]) == 2
    assert not (tmp_path / "runs" / "broken").exists()


def test_evaluations_on_other_data_are_a_table(copied: Path) -> None:
    assert evaluations(read_files(copied)) == ""
    assert evaluate_main([str(copied), "data.num_classes=2"]) == 0
    assert evaluate_main([str(copied), "--name", "<b>"]) == 2
    record = json.loads((copied / "evaluations" / "patterns.json").read_text())
    (copied / "evaluations" / "<b>.json").write_text(json.dumps({**record, "client": "<i>"}))
    (copied / "evaluations" / "damaged.json").write_text("{")
    (copied / "evaluations" / "other.json").write_text('{"metrics": []}')
    content, frozen, metrics = evaluations(read_files(copied)), record["zero_shot"]["accuracy"], record["metrics"]
    figures = [percent(each) for each in (frozen, *map(metrics.get, ("accuracy", "macro_f1", "calibration_error")))]
    shown = " ".join([str(record["num_images"]), "2", *figures])
    rows = f"<b> patterns of client <i> {shown} patterns patterns the server's {shown} Left out, because damaged: "
    assert text_of(content).endswith(f"{rows}evaluations/damaged.json, evaluations/other.json.")
    assert "<td>&lt;b&gt;</td>" in content


def test_a_page_on_its_way_is_written_less_often_than_rounds_pass(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    written: list[float] = []

    def write(*arguments: Any) -> None:
        written.append(clock[0])
        clock[0] += 1.0

    monkeypatch.setattr("flora.report.live.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("flora.report.live.write_page", write)
    live = LivePage(print)
    live.opened(folder / "second")
    for _ in range(25):
        live.record(RoundRecord(1, {}))
        clock[0] += 1.0
    assert written == [0.0, 10.0, 20.0]


def test_a_page_that_cant_be_written_is_said_once_and_ends_nothing(raw_config: dict[str, Any]) -> None:
    class InTheWay(Sink):
        def opened(self, path: Path) -> None:
            (path / "report.html").write_text("mine")

    lines: list[str] = []
    result = simulate(parse_config(raw_config), sinks=[InTheWay(), LivePage(lines.append)])
    assert result.summary.rounds == 2
    assert len(lines) == 1 and "no page of this run on its way" in lines[0]
    assert (result.directory / "report.html").read_text() == "mine"
