"""Several processes of one run: the same bytes as one, and however one of them ends, all end, and nothing is lost."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import several
import torch
import yaml
from helpers import comparable
from hypothesis import given
from hypothesis import strategies as st
from several import Ended, Mischief

from flora.benchmark.__main__ import main as benchmark
from flora.core.errors import UserError
from flora.core.processes import Message, Processes
from flora.engine.dealing import deal

ROOT = Path(__file__).parents[1]
MUCH = {
    "threads": 1,
    "rounds": 3,
    "adapter": {"name": "lora", "rank": 2, "dropout": 0.1, "towers": ["text", "vision"]},
    "clients": {"number": 7, "cohort": {"name": "uniform", "number": 6}, "per_block": 2, "holdout_fraction": 0.2},
    "local": {"learning_rate": 0.05, "batch_size": 4, "optimizer": "sgd", "correction": "scaffold"},
    "personal": "ditto",
    "network": {"name": "drawn", "dropout": 0.2},
    "evaluation": {"clients_every": 1, "num_local_only": 2, "centralized": True, "predictions": 2, "batch_size": 8},
}
LABELS = {
    "threads": 1,
    "rounds": 2,
    "clients": {"number": 5, "per_block": 2, "labelled_fraction": 0.5},
    "local": {"batch_size": 4, "self_training": {"threshold": 0.0}},
    "communication": {"upload": "uniform"},
    "personal": "fine_tuning",
    "evaluation": {"clients_every": 1},
    "server": {"schedule": {"name": "buffered", "buffer": 3}},
    "network": "drawn",
    "cache": {"views": 2, "folder": None},
}

SECURE = {
    "threads": 1,
    "clients": {"number": 7, "cohort": {"name": "uniform", "number": 5}, "per_block": 2},
    "server": {"secure_sum": {"name": "pairwise_masks", "threshold": 0.51, "dropout": [0.1, 0.1, 0.2, 0.1]}},
}
PRIVATE = {
    "threads": 1,
    "rounds": 2,
    "clients": {"number": 5, "per_block": 2, "cohort": {"name": "poisson", "fraction": 0.7}},
    "local": {"batch_size": 4},
    "privacy": {"name": "central", "clip_norm": {"name": "adaptive"}, "noise_multiplier": 2.0, "accountant": "rdp"},
}


@pytest.fixture
def config(tmp_path: Path, raw_config: dict[str, Any]) -> str:
    return write(tmp_path, raw_config, MUCH)


def write(folder: Path, raw: dict[str, Any], changes: dict[str, Any]) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**raw, **changes, "name": "run", "output": str(folder / "runs")}))
    return str(path)


def run(number: int, folder: Path, arguments: Sequence[str], mischief: Mischief | None = None) -> list[Ended]:
    folder.mkdir(exist_ok=True)
    return several.run(number, arguments, folder, mischief, stem_batch=8)


def whole(folder: Path, config: str, number: int = 1, mischief: Mischief | None = None) -> dict[str, Any]:
    """What a run by `number` processes leaves behind."""
    ends = run(number, folder, [config, f"output={folder}"], mischief)
    assert [each.status for each in ends] == [0] * number, ends
    assert "written to" in ends[0].out
    assert not any(each.out or each.err for each in ends[1:])
    return left_behind(folder / "run")


def left_behind(directory: Path) -> dict[str, Any]:
    """All that is promised to be the same, but for where the run was."""
    files = comparable(directory)
    for name, content in files.items():
        if name.endswith("manifest.json"):
            content["config"].pop("output")
    del files["config.yaml"]
    return files


@pytest.mark.parametrize("changes", [MUCH, LABELS], ids=["much", "labels"])
def test_any_number_of_processes_leaves_the_same_bytes(
    changes: dict[str, Any], raw_config: dict[str, Any], tmp_path: Path
) -> None:
    config = write(tmp_path, raw_config, changes)
    one = whole(tmp_path / "one", config)
    assert len(one) > 8
    steps = {json.loads(line)["num_steps"] for line in (tmp_path / "one/run/rounds.jsonl").read_text().splitlines()[1:]}
    assert len(steps) > 1  # rounds, and so blocks, differ
    for number in (2, 3):
        assert whole(tmp_path / f"of {number}", config, number) == one
    said = json.loads((tmp_path / "of 3/run/environment.json").read_text())
    assert said["num_processes"] == 3


def test_trackers_and_the_page_on_its_way_are_told_by_the_first_process_alone(config: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    trackers = f'trackers=["csv", "tensorboard", {{"name": "mlflow", "tracking_uri": "{uri}"}}]'
    ends = run(2, tmp_path / "two", [config, trackers, "--live"])
    assert [each.status for each in ends] == [0, 0], ends
    assert not ends[1].out and not ends[1].err and "warning" not in ends[0].err
    directory = tmp_path / "runs" / "run"
    rounds = [0, 1, 2, 3]
    with (directory / "metrics.csv").open(newline="") as file:
        assert [int(row["round"]) for row in csv.DictReader(file)] == rounds
    assert len(list((directory / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("accuracy")] == rounds
    client = MlflowClient(tracking_uri=uri)
    (tracked,) = client.search_runs([client.get_experiment_by_name("flora").experiment_id])
    assert [point.step for point in client.get_metric_history(tracked.info.run_id, "accuracy")] == rounds
    assert tracked.info.status == "FINISHED"
    assert "On its way" not in (directory / "report.html").read_text()


@pytest.mark.stress
def test_processes_add_up_under_the_same_masks(raw_config: dict[str, Any], tmp_path: Path) -> None:
    config = write(tmp_path, raw_config, SECURE)
    assert whole(tmp_path / "of 2", config, 2) == whole(tmp_path / "one", config)


def test_private_rounds_are_the_same_by_two(raw_config: dict[str, Any], tmp_path: Path) -> None:
    config = write(tmp_path, raw_config, PRIVATE)
    assert whole(tmp_path / "two", config, 2) == whole(tmp_path / "one", config)


def test_memory_that_runs_out_in_one_process_lowers_the_blocks_of_all(config: str, tmp_path: Path) -> None:
    config_of_4 = tmp_path / "mine.yaml"
    config_of_4.write_text(config_of_4.read_text().replace("per_block: 2", "per_block: 4"))
    one = whole(tmp_path / "one", config, 1, Mischief("memory", rank=0))
    two = whole(tmp_path / "two", config, 2, Mischief("memory", rank=0))
    assert one == two
    log = (tmp_path / "two/run/log.txt").read_text()
    assert log.count("out of memory: from now on 2 clients in one step") == 1


def test_memory_that_one_client_does_not_fit_into_is_one_line(config: str, tmp_path: Path) -> None:
    ends = run(2, tmp_path / "two", [config, "clients.per_block=1"], Mischief("memory of one"))
    assert [each.status for each in ends] == [2, 2]
    assert "out of memory with one client in a step" in ends[0].err.splitlines()[-1]
    assert not ends[1].err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_and_any_number_goes_on(rank: int, config: str, tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole", config)
    started = time.monotonic()
    ends = run(2, tmp_path / "killed", [config], Mischief("kill", rank, block=5))
    assert time.monotonic() - started < 60
    assert ends[rank].status == -signal.SIGKILL
    other = ends[1 - rank]
    assert other.status == 2
    last = other.err.splitlines()[-1]
    assert "another process of this run has ended, or can't be reached any more" in last
    directory = tmp_path / "runs" / "run"
    assert (directory / "rounds.jsonl").read_text().count("\n") >= 2
    for number in (1, 3):
        shutil.copytree(directory, tmp_path / f"by {number}" / "run")
        ends = run(number, tmp_path / f"resumed by {number}", ["--resume", str(tmp_path / f"by {number}" / "run")])
        assert [each.status for each in ends] == [0] * number, ends
        assert left_behind(tmp_path / f"by {number}" / "run") == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupted_process_stops_all(rank: int, config: str, tmp_path: Path) -> None:
    ends = run(2, tmp_path / "stopped", [config], Mischief("interrupt", rank, block=5))
    assert [each.status for each in ends] == [130, 130], ends
    assert ends[0].err.splitlines()[-1] == "stopped by SIGINT"
    assert ends[1].err == ""
    rounds = (tmp_path / "runs/run/rounds.jsonl").read_text().count("\n")
    ends = run(2, tmp_path / "resumed", ["--resume", str(tmp_path / "runs" / "run")])
    assert [each.status for each in ends] == [0, 0], ends
    assert f"going on after round {rounds - 1}" in ends[0].err
    assert left_behind(tmp_path / "runs" / "run") == whole(tmp_path / "whole", config)


def test_an_error_in_one_process_ends_all_in_one_line(config: str, tmp_path: Path) -> None:
    ends = run(2, tmp_path / "two", [config], Mischief("error"))
    assert [each.status for each in ends] == [2, 1]
    last = ends[0].err.splitlines()[-1]
    assert last == f"{config}: process 1: ValueError: a mistake in the program"
    assert "Traceback" in ends[1].err  # where it was made


def test_what_the_user_can_mend_is_said_once(config: str, tmp_path: Path) -> None:
    ends = run(2, tmp_path / "two", [config, "local.learning_rat=1"])
    assert [each.status for each in ends] == [2, 2]
    assert ends[0].err.count("\n") == 1 and "learning_rat" in ends[0].err
    assert ends[1].err == ends[1].out == ""


def test_processes_that_come_to_different_adapters_say_so(config: str, tmp_path: Path) -> None:
    ends = run(2, tmp_path / "two", [config], Mischief("other numbers"))
    assert [each.status for each in ends] == [2, 2]
    assert "round 1: processes 0 and 1 have come to different adapters" in ends[0].err.splitlines()[-1]


def test_torchrun_starts_them(config: str, tmp_path: Path) -> None:
    done = torchrun(tmp_path, "flora.simulate", config)
    assert done.status == 0, done.err
    assert done.out.count("written to") == 1
    assert left_behind(tmp_path / "runs" / "run") == whole(tmp_path / "whole", config)


def test_a_sweeps_runs_are_dealt_out_among_processes(config: str, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    arguments = [config, "local.learning_rate=0.01,0.02,0.03,0.04", "rounds=1", "--output", str(folder)]
    done = torchrun(tmp_path, "flora.sweep", *arguments)
    assert done.status == 0, done.err
    assert len(list(folder.glob("*/summary.json"))) == 4
    assert done.err.count("2 runs train together: ") == 2  # in each process
    assert done.out.count("written: ") == 1 and done.err.count(" s of training") == 4
    assert len(list(csv.DictReader((folder / "table.csv").open()))) == 4
    processes = {json.loads(path.read_text())["runs_in_one_step"] for path in folder.glob("*/environment.json")}
    assert processes == {2}
    assert not (folder / "lock").exists()


def torchrun(folder: Path, program: str, *arguments: str) -> Ended:
    """Have torchrun start two processes of a program, which know the tests' data set."""
    own = folder / "own_patterns.py"
    own.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport helpers\n")
    command = ["--standalone", "--nproc-per-node=2", "-m", program, *arguments, "--import", str(own)]
    (end,) = several.ended(several.start(1, command, folder, program="torch.distributed.run"), folder)
    return end


def test_a_program_that_is_one_process_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert benchmark([]) == 2
    assert capsys.readouterr().err.startswith("flora.benchmark is one process and not to be started by torchrun")
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(UserError, match="expected whole numbers"):
        Processes.of_environment()


# What they tell each other


def test_a_process_that_dies_before_it_has_joined_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr("flora.core.processes.LONGEST_START", timedelta(seconds=1))
    with pytest.raises(UserError, match=r"the processes have not found each other .*1/2 clients joined"):
        Processes(rank=0, size=2).__enter__()


def test_a_message_arrives_as_it_was_sent() -> None:
    tensors = {
        "z": torch.randn(2, 3, dtype=torch.float64).T,
        "a": torch.tensor([True, False, True]),
        "half": torch.randn(5).bfloat16(),
        "none": torch.empty(0, 4),
        "number": torch.tensor(3),
    }
    fields = {"loss": [0.1, float("nan"), float("inf")], "name": "größe"}
    arrived = Message.unpack(Message(fields, tensors).pack())
    assert list(arrived.tensors) == list(tensors)
    assert all(torch.equal(arrived.tensors[name], tensor) for name, tensor in tensors.items())
    assert all(arrived.tensors[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert repr(arrived.fields) == repr(fields)


@given(costs=st.lists(st.integers(0, 50), max_size=12), size=st.integers(1, 5))
def test_no_process_has_more_to_do_than_it_must(costs: list[int], size: int) -> None:
    owners = deal(costs, size)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
    assert sum(loads) == sum(costs)
    # Whoever has the most had the least when it got its last part: the mean, and what that part costs.
    assert max(loads) <= sum(costs) / size + max(costs, default=0)


@pytest.mark.stress
def test_killed_at_random_moments_by_twos_and_resumed_by_any_number(config: str, tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole", config)  # where processes are forked from has imported everything by then
    started = time.monotonic()
    assert whole(tmp_path / "by 2", config, 2) == expected
    seconds, choice, all_kills = time.monotonic() - started, random.Random(5), 0
    for attempt in range(8):
        folder, kills = tmp_path / f"attempt {attempt}", 0
        arguments, directory = [config, f"output={folder}"], folder / "run"
        while True:
            folder.mkdir(exist_ok=True)
            number = 2 if not kills else choice.choice([1, 2, 3])
            processes = several.start(number, arguments, folder, stem_batch=8)
            time.sleep(choice.uniform(0.0, seconds))
            victim = choice.choice(processes)
            if victim.is_alive() and kills < 6:
                assert victim.pid is not None
                os.kill(victim.pid, signal.SIGKILL)
                kills += 1
            ends = several.ended(processes, folder)
            if (directory / "summary.json").exists():  # whoever is killed now has nothing left to do
                break
            assert all(each.status for each in ends), ends  # none of them waits, none thinks that all is well
            if (directory / "config.yaml").exists():
                arguments = ["--resume", str(directory)]
            else:
                shutil.rmtree(directory, ignore_errors=True)
        assert left_behind(directory) == expected, attempt
        all_kills += kills
    assert all_kills >= 8
