"""Trackers are told of each round once, whatever stops on the way, and read back with the libraries themselves."""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flora.config.parse import parse_config
from flora.core.errors import UserError
from flora.core.registry import OptionError, components, option, register
from flora.evaluation.metrics import METRICS
from flora.runs.run_directory import read_json
from flora.simulate import resume, simulate
from flora.trackers import files, services
from flora.trackers.base import Figures, Following, TrackedRun, Tracker


class Remembers(Following):
    """What a tracked run was told, in the list that `shelves` has of its id; fails at the rounds in `fails_at`."""

    def __init__(self, id: str, last_round: int, fails_at: int) -> None:
        self.id, self.last_round, self.fails_at = id, last_round, fails_at

    def round(self, number: int, figures: Figures) -> None:
        if number == self.fails_at:
            raise ConnectionError("no network\nat all")
        SHELVES.setdefault(self.id, []).append(number)
        self.last_round = number


SHELVES: dict[str, list[int]] = {}


@register("shelf")
@dataclass(frozen=True)
class Shelf(Tracker):
    """A tracker in memory."""

    fails_at: int = option("the round at which it fails", -1)
    is_closed: bool = option("whether it can't be reached", False)

    def follow(self, run: TrackedRun) -> Following:
        if self.is_closed:
            raise ConnectionError("closed")
        return Remembers(run.id or str(run.directory), run.last_round, self.fails_at)


@pytest.fixture(autouse=True)
def empty_shelves() -> None:
    SHELVES.clear()


def run_that_loses_its_last_checkpoint(raw: Mapping[str, Any], tracker: Any) -> Path:
    """A run of four rounds that was killed after round 3, behind the last checkpoint but one, and gone on with."""
    config = parse_config({**raw, "rounds": 3, "trackers": [tracker]})
    directory = simulate(config).directory
    shutil.rmtree(directory / "checkpoints/round-0003")
    (directory / "summary.json").unlink()
    before = read_json(directory / "trackers.json")
    resume(directory, ["rounds=4"])
    after = read_json(directory / "trackers.json")
    for name in before:
        assert (before[name]["last_round"], after[name]["last_round"]) == (3, 4)
        assert before[name]["id"] == after[name]["id"]
    return directory


ROUNDS = [0, 1, 2, 3, 4]


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module}")


def accuracies(directory: Path) -> list[float]:
    return [json.loads(record)["accuracy"] for record in (directory / "rounds.jsonl").read_text().splitlines()]


def test_csv(raw_config: dict[str, Any]) -> None:
    directory = run_that_loses_its_last_checkpoint(raw_config, "csv")
    with (directory / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["round"]) for row in rows] == ROUNDS
    assert [float(row["accuracy"]) for row in rows] == accuracies(directory)
    assert rows[0]["train_loss"] == "" and float(rows[1]["train_loss"]) > 0


def test_tensorboard(raw_config: dict[str, Any], tmp_path: Path) -> None:
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = {"name": "tensorboard", "folder": str(tmp_path / "boards")}
    directory = run_that_loses_its_last_checkpoint(raw_config, tracker)
    assert [path.name for path in (tmp_path / "boards").iterdir()] == ["test"]
    events = EventAccumulator(str(tmp_path / "boards/test")).Reload()
    assert [event.step for event in events.Scalars("accuracy")] == ROUNDS
    assert [event.value for event in events.Scalars("accuracy")] == pytest.approx(accuracies(directory))
    assert {"settings/text_summary", "summary/text_summary"} <= set(events.Tags()["tensors"])


def test_mlflow(raw_config: dict[str, Any], tmp_path: Path) -> None:
    needs("mlflow")
    needs("sqlalchemy")
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    directory = run_that_loses_its_last_checkpoint(raw_config, {"name": "mlflow", "tracking_uri": uri})
    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("flora").experiment_id])
    assert [run.info.run_id for run in runs] == [read_json(directory / "trackers.json")["mlflow"]["id"]]
    assert runs[0].info.status == "FINISHED" and runs[0].data.params["adapter.rank"] == "2"
    assert "trackers" not in runs[0].data.params
    history = client.get_metric_history(runs[0].info.run_id, "accuracy")
    assert [point.step for point in history] == ROUNDS
    assert [point.value for point in history] == accuracies(directory)
    # What was not noted down when the process was killed, the store knows.
    content = directory / "trackers.json"
    content.write_text(content.read_text().replace('"last_round": 4', '"last_round": 2'))
    resume(directory, ["rounds=5"])
    assert [point.step for point in client.get_metric_history(runs[0].info.run_id, "loss")] == [*ROUNDS, 5]
    tracker = {"name": "mlflow", "tracking_uri": uri, "experiment": "hidden"}
    simulate(parse_config({**raw_config, **HIDDEN, "name": "hidden", "trackers": [tracker]}))
    (run,) = client.search_runs([client.get_experiment_by_name("hidden").experiment_id])
    steps = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    told = {name for name, points in steps.items() if any(point.step for point in points)}
    assert {"accuracy", "epsilon"} <= told and secrets(told) == set()
    assert secrets(name for name, value in run.data.tags.items() if value != "None") == set()
    assert "privacy.publish" in run.data.params and "seed" not in run.data.params
    with pytest.raises(UserError, match="trackers: mlflow: "):
        simulate(parse_config({**raw_config, "name": "b", "trackers": [{"name": "mlflow", "tracking_uri": "no://"}]}))
    assert not (directory.parent / "b").exists()


def wandb_history(file: Path) -> list[tuple[int, float]]:
    """The steps and accuracies in the file that `wandb sync` sends: a log of LevelDB's format behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, data, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # too little for a header: the rest of the block is empty
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind not in (1, 4):  # the record goes on in the next block
            continue
        record, data = Record.FromString(data), b""
        if record.WhichOneof("record_type") == "history":
            values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            found.append((int(values["_step"]), float(values["accuracy"])))
    return found


def test_wandb_offline(raw_config: dict[str, Any]) -> None:
    needs("wandb")
    directory = run_that_loses_its_last_checkpoint(raw_config, {"name": "wandb", "mode": "offline"})
    id = read_json(directory / "trackers.json")["wandb"]["id"]
    paths = sorted((directory / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb"))
    assert len(paths) == len(list((directory / "wandb").glob("offline-run-*"))) == 2
    points = [point for path in paths for point in wandb_history(path)]
    assert points == list(enumerate(accuracies(directory)))


def test_trackio(raw_config: dict[str, Any]) -> None:
    needs("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    directory = run_that_loses_its_last_checkpoint(raw_config, "trackio")
    name = read_json(directory / "trackers.json")["trackio"]["id"]
    logs = SQLiteStorage.get_logs("flora", name)
    assert [(each["step"], each["accuracy"]) for each in logs] == list(enumerate(accuracies(directory)))


HIDDEN: dict[str, Any] = {
    "clients": {"number": 4, "cohort": {"name": "poisson", "fraction": 0.7}},
    "evaluation": {"clients_every": 1},
    "seed": 5,
    "privacy": {"name": "central", "clip_norm": 0.1, "noise_multiplier": 1.0, "accountant": "rdp", "publish": False},
}
SECRET = {name for name, metric in METRICS.items() if not metric.is_covered} | {"rejected_clients"}
SECRET_FIGURES = {figure.name for name in SECRET & METRICS.keys() for figure in METRICS[name].figures}


def secrets(names: Iterable[str]) -> set[str]:
    """Those of figures' names, `metric/key` and `summary/figure` included, that privacy doesn't cover."""
    parts = {name: name.split("/") for name in names}
    return {
        name
        for name, (first, *others) in parts.items()
        if (others[0] in SECRET_FIGURES if first == "summary" else first in SECRET)
    }


class Witness(Following):
    """Remembers all that a tracker of this name is handed."""

    def __init__(self, name: str, run: TrackedRun, heard: dict[str, list[Mapping[str, Any]]]) -> None:
        self.id, self.last_round, self.heard = name, run.last_round, heard.setdefault(name, [run.settings])

    def round(self, number: int, figures: Figures) -> None:
        if number:  # before the first round there is nobody's secret
            self.heard.append(figures)
        self.last_round = number

    def finish(self, figures: Mapping[str, Any]) -> None:
        self.heard.append({f"summary/{name}": value for name, value in figures.items()})


def test_no_tracker_is_handed_what_privacy_does_not_cover(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `privacy.publish: false`, every tracker that there is, each in place of its library a witness."""
    names = sorted(components(Tracker))
    heard: dict[str, list[Mapping[str, Any]]] = {}
    for name, kind in components(Tracker).items():
        monkeypatch.setattr(kind, "require", lambda tracker: None)
        monkeypatch.setattr(kind, "follow", lambda tracker, run, name=name: Witness(name, run, heard))
    assert {"csv", "tensorboard", "wandb", "mlflow", "trackio"} <= set(names)
    for publish in (True, False):
        heard.clear()
        privacy = {**HIDDEN["privacy"], "publish": publish}
        raw = {**raw_config, **HIDDEN, "privacy": privacy, "name": f"publish-{publish}", "trackers": names}
        simulate(parse_config(raw))
        assert sorted(heard) == names and len({str(told) for told in heard.values()}) == 1
        settings, *figures = heard["csv"]
        told = {name for each in figures for name, value in each.items() if value is not None}
        assert len(figures) == 3 and {"accuracy", "epsilon", "summary/last_accuracy"} <= told
        assert settings["privacy.publish"] is publish and ("seed" in settings) is publish
        if publish:
            assert {"train_loss", "num_clients", "client_accuracy_mean", "rejected_clients"} <= secrets(told)
        else:
            assert secrets(told) == set()


def test_nor_do_tensorboards_files_have_it(raw_config: dict[str, Any]) -> None:
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = simulate(parse_config({**raw_config, **HIDDEN, "trackers": ["tensorboard"]})).directory
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    told = {name for name in events.Tags()["scalars"] if any(event.step for event in events.Scalars(name))}
    assert {"accuracy", "epsilon"} <= told and secrets(told) == set()
    (settings,) = (event.tensor_proto.string_val[0] for event in events.Tensors("settings/text_summary"))
    assert b"privacy.publish" in settings and b"seed" not in settings


def test_a_tracker_that_fails_is_left_with_one_line_and_told_what_it_missed(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "rounds": 3, "trackers": [{"name": "shelf", "fails_at": 1}, "csv"]}
    lines: list[str] = []
    result = simulate(parse_config(raw), echo=lines.append)
    warnings = [line for line in lines if "tracker" in line]
    left = "warning: tracker shelf failed and is left, the run goes on: ConnectionError: no network at all"
    assert warnings == [left] and left in (result.directory / "log.txt").read_text()
    assert list(SHELVES.values()) == [[0]]
    assert len((result.directory / "metrics.csv").read_text().splitlines()) == 5
    resume(result.directory, ["rounds=5", "trackers=[shelf]"])
    assert list(SHELVES.values()) == [[0, 1, 2, 3, 4, 5]]
    assert read_json(result.directory / "trackers.json")["csv"]["last_round"] == 3


def test_one_that_is_out_of_reach_from_the_first_and_one_that_the_disk_fails(
    raw_config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    trackers = [{"name": "shelf", "is_closed": True}, {"name": "csv", "path": str(tmp_path / "full/a.csv")}]
    lines: list[str] = []

    def echo(line: str) -> None:
        lines.append(line)
        if line.startswith("round 0"):
            shutil.rmtree(tmp_path / "full")

    simulate(parse_config({**raw_config, "trackers": trackers}), echo=echo)
    assert [line.split(" failed")[0] for line in lines if "tracker" in line] == [
        "warning: tracker shelf",
        "warning: tracker csv",
    ]


def test_a_run_that_had_none_may_go_on_with_one(raw_config: dict[str, Any]) -> None:
    result = simulate(parse_config(raw_config))
    assert not (result.directory / "trackers.json").exists()
    resume(result.directory, ["rounds=3", "trackers=[shelf]"])
    assert list(SHELVES.values()) == [[0, 1, 2, 3]]


def test_a_missing_library_is_one_line_before_the_first_round(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    with pytest.raises(UserError) as error:
        simulate(parse_config({**raw_config, "trackers": ["wandb"]}))
    assert str(error.value) == "trackers: wandb: wandb is not installed; pip install 'flora-clip[wandb]'"
    assert not any((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        (["csv", "csv"], "trackers: expected each once, got csv, csv"),
        (["tensorbord"], "trackers[0].name: 'tensorbord' is not known; did you mean 'tensorboard'?"),
        (
            [{"name": "wandb", "mode": "nearly"}],
            "trackers[0].mode: expected one of online, offline, shared, disabled, got 'nearly'",
        ),
        ([{"name": "mlflow", "uri": "x"}], "trackers[0].uri: unknown key"),
    ],
)
def test_mistakes_in_the_configuration(raw_config: dict[str, Any], trackers: Any, message: str) -> None:
    with pytest.raises(OptionError) as error:
        parse_config({**raw_config, "trackers": trackers})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("reason", ["exists already", "there is no folder"])
def test_a_csv_file_is_never_written_over(raw_config: dict[str, Any], tmp_path: Path, reason: str) -> None:
    file = tmp_path / ("mine.csv" if reason == "exists already" else "no/mine.csv")
    (tmp_path / "mine.csv").write_text("mine")
    with pytest.raises(UserError, match=f"trackers: csv: path: .*{reason}"):
        simulate(parse_config({**raw_config, "trackers": [{"name": "csv", "path": str(file)}]}))
    assert (tmp_path / "mine.csv").read_text() == "mine"
    assert not any((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("module", [files, services])
def test_their_libraries_are_imported_where_they_are_used(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    named = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    named |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in named} & {"wandb", "mlflow", "tensorboard", "torch", "trackio"}
