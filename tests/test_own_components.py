"""What a user's own strategy, metric or data set may do wrong is one line; what is right shows everywhere."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flora.config.parse import parse_config
from flora.core import command_line
from flora.core.errors import UserError
from flora.core.registry import register
from flora.data.datasets.base import ImageArrays, Split
from flora.evaluation import metrics
from flora.evaluation.metrics import ServerView, round_metric
from flora.server.strategies.base import Strategy
from flora.simulate import resume, simulate
from flora.sweep import __main__ as sweep


@pytest.fixture(autouse=True)
def metrics_of_one_test() -> Iterator[None]:
    known: tuple[dict[str, Any], ...] = (metrics.METRICS, metrics.COMPUTED, metrics.FIGURES)
    before = [dict(each) for each in known]
    yield
    for each, were in zip(known, before, strict=True):
        each.clear()
        each.update(were)


METRIC = """
import numpy as np

from flora.evaluation.metrics import round_metric


@round_metric("largest_share", "share of the class that is predicted most often")
def largest_share(view):
    return np.bincount(view.evaluation.predicted).max() / len(view.labels)
"""


def test_a_metric_of_ones_own_is_in_every_run_of_a_sweep_and_in_its_table(
    raw_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_config["data"] = "digits"  # the processes of a sweep don't know the tests' own
    raw_config["split"] = {"name": "sample", "num_train": 40, "num_test": 30}
    (tmp_path / "x.yaml").write_text(json.dumps(raw_config))
    (tmp_path / "metric_of_a_sweep.py").write_text(METRIC)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "imported", [])
    assert sweep.main(["x.yaml", "seed=0,1", "--import", "metric_of_a_sweep.py", "--output", "s"]) == 0
    assert "largest share" in capsys.readouterr().out
    shares = []
    for seed in (0, 1):
        folder = tmp_path / "s" / f"x_seed={seed}"
        records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        summary = json.loads((folder / "summary.json").read_text())
        assert 0 < summary["largest_share"] == records[-1]["largest_share"] <= 1
        shares.append(summary["largest_share"])
    (row,) = csv.DictReader((tmp_path / "s" / "table.csv").open())
    assert float(row["largest_share"]) == pytest.approx(sum(shares) / 2)


@pytest.mark.parametrize(
    ("value", "fault"), [(float("nan"), "nan"), (np.float64("inf"), "inf"), ("abc", "str"), (np.zeros(3), "ndarray")]
)
def test_a_metric_that_is_no_number_is_one_line(raw_config: dict[str, Any], value: object, fault: str) -> None:
    round_metric("mine", "a test")(lambda view: value)
    with pytest.raises(UserError) as caught:
        simulate(parse_config(raw_config))
    assert str(caught.value) == f"the metric 'mine' is {fault}, expected a number; None where a round has no value"


def test_a_metric_may_have_no_value_and_its_name_only_once(raw_config: dict[str, Any]) -> None:
    @round_metric("mine", "a test", unit="count")
    def mine(view: ServerView) -> int | None:
        return view.state.round or None

    result = simulate(parse_config(raw_config))
    assert [record.mine for record in result.records] == [None, 1, 2] and result.summary.mine == 2
    assert "mine" in (result.directory / "log.txt").read_text()
    with pytest.raises(ValueError, match="the metric 'accuracy' is declared already"):
        round_metric("accuracy", "a test")(lambda view: 1.0)
    with pytest.raises(ValueError, match=r"expected a unit of .* got 'procent'"):
        round_metric("other", "a test", unit="procent")(lambda view: 1.0)


def test_a_resumed_run_says_which_metric_nothing_computes_any_more(raw_config: dict[str, Any]) -> None:
    round_metric("mine", "a test")(lambda view: 0.5)
    result = simulate(parse_config(raw_config))
    for known in (metrics.METRICS, metrics.COMPUTED, metrics.FIGURES):
        known.pop("mine")  # type: ignore[attr-defined]
    rest = resume(result.directory, ["rounds=3"])
    message = "warning: nothing computes the metric 'mine' any more: --import the file that declares it"
    assert message in (rest.directory / "log.txt").read_text()


@pytest.mark.parametrize(
    ("name", "meant"), [("train", "trains"), ("alternate", "alternates"), ("finalise", "finalize")]
)
def test_a_name_that_is_nearly_one_of_the_base_is_refused(name: str, meant: str) -> None:
    component = dataclass(frozen=True)(type("Mine", (Strategy,), {name: lambda self, *given: True}))
    with pytest.raises(ValueError, match=f"Mine: nothing reads '{name}'; did you mean '{meant}'?"):
        register("mine_misspelt")(component)


def test_a_strategy_that_alternates_has_to_say_so_and_one_that_trains_nothing_is_refused(
    raw_config: dict[str, Any],
) -> None:
    @register("own_in_turn")
    @dataclass(frozen=True)
    class InTurn(Strategy):
        def trains(self, name: str, round: int) -> bool:
            return name.endswith("lora_A" if round % 2 else "lora_B")

    @register("own_nothing")
    @dataclass(frozen=True)
    class Nothing(Strategy):
        def trains(self, name: str, round: int) -> bool:
            return False

    for name, message in (
        ("own_in_turn", "own_in_turn trains other tensors in round 2 than in round 1: its class has to say "
         "`alternates = True`"),
        ("own_nothing", "own_nothing trains no tensor of this adapter in round 1"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            simulate(parse_config({**raw_config, "server": {"strategy": name}}), numbered=True)
        assert str(caught.value) == f"server.strategy: {message}"


def test_images_and_groups_of_the_wrong_kind_are_one_line() -> None:
    pixels = np.zeros((4, 8, 8), np.uint8)
    wrongs = ((pixels.astype(float), r"float64 \(4, 8, 8\)"), (pixels[0], r"uint8 \(8, 8\)"), ([1], "list"))
    for wrong, found in wrongs:
        with pytest.raises(UserError, match=f"data: the pixels of mine: expected an array of uint8, .*, got {found}"):
            ImageArrays(wrong, "mine")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="data: 3 groups for 4 images"):
        Split(ImageArrays(pixels, "mine"), np.arange(4), np.zeros(4, np.int64), np.array(["a", "b", "c"]))
