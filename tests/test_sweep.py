"""A sweep runs what is missing, goes on with what was stopped, and adds it all up in one table."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import several
import yaml
from helpers import comparable

from flora.config.schema import ExperimentConfig
from flora.core.errors import UserError
from flora.core.interrupts import Interrupted
from flora.simulate import main as simulate_main
from flora.sweep import __main__ as sweep
from flora.sweep import workers
from flora.sweep.__main__ import combinations, configurations, split_values
from flora.sweep.outcomes import Outcome, Point, columns, read_outcome
from flora.sweep.runs import Outcomes, run_all
from flora.sweep.table import (
    Ratios,
    Row,
    cells,
    collect,
    to_csv,
    to_curves,
    to_markdown,
    to_text,
    with_ratios,
)


@pytest.fixture
def config_file(tmp_path: Path, raw_config: dict[str, Any]) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**raw_config, "rounds": 2}))
    return str(path)


def run(config_file: str, folder: Path, *arguments: str) -> int:
    return sweep.main([config_file, *arguments, "--output", str(folder)])


def test_values_are_cut_at_commas_outside_of_brackets() -> None:
    assert split_values("1, 2,3") == ["1", "2", "3"]
    assert split_values("[q,v],{name: lora, rank: 2},x") == ["[q,v]", "{name: lora, rank: 2}", "x"]
    assert split_values("iid") == ["iid"]


def test_the_grid_and_its_names() -> None:
    grid = combinations(["a/x.yaml", "y.yaml"], ["seed=0,1", "partition=iid,{name: dirichlet, concentration: 0.1}"])
    assert len(grid) == 8
    assert grid[0].overrides == ["seed=0", "partition=iid"]
    names = [each.name for each in grid]
    assert names[0] == "x_seed=0_partition=iid"
    assert names[1] == "x_seed=0_partition=_name_dirichlet_concentration_0.1"
    assert len(set(names)) == 8
    assert not any(set(name) & set("/\\ {}:") for name in names)


def test_a_sweep_and_what_it_leaves(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweep"
    assert run(config_file, folder, "seed=0,1", "partition=iid,dirichlet") == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].split()[:2] == ["partition", "runs"]
    assert [line.split()[:2] for line in lines[1:3]] == [["iid", "2"], ["dirichlet", "2"]]
    rows = list(csv.DictReader((folder / "table.csv").open()))
    for row in rows:
        lasts = [
            json.loads((folder / f"tiny_seed={seed}_partition={row['partition']}" / "summary.json").read_text())
            for seed in (0, 1)
        ]
        accuracies = [each["last_accuracy"] for each in lasts]
        assert float(row["last_accuracy"]) == pytest.approx(sum(accuracies) / 2)
        assert float(row["last_accuracy_std"]) == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert (folder / "table.md").read_text().splitlines()[1].startswith("| --- | --- |")
    # What was run stays as it is; what is missing is added.
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")}
    assert run(config_file, folder, "seed=0,1,2", "partition=iid,dirichlet", "--fold", "off") == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(list(folder.rglob("summary.json"))) == 6
    # Each is the run that the same settings give alone.
    assert simulate_main([config_file, "seed=2", "partition=iid", f"output={tmp_path}", "name=alone"]) == 0
    ours, alone = comparable(folder / "tiny_seed=2_partition=iid"), comparable(tmp_path / "alone")
    assert ours["adapter.safetensors"] == alone["adapter.safetensors"]
    assert ours["rounds.jsonl"] == alone["rounds.jsonl"]


def test_a_stopped_sweep_goes_on(config_file: str, tmp_path: Path) -> None:
    grid = combinations([config_file], ["seed=0,1,2"])
    ours, whole = (configurations(grid, tmp_path / name, ["rounds=40"]) for name in ("sweep", "whole"))

    def stop() -> None:
        if (tmp_path / "sweep" / "tiny_seed=1" / "checkpoints").exists():  # in the middle of the second run
            raise KeyboardInterrupt

    outcomes: Outcomes = {}
    with pytest.raises(KeyboardInterrupt):
        run_all(ours, outcomes, jobs=1, check=stop)
    assert outcomes == {"tiny_seed=0": None}
    stopped = tmp_path / "sweep" / "tiny_seed=1"
    assert not (stopped / "summary.json").exists()
    assert "to go on: " in (stopped / "log.txt").read_text()
    assert len(list((tmp_path / "sweep").rglob("summary.json"))) == 1
    assert failures(ours) == {}
    assert failures(whole, jobs=2) == {}
    for each in grid:
        found, expected = (comparable(tmp_path / name / each.name) for name in ("sweep", "whole"))
        assert found["adapter.safetensors"] == expected["adapter.safetensors"]
        assert found["rounds.jsonl"] == expected["rounds.jsonl"]


def test_a_process_that_is_killed_is_one_line(config_file: str, tmp_path: Path) -> None:
    runs = configurations(combinations([config_file], ["seed=0,1"]), tmp_path / "sweep", ["rounds=120"])

    def kill() -> None:
        directory = tmp_path / "sweep" / "tiny_seed=0"
        if (directory / "checkpoints").exists() and not (directory / "killed").exists():
            (directory / "killed").touch()
            os.kill(int((directory / "lock").read_text()), signal.SIGKILL)

    assert failures(runs, check=kill) == {"tiny_seed=0": "its process was ended by SIGKILL"}
    assert (tmp_path / "sweep" / "tiny_seed=1" / "summary.json").exists()
    assert failures(runs) == {}


def test_the_end_of_the_sweep_is_the_end_of_its_runs(config_file: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import helpers, sys; from flora.sweep.__main__ import main; sys.exit(main())"]
    folder = tmp_path / "sweep"
    arguments = [config_file, "seed=0,1", "--jobs", "2", "--output", str(folder), "--set", "rounds=100000"]
    process = subprocess.Popen([*command, *arguments], cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True)
    locks = [folder / f"tiny_seed={seed}" / "lock" for seed in (0, 1)]
    deadline = time.time() + 120
    while not all((lock.parent / "checkpoints").exists() for lock in locks) and time.time() < deadline:
        time.sleep(0.1)
    process.kill()  # not even a signal that it could handle
    process.wait()
    while any(lock.exists() for lock in locks) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(lock.exists() for lock in locks)
    assert all("to go on: " in (lock.parent / "log.txt").read_text() for lock in locks)


def test_a_signal_stops_a_sweep(config_file: str, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    arguments = [config_file, "seed=0,1", "--jobs", "2", "--output", str(folder), "--set", "rounds=100000"]
    (process,) = several.start(1, arguments, tmp_path, program="flora.sweep.__main__")
    try:
        deadline = time.time() + 120
        while len(list(folder.glob("*/checkpoints"))) < 2 and time.time() < deadline:
            time.sleep(0.1)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        (end,) = several.ended([process], tmp_path)
    finally:
        process.kill()  # which ends its runs, too
    assert end.status == 130
    assert end.err.splitlines()[-1] == "stopped by SIGINT; the same command goes on"


def test_what_all_runs_lack_is_looked_for_once(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, missing = tmp_path / "sweep", tmp_path / "nowhere.safetensors"
    assert run(config_file, folder, "seed=0,1", "--set", f"backbone.weights={missing}") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:3] for line in lines] == [
        ["failed", f"tiny_seed={seed}", "backbone.weights"] for seed in (0, 1)
    ]
    assert not folder.exists()  # no run was begun


def test_runs_with_other_settings_are_not_in_the_table(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    assert run(config_file, folder, "seed=0") == 0
    assert run(config_file, folder, "seed=0,1", "--set", "local.learning_rate=0.5") == 2
    captured = capsys.readouterr()
    assert "what differs: local.learning_rate: 0.01 then, 0.5 now" in captured.err
    (row,) = csv.DictReader((folder / "table.csv").open())
    assert row["runs"] == "1"


def test_settings_that_may_change_do(config_file: str, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    grid = combinations([config_file], ["seed=0"])

    def stop() -> None:
        if list(folder.glob("*/checkpoints/round-*")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(configurations(grid, folder, ["rounds=40"]), {}, jobs=1, check=stop)
    changed = ["rounds=40", "clients.per_block=1", "checkpoints.keep=1", "cache.folder=null", "threads=1"]
    assert failures(configurations(grid, folder, changed)) == {}
    config = yaml.safe_load((folder / "tiny_seed=0" / "config.yaml").read_text())
    assert (config["clients"]["per_block"], config["checkpoints"]["keep"], config["threads"]) == (1, 1, 1)
    assert config["cache"]["folder"] is None


@pytest.mark.parametrize("file", ["rounds.jsonl", "summary.json"])
def test_a_damaged_run_is_one_line_and_the_others_are_tabulated(
    config_file: str, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    assert run(config_file, folder, "seed=0,1") == 0
    damaged = folder / "tiny_seed=0" / file
    text = damaged.read_text().replace("accuracy", "acuracy")
    for content in (text, text[: len(text) // 2], "[]"):
        damaged.write_text(content)
        if file == "summary.json" and content != text:
            continue  # without a summary the run is not finished, and goes on
        assert run(config_file, folder, "seed=0,1") == 2
        assert f"{damaged.parent}: summary.json or rounds.jsonl is damaged" in capsys.readouterr().err
        (row,) = csv.DictReader((folder / "table.csv").open())
        assert row["runs"] == "1"


def test_a_folder_in_which_nothing_was_begun_is_no_obstacle(config_file: str, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    for seed, names in ((0, []), (1, ["lock", "config.yaml.part"])):
        (folder / f"tiny_seed={seed}").mkdir(parents=True)
        for name in names:
            (folder / f"tiny_seed={seed}" / name).touch()
    assert run(config_file, folder, "seed=0,1") == 0
    (folder / "tiny_seed=2").mkdir()
    (folder / "tiny_seed=2" / "notes.txt").write_text("mine")
    assert run(config_file, folder, "seed=0,1,2") == 2
    assert (folder / "tiny_seed=2" / "notes.txt").read_text() == "mine"


def test_options_may_stand_anywhere(config_file: str, tmp_path: Path) -> None:
    assert sweep.main([config_file, "--output", str(tmp_path / "sweep"), "seed=0,1"]) == 0
    assert len(list(tmp_path.rglob("summary.json"))) == 2


def test_a_stopped_sweep_shows_what_is_finished(
    config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(configs: Any, outcomes: Outcomes, **options: Any) -> None:
        run_all(configs[:1], outcomes, **options)
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(sweep, "run_all", interrupted)
    assert run(config_file, tmp_path / "sweep", "seed=0,1") == 130
    captured = capsys.readouterr()
    assert "zero-shot" in captured.out
    assert captured.err.splitlines()[-1] == "stopped by SIGINT; the same command goes on"


def test_two_sweeps_in_one_folder_exclude_each_other(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    with sweep._locked(folder):
        assert run(config_file, folder, "seed=0") == 2
        error = capsys.readouterr().err
        assert error == f"{folder}: in use by another process ({os.getpid()}); wait for it, or stop it\n"
        assert [path.name for path in folder.iterdir()] == ["lock"]
        assert run(config_file, folder / "lock", "seed=0") == 2
        assert capsys.readouterr().err == f"--output: {folder / 'lock'} can't be made: File exists\n"
    assert not folder.exists()
    assert run(config_file, folder, "seed=0") == 0
    assert not (folder / "lock").exists()


def test_a_full_disk_does_not_hide_the_table(
    config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, text: str) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(sweep, "_write", full)
    assert run(config_file, tmp_path / "sweep", "seed=0,1") == 2
    captured = capsys.readouterr()
    assert "zero-shot" in captured.out
    assert captured.err.splitlines()[-1] == f"{tmp_path / 'sweep' / 'table.md'}: No space left on device"


def rows_of(**values: Sequence[str]) -> list[Row]:
    """A row for each combination, of a run of two rounds."""
    points = (Point(0, 0, 0.1), Point(1, 100, 0.5))
    return [
        Row(dict(zip(values, each, strict=True)), (replace(outcome(0.5), points=points),))
        for each in itertools.product(*values.values())
    ]


def test_a_picture_names_what_is_a_number() -> None:
    rows = rows_of(**{"adapter.rank": ["2", "4"], "partition": ["iid"], "speed.cut_prompts": ["true", "false"]})
    curves = to_curves(rows)
    assert {curve.panel for curve in curves} == {"iid"}
    assert [curve.line for curve in curves] == [
        f"rank {rank}, cut prompts {cut}" for rank in (2, 4) for cut in ("true", "false")
    ]


@pytest.mark.parametrize(
    ("sizes", "num_panels", "num_lines"), [((4, 3), 1, 12), ((12, 4, 3), 12, 12), ((24, 2), 24, 2), ((144,), 1, 144)]
)
def test_many_runs_are_not_put_into_one_panel(sizes: tuple[int, ...], num_panels: int, num_lines: int) -> None:
    values = {f"local.key{place}": [str(value) for value in range(size)] for place, size in enumerate(sizes)}
    curves = to_curves(rows_of(**values))
    assert len({(curve.panel, curve.line) for curve in curves}) == math.prod(sizes)
    assert (len({curve.panel for curve in curves}), len({curve.line for curve in curves})) == (num_panels, num_lines)


def test_an_unexpected_error_shows_where(config_file: str, tmp_path: Path) -> None:
    (problem,) = [problem for _, problem in workers.work_through(broken, [config_file], jobs=1, check=lambda: None)]
    assert problem is not None
    assert problem.splitlines()[0] == "Traceback (most recent call last):"
    assert problem.splitlines()[-1] == f"ZeroDivisionError: {config_file}"


def broken(task: str, hooks: object) -> None:
    raise ZeroDivisionError(task)


def failures(
    runs: Sequence[ExperimentConfig], *, jobs: int = 1, check: Callable[[], object] = lambda: None
) -> dict[str, str]:
    """Bring all runs to their end; what became of those that failed."""
    outcomes: Outcomes = {}
    run_all(runs, outcomes, jobs=jobs, check=check)
    assert outcomes.keys() == {run.name for run in runs}
    return {name: problem for name, problem in outcomes.items() if problem is not None}


def test_more_rounds_and_other_settings(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweep"
    assert run(config_file, folder, "seed=0") == 0
    content = yaml.safe_load(Path(config_file).read_text())
    Path(config_file).write_text(yaml.safe_dump({**content, "rounds": 3}))
    assert run(config_file, folder, "seed=0") == 0
    assert json.loads((folder / "tiny_seed=0" / "summary.json").read_text())["rounds"] == 3
    content["local"]["learning_rate"] = 0.5
    Path(config_file).write_text(yaml.safe_dump({**content, "rounds": 3}))
    assert run(config_file, folder, "seed=0") == 2
    error = capsys.readouterr().err
    assert "failed: tiny_seed=0: " in error
    assert "a run goes on as it began; what differs: local.learning_rate: 0.01 then, 0.5 now" in error
    shutil.move(folder, tmp_path / "moved")
    Path(config_file).write_text(
        yaml.safe_dump({**content, "rounds": 3, "local": {**content["local"], "learning_rate": 0.01}})
    )
    assert run(config_file, tmp_path / "moved", "seed=0") == 0


def test_a_run_that_fails_does_not_stop_the_others(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    assert run(config_file, folder, "adapter.alpha=1e308,4") == 2
    captured = capsys.readouterr()
    assert (
        "failed: tiny_adapter.alpha=1e308: round 0: loss not finite" in captured.err or "failed: tiny" in captured.err
    )
    assert [line.split()[:2] for line in captured.out.splitlines()[1:3]] == [["1e308", "0"], ["4", "1"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=0"], "expected a config file"),
        (["CONFIG", "seed="], "command line: expected key=value,value, got 'seed='"),
        (["CONFIG", "seed=1,1"], "two runs would both be called tiny_seed=1 ("),
        (["CONFIG", "seed=0,1", "seed=5"], "command line: seed is given twice; write seed=value,value"),
        (["CONFIG", "name=a,b"], "command line: name: each run of a sweep has its own"),
        (["CONFIG", "--set", "output=x"], "command line: output: each run of a sweep has its own"),
        (["CONFIG", "--reference", "tyny"], "--reference: no run is called 'tyny'; did you mean 'tiny'?"),
        (["CONFIG", "--jobs", "0"], "--jobs: expected a whole number of at least 1, got '0'"),
        (["CONFIG", "--jobs", "x"], "--jobs: expected a whole number of at least 1, got 'x'"),
        (["CONFIG", "--job", "1", "--what"], "unrecognized arguments: --what; see --help"),
        (["CONFIG", "local.epoch=1,2"], "local.epoch"),
        (["nothing.yaml"], "nothing.yaml: No such file or directory"),
    ],
)
def test_mistakes(
    config_file: str, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [config_file if argument == "CONFIG" else argument for argument in arguments]
    assert sweep.main([*given, "--output", str(tmp_path / "sweep")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("summary.json"))


# The table


def outcome(last: float, **changes: Any) -> Outcome:
    points = (Point(0, 0, 0.25), Point(1, 100, last / 2), Point(2, 200, last))
    figures: dict[str, Any] = dict.fromkeys(columns()) | {
        "zero_shot_accuracy": 0.25, "last_accuracy": last, "best_accuracy": 0.9, "bytes_to_arrive": 1000,
        "rounds_to_arrive": 3, "uplink_bytes_per_client_round": 50.0, "step_seconds": 0.01, "train_seconds": 2.0,
        "memory_bytes": 10**9, "trainable_parameters": 1234, "client_accuracy_mean": 0.5,
        "client_accuracy_worst_decile": 0.25, "simulated_seconds": 90.0, "seconds_to_arrive": 30.0,
        "aggregation_error_mean": 0.125, "downlink_bytes_per_client_round": 60.0, "round_seconds": 0.5,
    }  # fmt: skip
    return Outcome(changes.pop("points", points), {**figures, **changes})


def test_means_and_deviations_by_hand() -> None:
    row = Row({"method": "a|b"}, (outcome(0.5), outcome(0.7), outcome(0.6)))
    assert row.mean("last_accuracy") == pytest.approx(0.6)
    assert row.deviation("last_accuracy") == pytest.approx(0.1)
    assert row.mean("local_only_accuracy_mean") is None
    text = to_markdown([row, Row({"method": "c"}, ())])
    assert "| a\\|b | 3 | 25.0 ± 0.0 % | 60.0 ± 10.0 % |" in text
    assert text.splitlines()[-1] == "| c | 0 |" + " - |" * 17  # what no run has is no column
    named = dict(zip(*(line.split(" | ") for line in to_markdown([row]).splitlines()[:3:2]), strict=True))
    assert (named["worst tenth"], named["aggregation error"], named["s per round"]) == ("25.0 ± 0.0 %", "0.12", "0.5")
    assert named["simulated time"] == "1.5 min"
    assert "60.0 ± 10.0 %" in to_text([row])
    for width in (40, 41, 80):
        *lines, last = to_text([row], width).splitlines()
        assert max(map(len, lines)) <= width
        num_shown = len(re.split("  +", lines[0]))
        assert last == f"({len(cells([row])[0]) - num_shown} more columns are in table.md)" and num_shown > 1
    assert to_text([row], 10_000) == to_text([row])
    assert to_csv([row]).splitlines()[1].startswith("a|b,3,0.25,0.0,")


def test_what_a_run_needed_to_arrive(tmp_path: Path) -> None:
    summary = {
        "zero_shot_accuracy": 0.1, "last_accuracy": 0.8, "best_accuracy": 0.9, "local_only_accuracy_mean": 0.3,
        "uplink_bytes_per_client_round": 10, "train_seconds": 6.0, "peak_memory_bytes": 7, "trainable_parameters": 8,
        "memory_before_bytes": 3, "num_clients": 4, "rounds": 4, "total_downlink_bytes": 20,
        "client_accuracy_mean": 0.5, "client_accuracy_worst_decile": 0.25, "personal_accuracy_mean": 0.75,
        "simulated_seconds": 40.0,
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    accuracies = [0.1, None, 0.75, 0.76, 0.8]
    records = [
        {
            "round": round,
            "accuracy": accuracy,
            "uplink_bytes": 10 * (round > 0),
            "downlink_bytes": 5 * (round > 0),
            "num_steps": round,
            "num_clients": round and 2,
            "simulated_seconds": 10.0 if round else None,
        }
        for round, accuracy in enumerate(accuracies)
    ]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = read_outcome(tmp_path)
    figures = found.figures
    assert (figures["rounds_to_arrive"], figures["bytes_to_arrive"]) == (3, 45)  # 95 % of 80 % are 76 %
    assert figures["step_seconds"] == pytest.approx(0.6)
    assert figures["memory_bytes"] == 4
    assert (figures["simulated_seconds"], figures["seconds_to_arrive"]) == (40.0, 30.0)
    assert figures["model_privacy_gap"] is None and figures["new_accuracy"] is None
    assert (figures["client_accuracy_worst_decile"], figures["personal_accuracy_mean"]) == (0.25, 0.75)
    assert (figures["downlink_bytes_per_client_round"], figures["round_seconds"]) == (20 / 8, 1.5)
    assert found.points == (Point(0, 0, 0.1), Point(2, 30, 0.75), Point(3, 45, 0.76), Point(4, 60, 0.8))


def test_ratios_by_hand() -> None:
    full = outcome(0.8, step_seconds=0.1, uplink_bytes_per_client_round=5000.0, memory_bytes=4 * 10**9)
    slow = outcome(0.8, points=(Point(0, 0, 0.25), Point(4, 40, 0.75), Point(6, 50, 0.77)))  # 95 % of 80 % are 76 %
    never = outcome(0.7)
    rows = with_ratios(
        [
            Row({"method": "lora", "partition": "iid"}, (slow, slow)),
            Row({"method": "full", "partition": "iid"}, (full, full)),
            Row({"method": "lora", "partition": "dirichlet"}, (slow,)),
            Row({"method": "norm", "partition": "iid"}, (slow, never)),
            Row({"method": "head", "partition": "iid"}, ()),
        ],
        "full",
    )
    ratios = rows[0].ratios
    assert ratios is not None
    assert (ratios.step_time, ratios.memory, ratios.bytes_per_round) == pytest.approx((10, 4, 100))
    assert (ratios.rounds, ratios.bytes) == pytest.approx((2 / 6, 200 / 50))
    assert rows[1].ratios is not None and rows[1].ratios.step_time == rows[1].ratios.rounds == 1
    assert with_ratios([Row({"method": "full"}, (outcome(0.2),)), Row({"method": "x"}, (slow,))], "full")[1] == Row(
        {"method": "x"}, (slow,), Ratios(1.0, 1.0, 1.0, None, None)
    )  # the frozen model is as good as full fine-tuning: nobody needs a round
    assert rows[2].ratios is None  # there is no full fine-tuning with that partition
    assert rows[3].ratios is not None and rows[3].ratios.rounds is None
    assert rows[4].ratios is None
    head, _, first, *_ = to_markdown(rows).splitlines()
    named = dict(zip(head.split(" | "), first.split(" | "), strict=True))
    assert (named["x less step time"], named["x fewer rounds"]) == ("10", "0.333")
    assert (
        to_csv(rows)
        .splitlines()[0]
        .endswith("step_time_ratio,memory_ratio,bytes_per_round_ratio,rounds_ratio,bytes_ratio")
    )


def test_labels_are_what_varies(tmp_path: Path) -> None:
    runs: list[tuple[Path | None, str, dict[str, str]]] = [
        (None, "a/x.yaml", {"seed": "0", "rank": "2", "partition": "iid"})
    ]
    assert [row.labels for row in collect(runs)] == [{}]
    runs.append((None, "y.yaml", {"seed": "0", "rank": "4", "partition": "iid"}))
    assert [row.labels for row in collect(runs)] == [{"experiment": "x", "rank": "2"}, {"experiment": "y", "rank": "4"}]


def test_names_that_collide() -> None:
    with pytest.raises(UserError, match="two runs would both be called x_a=_q"):
        combinations(["x.yaml"], ["a=[q],{q}"])
