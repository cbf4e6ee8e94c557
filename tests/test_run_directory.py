"""The format of a run directory, which is a promise, and what happens when it can't be written."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
import safetensors
import safetensors.torch
import torch
import yaml

from flora.clip.adapters.files import ADAPTER_FORMAT
from flora.config.parse import config_to_dict, parse_config
from flora.core import tree
from flora.core.errors import UserError
from flora.core.records import RoundRecord
from flora.evaluation.metrics import FIGURES, METRICS, complete
from flora.runs.client_table import CLIENT_COLUMNS
from flora.runs.run_directory import RunDirectory
from flora.simulate import RunResult, simulate

FILES = {
    "config.yaml",
    "environment.json",
    "examples.csv",
    "partition.json",
    "prompts.json",
    "rounds.jsonl",
    "clients.csv",
    "confusion.csv",
    "reliability.csv",
    "adapter.safetensors",
    "summary.json",
    "log.txt",
    "checkpoints",
}
WRITTEN = FILES - {"summary.json", "checkpoints"}
RECORD = RoundRecord(0, complete({"accuracy": 0.5, "loss": 1.0, "eval_seconds": 0.1, "peak_memory_bytes": 1}))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def run(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A finished run: 3 rounds, half of 6 clients in each, evaluated every other round, 2 clients alone."""
    raw = {
        "name": "a run",
        "output": str(tmp_path_factory.mktemp("runs")),
        "rounds": 3,
        "backbone": {"model": tiny_model, "weights": "random"},
        "adapter": {"name": "lora", "rank": 2, "targets": ["q", "fc"], "towers": ["text", "vision"]},
        "data": {"name": "patterns"},
        "partition": {"name": "dirichlet", "concentration": 0.3},
        "prompts": {"class_names": {"thing 1": 'häm "ster", the'}},
        "clients": {"number": 6, "cohort": {"fraction": 0.5}},
        "local": {"batch_size": 8},
        "evaluation": {"every": 2, "num_local_only": 2},
    }
    return simulate(parse_config(raw))


def read_json(run: RunResult, name: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((run.directory / name).read_text(encoding="utf-8"), parse_constant=refuse)


def read_rounds(run: RunResult) -> list[dict[str, Any]]:
    text = (run.directory / "rounds.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


# What a run leaves behind


def test_the_files_of_a_run(run: RunResult) -> None:
    assert {path.name for path in run.directory.iterdir()} == FILES


def test_the_config_runs_again(run: RunResult) -> None:
    raw = yaml.safe_load((run.directory / "config.yaml").read_text(encoding="utf-8"))
    assert config_to_dict(parse_config(raw)) == raw
    assert raw["rounds"] == 3
    assert raw["local"]["optimizer"]["name"] == "adamw"


def test_the_environment(run: RunResult) -> None:
    environment = read_json(run, "environment.json")
    assert {"python", "platform", "packages", "device", "seed", "git_revision"} <= environment.keys()
    assert {"torch", "open_clip_torch", "numpy"} <= environment["packages"].keys()
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["seed"] == 0
    assert (
        environment["device"] == torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu (" in environment["device"]
    )


def test_the_partition_adds_up(run: RunResult) -> None:
    partition = read_json(run, "partition.json")
    assert partition["class_names"] == ["thing 0", 'häm "ster", the', "thing 2"]
    clients = partition["clients"]
    assert [client["client"] for client in clients] == list(range(6))
    for client in clients:
        assert client.keys() == {"client", "num_train", "num_held_out", "class_counts"}
        assert sum(client["class_counts"].values()) == client["num_train"] > 0
        assert all(client["class_counts"].values())
        assert client["class_counts"].keys() <= set(partition["class_names"])
    assert sum(client["num_train"] + client["num_held_out"] for client in clients) == 60


def test_the_rounds(run: RunResult) -> None:
    rounds = read_rounds(run)
    assert [record["round"] for record in rounds] == [0, 1, 2, 3]
    promised = {
        "round", "accuracy", "loss", "train_loss", "num_clients", "uplink_bytes", "downlink_bytes", "train_seconds",
        "eval_seconds", "peak_memory_bytes",
    }  # fmt: skip
    for record in rounds:
        assert promised <= record.keys()
        assert record.keys() == {"round", *METRICS, "rejected_clients", "cohort"}
        assert record["peak_memory_bytes"] > 1_000_000
        assert record["eval_seconds"] >= 0
    assert rounds == [json.loads(json.dumps(record.to_dict())) for record in run.records]


def test_round_0_is_zero_shot(run: RunResult) -> None:
    first = read_rounds(run)[0]
    assert first["train_loss"] is None
    assert (first["num_clients"], first["uplink_bytes"], first["downlink_bytes"], first["train_seconds"]) == (0,) * 4
    assert 0 <= first["accuracy"] <= 1


def test_rounds_without_evaluation_say_so(run: RunResult) -> None:
    rounds = read_rounds(run)
    assert [record["accuracy"] is None for record in rounds] == [False, True, False, False]
    for record in rounds[1:]:
        assert record["num_clients"] == 3
        assert record["train_loss"] > 0
        assert record["num_steps"] >= 3
    evaluated = rounds[-1]
    assert list(evaluated["class_accuracy"]) == ["thing 0", 'häm "ster", the', "thing 2"]
    mean = sum(evaluated["class_accuracy"].values()) / 3  # ten test images a class
    assert math.isclose(mean, evaluated["accuracy"])
    spread = [evaluated[f"client_accuracy_{name}"] for name in ("worst_decile", "mean", "best_decile")]
    assert spread == sorted(spread)


def test_bytes_are_the_length_of_what_would_be_sent(run: RunResult) -> None:
    length = len(safetensors.torch.save(run.adapter))
    for record in read_rounds(run)[1:]:
        assert record["uplink_bytes"] == record["downlink_bytes"] == record["num_clients"] * length
    parameters = sum(tensor.numel() for tensor in run.adapter.values())
    assert length > 4 * parameters


def test_the_adapter(run: RunResult) -> None:
    path = run.directory / "adapter.safetensors"
    tensors = safetensors.torch.load_file(path)
    assert tensors.keys() == run.adapter.keys()
    assert all(torch.equal(tensors[name], run.adapter[name]) for name in tensors)
    assert tensors["text.0.q.lora_A"].shape == (2, 32)
    assert tensors["vision.1.fc.lora_B"].shape == (128, 2)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["flora"])
    assert metadata.keys() == {"format", "sha256", "adapter", "backbone", "prompts"}
    assert metadata["format"] == ADAPTER_FORMAT
    assert metadata["sha256"] == tree.state_digest(run.adapter)
    raw = yaml.safe_load((run.directory / "config.yaml").read_text(encoding="utf-8"))
    assert all(metadata[key] == raw[key] for key in ("adapter", "backbone", "prompts"))


def test_the_clients(run: RunResult) -> None:
    with (run.directory / "clients.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    promised = {"client", "num_train", "num_held_out", "num_rounds", "accuracy", "loss", "test_accuracy",
                "local_only_accuracy", "local_only_held_out_accuracy"}  # fmt: skip
    assert list(rows[0]) == [name for name, _ in CLIENT_COLUMNS if name in promised]
    partition = read_json(run, "partition.json")["clients"]
    for row, client in zip(rows, partition, strict=True):
        assert [int(row[key]) for key in ("client", "num_train", "num_held_out")] == [
            client[key] for key in ("client", "num_train", "num_held_out")
        ]
        assert (row["accuracy"] == "") == (client["num_held_out"] == 0)
    known = [float(row["accuracy"]) for row in rows if row["accuracy"]]
    assert math.isclose(sum(known) / len(known), run.records[-1].client_accuracy_mean or 0, abs_tol=1e-5)
    assert [row["client"] for row in rows if row["local_only_accuracy"]] == ["0", "5"]


def test_the_summary(run: RunResult) -> None:
    summary, rounds = read_json(run, "summary.json"), read_rounds(run)
    promised = {
        "zero_shot_accuracy", "last_accuracy", "best_accuracy", "best_round", "total_uplink_bytes",
        "total_downlink_bytes", "wall_seconds", "peak_memory_bytes", "trainable_parameters",
    }  # fmt: skip
    assert promised <= summary.keys()
    assert summary == json.loads(json.dumps(dict(run.summary.figures)))
    assert summary.keys() == FIGURES.keys()
    assert summary["zero_shot_accuracy"] == rounds[0]["accuracy"]
    assert summary["last_accuracy"] == rounds[-1]["accuracy"]
    evaluated = {record["round"]: record["accuracy"] for record in rounds if record["accuracy"] is not None}
    assert summary["best_accuracy"] == max(evaluated.values()) == evaluated[summary["best_round"]]
    for direction in ("uplink", "downlink"):
        assert summary[f"total_{direction}_bytes"] == sum(record[f"{direction}_bytes"] for record in rounds)
    assert summary["trainable_parameters"] == sum(tensor.numel() for tensor in run.adapter.values())
    assert summary["wall_seconds"] > sum(record["train_seconds"] + record["eval_seconds"] for record in rounds)
    assert summary["num_local_only"] == 2


def test_the_log(run: RunResult) -> None:
    lines = (run.directory / "log.txt").read_text().splitlines()
    assert all(len(line.split(" ", 1)[0]) == len("2024-01-01T00:00:00Z") for line in lines)
    assert any(f"frozen parameters on {DEVICE}" in line for line in lines)
    assert "in 3 rounds; 6 clients, dirichlet (concentration 0.3)" in lines[-1]


# The folder itself


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    first = RunDirectory.create(str(tmp_path), "x", numbered=True)
    first.log("mine")
    names = [RunDirectory.create(str(tmp_path), "x", numbered=True).path.name for _ in range(3)]
    assert names == ["x-2", "x-3", "x-4"]
    with pytest.raises(UserError, match=r"name: .*/x exists already; choose another name or remove it"):
        RunDirectory.create(str(tmp_path), "x", numbered=False)
    assert (first.path / "log.txt").read_text().endswith("mine\n")


def test_missing_parents_are_made(tmp_path: Path) -> None:
    assert RunDirectory.create(str(tmp_path / "a" / "b"), "x", numbered=False).path.is_dir()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/below"):
        with pytest.raises(UserError, match="output: "):
            RunDirectory.create(str(tmp_path / output), "x", numbered=True)
    with pytest.raises(UserError, match=r"name: .* exists already"):
        RunDirectory.create(str(tmp_path), "file", numbered=False)
    assert RunDirectory.create(str(tmp_path), "file", numbered=True).path.name == "file-2"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"output: .*/x can't be made: Read-only file system"):
        RunDirectory.create(str(tmp_path), "x", numbered=True)


def test_a_run_that_recorded_nothing_leaves_nothing(tmp_path: Path) -> None:
    directory = RunDirectory.create(str(tmp_path), "x", numbered=False)
    directory.log("started")
    directory.remove_if_nothing_ran()
    assert not directory.path.exists()
    directory = RunDirectory.create(str(tmp_path), "x", numbered=False)
    directory.append_round(RECORD)
    directory.remove_if_nothing_ran()
    directory.close()
    assert {path.name for path in directory.path.iterdir()} == {"rounds.jsonl"}


@pytest.mark.parametrize("field", ["loss", "train_loss", "accuracy"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_result_that_is_no_number_is_an_error(tmp_path: Path, field: str, value: float) -> None:
    directory = RunDirectory.create(str(tmp_path), "x", numbered=False)
    record = RoundRecord(3, {**RECORD.metrics, field: value})
    with pytest.raises(UserError, match=f"^round 3: {field} not finite: "):
        directory.append_round(record)
    assert not (directory.path / "rounds.jsonl").exists()


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    directory = RunDirectory.create(str(tmp_path), "x", numbered=False)
    name = os.fsdecode(b"class \xff")
    directory.log(f"left out: {name}\nsecond line")
    directory.write_start({}, {"class_names": [name]})
    assert json.loads((directory.path / "partition.json").read_text())["class_names"] == [name]
    assert len((directory.path / "log.txt").read_text().splitlines()) == 1


def test_records_of_a_version_that_named_no_cohort_are_read(tmp_path: Path) -> None:
    directory = RunDirectory.create(str(tmp_path), "x", numbered=False)
    fields = dataclasses.replace(RECORD, cohort=(3, 5)).to_dict()
    lines = [json.dumps(fields), json.dumps({key: value for key, value in fields.items() if key != "cohort"})]
    (directory.path / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    assert [record.cohort for record in directory.rewind(10**6)] == [(3, 5), None]


# A disk that is full


def write_everything(directory: RunDirectory, name: str) -> None:
    """Write the file called `name`."""
    config = parse_config({"data": "patterns", "partition": "iid"})
    if name == "config.yaml":
        directory.write_config(config)
    elif name in ("environment.json", "partition.json"):
        directory.write_start({"seed": 0}, {"class_names": ["a"]})
    elif name == "prompts.json":
        directory.write_prompts({"classes": []})
    elif name == "examples.csv":
        directory.write_examples(["image"], [["a.jpg"]])
    elif name == "rounds.jsonl":
        directory.append_round(RECORD)
    elif name == "clients.csv":
        directory.write_clients({"client": [0], "accuracy": [""]})
    elif name in ("confusion.csv", "reliability.csv"):
        directory.write_table(name, ["label"], [["a"]])
    elif name == "adapter.safetensors":
        directory.write_adapter({"a": torch.zeros(3)}, config)
    else:
        directory.log("line")


@pytest.mark.parametrize(
    ("name", "step"),
    [(name, "open") for name in sorted(WRITTEN)]
    + [(name, "replace") for name in sorted(WRITTEN - {"log.txt", "rounds.jsonl"})],
)
def test_a_full_disk_is_one_line_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: str
) -> None:
    directory = RunDirectory.create(str(tmp_path), "x", numbered=False)
    real_open, real_replace = Path.open, os.replace

    def full(path: Any) -> None:
        if Path(path).name in (name, f"{name}.part"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def fake_open(path: Path, *args: Any, **kwargs: Any) -> Any:
        full(path)
        return real_open(path, *args, **kwargs)

    def fake_replace(source: Any, target: Any) -> None:
        full(source)
        real_replace(source, target)

    with monkeypatch.context() as patch:
        if step == "open":
            patch.setattr(Path, "open", fake_open)
        else:
            patch.setattr(os, "replace", fake_replace)
        with pytest.raises(UserError) as caught:
            write_everything(directory, name)
    assert str(caught.value) == f"{directory.path / name}: can't be written: No space left on device"
    assert not (directory.path / name).exists()
    assert not list(directory.path.glob("*.part"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("name", ["rounds.jsonl", "log.txt"])
def test_a_disk_that_fills_up_under_a_growing_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory.create(str(tmp_path), "x", numbered=False)
    monkeypatch.setattr("flora.runs.run_directory.refuse_irregular", lambda path: None)  # it would refuse the device
    (directory.path / name).symlink_to("/dev/full")
    with pytest.raises(UserError, match=rf"/x/{name}: can't be written: No space left on device"):
        write_everything(directory, name)


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory.create(str(tmp_path), "x", numbered=False)
    directory.append_round(RECORD)
    before = (directory.path / "rounds.jsonl").read_bytes()
    real_open = Path.open

    class HalfFull:
        """A file that takes ten bytes and no more."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> HalfFull:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> NoReturn:
            self.file.write(content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", lambda path, *args: HalfFull(real_open(path, *args)))
    with pytest.raises(UserError, match="No space left on device"):
        directory.append_round(dataclasses.replace(RECORD, round=1))
    monkeypatch.undo()
    assert (directory.path / "rounds.jsonl").read_bytes() == before
