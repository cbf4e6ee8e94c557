"""Private runs from their first round to their last: budgets, resuming, what is published, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import comparable
from safetensors.torch import load_file

from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.evaluation.metrics import METRICS
from flora.report.charts import SPENT, axes_of, participation, partition_map
from flora.report.groups import groups_of
from flora.report.page import page
from flora.report.reading import Absent, read_files
from flora.report.several_runs import _axes
from flora.simulate import main, resume, simulate
from flora.sweep.folding import why_alone
from flora.sweep.runs import bring_to_their_end

Capture = pytest.CaptureFixture[str]
CENTRAL = {"name": "central", "clip_norm": 0.1, "noise_multiplier": 1.0, "accountant": "rdp"}
POISSON = {"name": "poisson", "fraction": 0.5}
MECHANISMS: dict[str, dict[str, Any]] = {
    "central": {"privacy": CENTRAL, "clients": {"number": 4, "cohort": POISSON}},
    "adaptive": {
        "privacy": {**CENTRAL, "clip_norm": {"name": "adaptive", "initial": 0.05}},
        "clients": {"number": 4, "cohort": POISSON},
        "server": {"optimizer": "adam"},
    },
    "local": {
        "privacy": {**CENTRAL, "name": "local"},
        "communication": {"upload": {"name": "top_k", "fraction": 0.5}, "error_feedback": True},
    },
    "tree": {
        "privacy": {**CENTRAL, "name": "tree", "restart_every": 3},
        "clients": {"number": 4, "cohort": {"name": "in_turn", "number": 2}},
    },
    "banded": {
        "privacy": {**CENTRAL, "name": "banded", "bands": 3},
        "clients": {"number": 4, "cohort": {"name": "in_turn", "number": 2}},
    },
}


def contents(directory: Path) -> dict[Path, bytes]:
    """The bytes of all files of a run, as they are."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Stop(Exception):
    """What a hook ends a run with."""


def stopping_after(number: int) -> Hooks:
    def stop(record: Any, state: Any) -> None:
        if record.round == number:
            raise Stop

    return Hooks(after_round=stop)


def directory_of(raw: dict[str, Any]) -> Path:
    return Path(raw["output"]) / raw["name"]


@pytest.mark.parametrize("changes", MECHANISMS.values(), ids=MECHANISMS.keys())
def test_a_run_goes_on_as_if_it_had_never_stopped(
    raw_config: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    raw = {**raw_config, **changes, "rounds": 5}
    whole = comparable(simulate(parse_config({**raw, "name": "whole"})).directory)
    for number in (1, 4):
        config = parse_config({**raw, "name": f"stopped-{number}"})
        with pytest.raises(Stop):
            simulate(config, hooks=stopping_after(number))
        files = comparable(resume(directory_of({**raw, "name": f"stopped-{number}"})).directory)
        for name in ("rounds.jsonl", "adapter.safetensors", "clients.csv"):
            assert files[name] == whole[name], name


def test_what_a_mechanism_carries_is_in_checkpoints_and_nothing_without_one(raw_config: dict[str, Any]) -> None:
    stored = {}
    for name, changes in {"none": {}, **MECHANISMS}.items():
        directory = simulate(parse_config({**raw_config, **changes, "name": name})).directory
        server = load_file(directory / "checkpoints" / "round-0002" / "server.safetensors")
        stored[name] = {key for key in server if key.startswith("privacy.")}
    assert stored["none"] == set()
    assert stored["central"] == stored["tree"] == stored["banded"] == {"privacy.noise_multiplier"}
    assert stored["adaptive"] == {"privacy.noise_multiplier", "privacy.clip_norm"}
    assert stored["local"] == {"privacy.noise_multiplier", "privacy.precision"}


def test_records_summary_table_and_page_say_what_was_spent(raw_config: dict[str, Any]) -> None:
    result = simulate(parse_config({**raw_config, **MECHANISMS["adaptive"]}))
    spent = [record.epsilon for record in result.records]
    assert spent[0] is None and 0 < spent[1] < spent[2] == result.summary.epsilon
    assert all(record.clip_norm > 0 for record in result.records[1:])
    assert all(record.clipped_fraction is None or 0 <= record.clipped_fraction <= 1 for record in result.records[1:])
    assert result.summary.noise_multiplier == 1.0
    log = (result.directory / "log.txt").read_text()
    assert f"privacy spent (epsilon)  {spent[2]:.3g}" in log
    assert "privacy: the noise is seeded, for research" in log and "privacy.publish: false leaves them out" in log
    shown = page([read_files(result.directory)])
    assert f"epsilon {spent[2]:.3g} at delta 1e-05 (central)" in shown
    for title in ("Epsilon", "Clip norm", "Accuracy over privacy spent", "Loss over privacy spent"):
        assert f"<h3>{title}</h3><svg" in shown
    (axis,) = (places for title, places in _axes(groups_of([read_files(result.directory)])).values() if title == SPENT)
    assert list(axis.values()) == [dict(enumerate([0.0, *spent[1:]]))]


def test_a_run_without_privacy_has_none_of_it(raw_config: dict[str, Any]) -> None:
    result = simulate(parse_config(raw_config))
    assert "privacy spent" not in axes_of(read_files(result.directory))
    assert all(result.records[-1].metrics[name] is None for name in ("epsilon", "clip_norm", "clipped_fraction"))
    assert result.summary.epsilon is None and result.summary.noise_multiplier is None
    assert "privacy" not in (result.directory / "log.txt").read_text()


class TestBudget:
    def raw(self, raw_config: dict[str, Any]) -> dict[str, Any]:
        # Epsilon after each round: 4.4, 6.6, 8.4, ...
        privacy = {**CENTRAL, "accountant": "pld", "budget_epsilon": 8.0}
        return {**raw_config, "rounds": 5, "privacy": privacy, "evaluation": {"every": 4}}

    def test_the_run_stops_before_the_round_that_would_pass_it(self, raw_config: dict[str, Any]) -> None:
        result = simulate(parse_config(self.raw(raw_config)))
        assert [record.round for record in result.records] == [0, 1, 2]
        assert result.summary.rounds == 2 and result.summary.epsilon <= 8.0
        assert result.records[-1].accuracy is not None  # evaluated as the last round is
        assert (result.directory / "checkpoints" / "round-0002").is_dir()
        line = "stopped after round 2 of 5: round 3 would spend epsilon 8.385, more than privacy.budget_epsilon 8"
        assert line in (result.directory / "log.txt").read_text()

    @pytest.mark.parametrize("overrides", [[], ["rounds=9"]])
    def test_it_is_over_and_stays_as_it_is(self, raw_config: dict[str, Any], overrides: list[str]) -> None:
        directory = simulate(parse_config(self.raw(raw_config))).directory
        before = contents(directory)
        message = r"finished: privacy.budget_epsilon 8 ended it after 2 rounds, and a budget can't become more$"
        with pytest.raises(UserError, match=message):
            resume(directory, overrides)
        assert contents(directory) == before

    def test_one_that_was_stopped_before_its_end_goes_on_to_it(self, raw_config: dict[str, Any]) -> None:
        whole = comparable(simulate(parse_config({**self.raw(raw_config), "name": "whole"})).directory)
        directory = simulate(parse_config(self.raw(raw_config))).directory
        (directory / "summary.json").unlink()
        assert resume(directory).summary.rounds == 2
        assert comparable(directory)["rounds.jsonl"] == whole["rounds.jsonl"]

    def test_a_sweep_leaves_it_as_it_is(self, raw_config: dict[str, Any]) -> None:
        config = parse_config(self.raw(raw_config))
        assert bring_to_their_end([config], Hooks()) == {config.name: None}
        before = contents(Path(config.output, config.name))
        assert bring_to_their_end([config], Hooks()) == {config.name: None}
        assert contents(Path(config.output, config.name)) == before

    def test_a_budget_that_one_round_spends_is_refused(self, raw_config: dict[str, Any], capsys: Capture) -> None:
        raw = self.raw(raw_config)
        raw["privacy"]["budget_epsilon"] = 1.0
        with pytest.raises(UserError, match=r"privacy.budget_epsilon: expected at least .*, which round 1 spends"):
            simulate(parse_config(raw))
        assert not directory_of(raw).exists()


class TestTarget:
    def raw(self, raw_config: dict[str, Any]) -> dict[str, Any]:
        privacy = {"name": "central", "clip_norm": 0.1, "target_epsilon": 6.0, "accountant": "rdp"}
        return {**raw_config, "privacy": privacy, "clients": {"number": 4, "cohort": POISSON}}

    def test_the_multiplier_is_searched_logged_and_recorded(self, raw_config: dict[str, Any]) -> None:
        result = simulate(parse_config(self.raw(raw_config)))
        assert 5.9 < result.summary.epsilon <= 6.0
        found = result.summary.noise_multiplier
        assert (
            f"noise multiplier {found:.4g}: epsilon {result.summary.epsilon:.4g}"
            in (result.directory / "log.txt").read_text()
        )

    def test_its_run_can_have_no_more_rounds(self, raw_config: dict[str, Any]) -> None:
        directory = simulate(parse_config(self.raw(raw_config))).directory
        with pytest.raises(UserError, match=r"rounds: they can't become more, because privacy.target_epsilon is for"):
            resume(directory, ["rounds=4"])


def test_what_is_not_covered_is_left_out_of_records(raw_config: dict[str, Any]) -> None:
    """With `publish: false` nothing but what follows from noisy sums and the common test images is written down."""
    changes = {**MECHANISMS["adaptive"], "evaluation": {"clients_every": 1}}
    shown = simulate(parse_config({**raw_config, **changes, "name": "shown"}))
    raw = {**raw_config, **changes, "name": "hidden", "privacy": {**changes["privacy"], "publish": False}}
    raw["trackers"] = ["csv"]
    hidden = simulate(parse_config(raw))
    secret = {name for name, metric in METRICS.items() if not metric.is_covered}
    assert {"train_loss", "num_clients", "clipped_fraction", "client_accuracy_mean", "aggregation_error"} < secret
    assert secret.isdisjoint({"accuracy", "loss", "epsilon", "clip_norm", "learning_rate"})
    for record, full in zip(hidden.records, shown.records, strict=True):
        assert (record.cohort is None or record.round == 0) and record.rejected_clients == ()
        for name in METRICS:
            if name in secret:
                assert record.metrics[name] is None, name
            elif not name.endswith(("_seconds", "_bytes")):
                assert record.metrics[name] == full.metrics[name], name
    assert shown.records[1].num_clients is not None and shown.records[2].client_accuracy_mean is not None
    assert (hidden.directory / "clients.csv").read_text().splitlines() == ["client", "0", "1", "2", "3"]
    assert "training loss" not in (hidden.directory / "log.txt").read_text()
    assert "epsilon" in page([read_files(hidden.directory)])
    for draw in (partition_map, participation):
        assert "<svg" in draw(read_files(shown.directory))
        for is_live in (False, True):
            with pytest.raises(Absent, match=r"no noise covers what single clients have"):
                draw(read_files(hidden.directory, is_live=is_live))
    with (hidden.directory / "metrics.csv").open(newline="") as file:
        tracked = list(csv.DictReader(file))
    assert float(tracked[2]["epsilon"]) == hidden.summary.epsilon
    assert not any(row[name] for row in tracked for name in secret & row.keys())
    assert resume_finished(hidden.directory) == hidden.summary.epsilon


def resume_finished(directory: Path) -> float:
    result = resume(directory, ["rounds=3"])
    return float(result.records[2].epsilon)


def test_runs_of_a_sweep_may_differ_in_their_noise_and_train_together(raw_config: dict[str, Any]) -> None:
    raws = [
        {**raw_config, **MECHANISMS[name], "name": f"{name}-{multiplier}"}
        for name, multiplier in (("central", 0.5), ("central", 2.0), ("local", 1.0))
    ]
    for raw in raws:
        raw["privacy"] = {**raw["privacy"], "noise_multiplier": float(raw["name"].rpartition("-")[2])}
        raw["backbone"] = {**raw["backbone"], "precision": "fp64"}
    configs = [parse_config(raw) for raw in raws]
    assert [why_alone(config) for config in configs] == [None, None, None]
    assert set(bring_to_their_end(configs, Hooks()).values()) == {None}
    for config, raw in zip(configs, raws, strict=True):
        alone = simulate(parse_config({**raw, "name": f"alone-{raw['name']}"}))
        together = load_file(Path(config.output, config.name) / "adapter.safetensors")
        for name, tensor in load_file(alone.directory / "adapter.safetensors").items():
            assert (tensor - together[name]).abs().max() < 1e-9, name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "products": ({"server": {"strategy": "flexlora"}}, "server.strategy: flexlora reads what single clients ended"),
    "stacking": ({"server": {"strategy": "flora_stacking"}}, "server.strategy: flora_stacking reads"),
    "median": ({"server": {"aggregator": "median"}}, "server.aggregator: expected mean with privacy"),
    "bounded": ({"server": {"aggregator": "bounded_mean"}}, "server.aggregator: expected mean with privacy"),
    "scaffold": ({"local": {"optimizer": "sgd", "correction": "scaffold"}}, "local.correction: expected none or"),
    "feddyn": ({"local": {"optimizer": "sgd", "correction": "feddyn"}}, "local.correction: expected none or fedprox"),
    "ratio": ({"server": {"screening": {"max_norm_ratio": 3}}}, "server.screening.max_norm_ratio: expected none"),
    "abort": ({"server": {"screening": {"policy": "abort"}}}, "server.screening.policy: expected skip with privacy"),
    "buffered": (
        {"server": {"schedule": {"name": "buffered", "buffer": 2}}, "network": "drawn"},
        "server.schedule: expected synchronous with privacy",
    ),
    "over-selection": (
        {"server": {"stragglers": {"over_selection": 2}}, "network": "drawn"},
        "server.stragglers.over_selection: expected 1 with privacy",
    ),
    "distillation": (
        {"server": {"distillation": {"data": "patterns", "num_images": 9}}},
        "server.distillation: expected none with privacy",
    ),
    "by size": ({"clients": {"cohort": {"name": "by_size", "number": 2}}}, "clients.cohort: expected uniform, poisson"),
    "tree of alternating tensors": (
        {"server": {"strategy": "rolora"}, "privacy": {**CENTRAL, "name": "tree"}},
        "privacy: tree and banded can't be used",
    ),
    "bands of alternating tensors": (
        {"server": {"strategy": "rolora"}, "privacy": {**CENTRAL, "name": "banded", "bands": 1}},
        "privacy: tree and banded can't be used",
    ),
    "bands of cohorts that are drawn": (
        {"clients": {"cohort": POISSON}, "privacy": {**CENTRAL, "name": "banded", "bands": 2}},
        "privacy.bands: expected 1, or clients.cohort in_turn",
    ),
    "alone, unpublished": (
        {"evaluation": {"num_local_only": 1}, "privacy": {**CENTRAL, "publish": False}},
        "privacy.publish: expected true, or none of evaluation.num_local_only",
    ),
    "in turn, networked": (
        {"clients": {"cohort": {"name": "in_turn", "number": 2}}, "network": "drawn"},
        "clients.cohort: in_turn can't be used with a network",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_breaks_the_guarantee_is_refused_with_a_reason(
    raw_config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        check_experiment(parse_config({**raw_config, "privacy": CENTRAL, **changes}))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("privacy=central", "privacy.clip_norm: missing: largest norm of an update"),
        ("privacy={name: central, clip_norm: 1}", "privacy.noise_multiplier: expected either this or `target_epsilon`"),
        ("privacy={name: central, clip_norm: -1, noise_multiplier: 1}", "privacy.clip_norm: expected a number above 0"),
        ("privacy={name: gaussian}", "privacy.name: 'gaussian' is not known; expected one of central, local, tree"),
        ("clients.cohort=poisson", "clients.cohort.fraction: missing: poisson needs the probability"),
    ],
)
def test_bad_input_is_one_line(
    raw_config: dict[str, Any], tmp_path: Path, capsys: Capture, override: str, message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({key: value for key, value in raw_config.items() if key != "name"}))
    assert main([str(path), override]) == 2
    error = capsys.readouterr().err
    assert f"command line: {message}" in error and error.count("\n") == 1
    assert not Path(raw_config["output"]).exists()
