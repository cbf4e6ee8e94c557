"""A run that stopped, whenever and however, goes on as if nothing had happened: the same bytes come out."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killable
import numpy as np
import pytest
import yaml
from helpers import comparable
from PIL import Image

from flora.config.parse import parse_config
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.states import ClientUpdate
from flora.runs.run_directory import RunDirectory
from flora.simulate import main, resume, simulate

CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything that is remembered": {
        "adapter": {"name": "lora", "rank": 2, "dropout": 0.1, "towers": ["text", "vision"]},
        "clients": {"number": 5, "cohort": {"name": "uniform", "number": 3}, "per_block": 2},
        "local": {
            "optimizer_state": "kept",
            "batch_size": 4,
            "schedule": "cosine",
            "augmentation": "crop_flip",
            "objective": "contrastive",
        },
        "evaluation": {"every": 2, "num_local_only": 2},
    },
    "a checkpoint every other round": {"checkpoints": {"every": 2, "keep": 1}},
    "a checkpoint only when it ends": {"checkpoints": {"every": None, "keep": 1}},
}


class Stop(Exception):
    """What a hook ends a run with."""


def stopping(at: int) -> Hooks:
    """Hooks that end a run before block number `at`, counted from 0."""
    blocks = 0

    def count(round: int, clients: tuple[int, ...]) -> None:
        nonlocal blocks
        blocks += 1
        if blocks > at:
            raise Stop

    return Hooks(before_block=count)


@pytest.fixture
def raw(raw_config: dict[str, Any]) -> dict[str, Any]:
    return {**raw_config, "rounds": 4}


def directory_of(raw: dict[str, Any]) -> Path:
    return Path(raw["output"]) / raw["name"]


def uninterrupted(raw: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """What a run leaves behind that nothing happened to."""
    result = simulate(parse_config({**raw, "output": str(tmp_path / "whole")}))
    files = comparable(result.directory)
    return {name: _elsewhere(content, raw) for name, content in files.items()}


def _elsewhere(content: Any, raw: dict[str, Any]) -> Any:
    """The content as it would be in the output folder of `raw`."""
    if isinstance(content, dict) and "config" in content:
        return {**content, "config": {**content["config"], "output": raw["output"]}}
    if isinstance(content, bytes) and b"\noutput: " in content:
        return yaml.safe_dump(
            {**yaml.safe_load(content), "output": raw["output"]}, sort_keys=False, allow_unicode=True
        ).encode()
    return content


def assert_same(directory: Path, expected: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    found = comparable(directory)
    assert found.keys() == expected.keys()
    for name, content in found.items():
        if name not in but:
            assert content == expected[name], name


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_stopped_at_any_block(raw: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    raw.update(changes)
    expected = uninterrupted(raw, tmp_path)
    places = range(0, 20, 3) if changes.get("evaluation") else range(5)
    for place in places:
        shutil.rmtree(directory_of(raw), ignore_errors=True)
        try:
            simulate(parse_config(raw), hooks=stopping(place))
        except Stop:
            resume(directory_of(raw))
        if "checkpoints" in changes:
            assert {path.name for path in (directory_of(raw) / "checkpoints").iterdir()} == {"round-0004"}
        assert_same(directory_of(raw), expected)


def test_stopped_again_and_again(raw: dict[str, Any], tmp_path: Path) -> None:
    expected = uninterrupted(raw, tmp_path)
    with pytest.raises(Stop):
        simulate(parse_config(raw), hooks=stopping(1))
    for _ in range(2):
        with pytest.raises(Stop):
            resume(directory_of(raw), hooks=stopping(1))
    resume(directory_of(raw))
    assert_same(directory_of(raw), expected)
    log = (directory_of(raw) / "log.txt").read_text()
    assert [f"going on after round {round}" in log for round in (0, 1, 2, 3, 4)] == [False, True, True, True, False]
    assert f"to go on: {sys.executable} -m flora.simulate --resume {directory_of(raw)}" in log


# Killed


def run_until_done(raw: dict[str, Any], kill: Callable[[Any], None], kill_at_write: int | None = None) -> int:
    """Start the run, let `kill` do what it wants, and start it again until it is finished; how often it was killed."""
    process = killable.start(raw, directory_of(raw), kill_at_write)
    kill(process)
    process.join(60)
    killed = int(process.exitcode != 0)
    while process.exitcode != 0:
        assert process.exitcode == -signal.SIGKILL
        process = killable.start(raw, directory_of(raw))
        process.join(60)
    return killed


@pytest.mark.parametrize("number", [4, pytest.param(50, marks=pytest.mark.stress)])
def test_killed_at_random_moments(raw: dict[str, Any], tmp_path: Path, number: int) -> None:
    raw.update(CHANGES["everything that is remembered"])
    expected, chance, killed = uninterrupted(raw, tmp_path), random.Random(number), 0
    for _ in range(2):  # the first one also starts the server that the others are forked from
        shutil.rmtree(directory_of(raw), ignore_errors=True)
        started = time.perf_counter()
        run_until_done(raw, lambda process: None)
        seconds = time.perf_counter() - started
    assert_same(directory_of(raw), expected)
    for _ in range(number):
        shutil.rmtree(directory_of(raw))
        delay = chance.uniform(0, seconds)

        def kill(process: Any, delay: float = delay) -> None:
            time.sleep(delay)
            process.kill()

        killed += run_until_done(raw, kill)
        assert_same(directory_of(raw), expected)
    assert killed >= number / 2


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.stress)])
def test_killed_before_any_write(raw: dict[str, Any], tmp_path: Path, stride: int) -> None:
    """Also between the files of a checkpoint, and between its last file and its new name."""
    expected = uninterrupted(raw, tmp_path)
    run_until_done(raw, lambda process: None)
    num_writes = int((directory_of(raw).parent / "writes").read_text())
    assert num_writes > 40
    for place in range(1, num_writes + 1, stride):
        shutil.rmtree(directory_of(raw), ignore_errors=True)
        assert run_until_done(raw, lambda process: None, kill_at_write=place) == 1
        assert_same(directory_of(raw), expected)


# Signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_run_that_then_goes_on(
    raw: dict[str, Any], tmp_path: Path, number: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = uninterrupted({**raw, "rounds": 3}, tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**raw, "rounds": 3}))
    handler = signal.getsignal(number)

    # A signal that comes during the first block of round 2; the command line's own hook comes before this one.
    def before_block(round: int, clients: tuple[int, ...]) -> None:
        if round == 2:
            os.kill(os.getpid(), number)

    assert main([str(path), "name=test"], hooks=Hooks(before_block=before_block)) == status
    error = capsys.readouterr().err
    assert "stopping after this block of clients; once more to leave at once" in error
    assert f"to go on: {sys.executable} -m flora.simulate --resume {directory_of(raw)}" in error
    assert error.splitlines()[-1] == f"stopped by {signal.Signals(number).name}"
    assert signal.getsignal(number) == handler
    assert main(["--resume", str(directory_of(raw))]) == 0
    assert_same(directory_of(raw), expected)


def test_two_signals_leave_at_once(raw: dict[str, Any], tmp_path: Path) -> None:
    process = killable.terminate_twice(raw, tmp_path / "errors")
    process.join(50)
    assert process.exitcode == 143
    assert "Traceback" not in (tmp_path / "errors").read_text()
    result = resume(directory_of(raw))
    assert result.summary.rounds == 4
    assert "going on after round 2" in (directory_of(raw) / "log.txt").read_text()


# What is refused, and what is mended


def stopped(raw: dict[str, Any], at: int = 2) -> Path:
    """A run that was stopped before round `at + 1`."""
    with pytest.raises(Stop):
        simulate(parse_config(raw), hooks=stopping(at))
    return directory_of(raw)


def test_a_finished_run_says_so(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    directory = simulate(parse_config(raw)).directory
    before = comparable(directory)
    assert main(["--resume", str(directory)]) == 2
    expected = f"{directory}: this run is finished, after 4 rounds; for more of them: rounds=NUMBER"
    assert expected in capsys.readouterr().err
    assert comparable(directory) == before


def test_more_rounds(raw: dict[str, Any], tmp_path: Path) -> None:
    directory = simulate(
        parse_config({**raw, "rounds": 2, "clients": {"number": 4, "holdout_fraction": 0.0}})
    ).directory
    raw["clients"] = {"number": 4, "holdout_fraction": 0.0}
    assert resume(directory, ["rounds=4"]).summary.rounds == 4
    assert_same(directory, uninterrupted(raw, tmp_path))
    with pytest.raises(UserError, match="rounds: 4 then, 3 now; they can only become more"):
        resume(directory, ["rounds=3"])


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("local.learning_rate=0.5", "local.learning_rate: 0.01 then, 0.5 now"),
        (
            "partition=iid",
            "partition.concentration: 0.5 then, null now; partition.minimum_examples: 3 then, null now; ",
        ),
        ("seed=3", "seed: 0 then, 3 now"),
        ("evaluation.num_local_only=1", "evaluation.num_local_only: 0 then, 1 now"),
    ],
)
def test_other_settings_are_refused_with_the_difference(raw: dict[str, Any], override: str, difference: str) -> None:
    directory = stopped(raw)
    with pytest.raises(UserError) as caught:
        resume(directory, [override])
    assert str(caught.value).startswith(f"{directory}: a run goes on as it began; what differs: {difference}")
    config = directory / "config.yaml"
    key, _, value = override.partition("=")
    content = yaml.safe_load(config.read_text())
    *parents, last = key.split(".")
    inner = content
    for parent in parents:
        inner = inner[parent]
    inner[last] = yaml.safe_load(value)
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="a run goes on as it began; what differs: "):
        resume(directory)


def test_more_rounds_under_a_schedule_that_depends_on_them(raw: dict[str, Any]) -> None:
    raw["local"]["schedule"] = "cosine"
    directory = stopped(raw)
    with pytest.raises(UserError, match=r"rounds: they can't become more, because .* local\.schedule"):
        resume(directory, ["rounds=9"])


def test_settings_that_change_no_result(raw: dict[str, Any], tmp_path: Path) -> None:
    expected = uninterrupted(raw, tmp_path)
    overrides = ["clients.per_block=4", "threads=1", "cache.folder=null", "checkpoints.keep=1"]
    directory = stopped(raw)
    resume(directory, overrides)
    found = comparable(directory)
    assert found["rounds.jsonl"] == expected["rounds.jsonl"]
    assert found["adapter.safetensors"] == expected["adapter.safetensors"]
    assert "checkpoints/round-0003/manifest.json" not in found


def test_mistakes_on_the_command_line(raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(tmp_path / "nothing")], "nothing: there is no such run directory"),
        ([str(tmp_path / "empty")], "empty: not a run directory: it has none of lock, log.txt, "),
        ([], "expected one run directory, got 0"),
        ([str(stopped(raw)), "local.epoch=3"], "local.epoch"),
    ):
        assert main(["--resume", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_newest_checkpoint_is_damaged(raw: dict[str, Any], tmp_path: Path) -> None:
    expected, directory = uninterrupted(raw, tmp_path), stopped(raw, at=3)
    file = directory / "checkpoints" / "round-0003" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    lines: list[str] = []
    resume(directory, echo=lines.append)
    assert (
        f"warning: {file}: its contents are not those that were written (SHA-256); trying the one before"
        in " ".join(line.replace("the checkpoint before it", "the one before") for line in lines)
    )
    assert "going on after round 2" in lines
    assert_same(directory, expected)


def test_nothing_is_left_to_go_on_from(raw: dict[str, Any], tmp_path: Path) -> None:
    expected, directory = uninterrupted(raw, tmp_path), stopped(raw)
    for manifest in directory.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    lines: list[str] = []
    resume(directory, echo=lines.append)
    assert "there is no checkpoint to go on from: starting from the beginning" in lines
    assert_same(directory, expected)


@pytest.mark.parametrize("content", ["", "not a mapping", "{", "rounds: [", None])
def test_a_damaged_config_is_taken_from_the_checkpoint(
    raw: dict[str, Any], tmp_path: Path, content: str | None
) -> None:
    expected, directory = uninterrupted(raw, tmp_path), stopped(raw)
    config = directory / "config.yaml"
    if content is None:
        config.unlink()
    else:
        config.write_text(content)
    lines: list[str] = []
    resume(directory, echo=lines.append)
    assert any(line.startswith(f"warning: {config}: ") for line in lines)
    assert_same(directory, expected)


def test_lost_records_do_not_cost_the_rounds(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first line and that of the checkpoint's round are measured anew, and the run ends as it would have."""
    expected, directory = uninterrupted(raw, tmp_path), stopped(raw)
    path = directory / "rounds.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["{", *lines[1:-1], "}"]) + "\n")
    damaged = path.read_bytes()
    assert main(["--resume", str(directory)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert main([str(directory), "--accept-lost-records"]) == 2
    assert "--accept-lost-records belongs to --resume" in capsys.readouterr().err
    assert "2 of 3 records can't be read (round 0, 2), though the checkpoint of round 2 is whole" in error
    assert path.read_bytes() == damaged
    assert main(["--resume", str(directory), "--accept-lost-records"]) == 0
    found = comparable(directory)
    assert found["adapter.safetensors"] == expected["adapter.safetensors"]
    records = found["rounds.jsonl"]
    assert [record["round"] for record in records] == [0, 1, 2, 3, 4]
    assert [record["accuracy"] for record in records] == [record["accuracy"] for record in expected["rounds.jsonl"]]
    assert records[3:] == expected["rounds.jsonl"][3:]
    assert damaged in [each.read_bytes() for each in (directory / "set-aside").iterdir()]


@pytest.mark.parametrize("name", ["environment.json", "partition.json", "prompts.json", "log.txt"])
def test_a_file_that_is_damaged_or_missing(raw: dict[str, Any], tmp_path: Path, name: str) -> None:
    expected = uninterrupted(raw, tmp_path)
    for content in (b"{", b"\x00\xff", None):
        shutil.rmtree(directory_of(raw), ignore_errors=True)
        directory = stopped(raw)
        if content is None:
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(content)
        resume(directory)
        assert_same(directory, expected)


def test_another_machine_is_named(raw: dict[str, Any]) -> None:
    directory = stopped(raw)
    environment = json.loads((directory / "environment.json").read_text())
    there = {**environment, "device": "Abacus", "num_threads": 77}
    (directory / "environment.json").write_text(json.dumps(there))
    lines: list[str] = []
    resume(directory, echo=lines.append)
    expected = f"warning: this run began elsewhere: device Abacus then, {environment['device']} now; the last bits may"
    assert any(line.startswith(expected) for line in lines)
    assert any("num_threads 77 then" in line for line in lines)
    assert json.loads((directory / "environment.json").read_text()) == there


def test_a_run_that_moved_with_its_data(raw: dict[str, Any], tmp_path: Path) -> None:
    model = tmp_path / "elsewhere.json"
    shutil.copy(raw["backbone"]["model"], model)
    expected, directory = uninterrupted(raw, tmp_path), stopped(raw)
    moved = tmp_path / "a=b, moved"
    shutil.move(directory, moved)
    assert main(["--resume", str(moved), f"backbone.model={model}", "evaluation.batch_size=7"]) == 0
    found = comparable(moved)
    assert found["adapter.safetensors"] != b""
    assert [record["train_loss"] for record in found["rounds.jsonl"]] == [
        record["train_loss"] for record in expected["rounds.jsonl"]
    ]


def test_other_weights_are_noticed(raw: dict[str, Any]) -> None:
    directory = stopped(raw)
    environment = json.loads((directory / "environment.json").read_text())
    for name in ("backbone", "data"):
        (directory / "environment.json").write_text(json.dumps({**environment, f"{name}_sha256": "other"}))
        with pytest.raises(UserError, match=rf": the {name} is not what this run began with \(SHA-256\)"):
            resume(directory)
    (directory / "environment.json").write_text(json.dumps(environment))
    assert resume(directory).summary.rounds == 4


@pytest.mark.parametrize("enabled", [None, False], ids=["kept", "live"])
def test_other_images_under_the_same_names_and_sizes_are_noticed(
    raw: dict[str, Any], tmp_path: Path, enabled: bool | None
) -> None:
    generator = np.random.default_rng(0)
    for index in range(40):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    raw |= {
        "data": {"name": "image_folder", "root": str(tmp_path / "images"), "unreadable": "skip"},
        "partition": "iid",
        "cache": {"enabled": enabled, "folder": str(tmp_path / "cache")},
    }
    directory = simulate(parse_config({**raw, "rounds": 1})).directory
    partition = json.loads((directory / "partition.json").read_text())
    assert (partition["num_train"], partition["num_test"]) == (32, 8)
    shutil.move(tmp_path / "images", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    # Images that have moved are the same, and so are those whose features are kept now and weren't, or were and aren't.
    resume(directory, [f"data.root={tmp_path / 'elsewhere'}", "rounds=2"])
    resume(directory, [f"cache.enabled={'false' if enabled is None else 'null'}", "rounds=3"])
    path = tmp_path / "elsewhere" / "a" / "6.bmp"
    whole = path.read_bytes()
    for changed in (whole[:-1] + bytes([whole[-1] ^ 1]), b"no longer an image".ljust(len(whole))):
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"the images are not what this run began with \(SHA-256\)"):
            resume(directory, ["rounds=4"])
    path.write_bytes(whole)
    assert resume(directory, ["rounds=4"]).summary.rounds == 4


def test_a_finished_run_without_checkpoints_keeps_its_results(raw: dict[str, Any]) -> None:
    directory = simulate(parse_config(raw)).directory
    shutil.rmtree(directory / "checkpoints")
    before = comparable(directory)
    with pytest.raises(
        UserError, match="this run is finished, and has no good checkpoint that more rounds could follow"
    ):
        resume(directory, ["rounds=9"])
    assert comparable(directory) == before


def test_a_folder_with_a_config_is_no_run(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    config = tmp_path / "mine" / "config.yaml"
    config.write_text(f"# my own\n{yaml.safe_dump(raw)}")
    before = config.read_text()
    with pytest.raises(UserError, match="mine: not a run directory: it has none of lock, log"):
        resume(tmp_path / "mine")
    assert config.read_text() == before


def test_other_data_are_noticed(raw: dict[str, Any]) -> None:
    directory = stopped(raw)
    partition = json.loads((directory / "partition.json").read_text())
    partition["clients"][0]["num_train"] += 1
    (directory / "partition.json").write_text(json.dumps(partition))
    with pytest.raises(UserError, match=r"partition\.json: the data are not those that this run began with"):
        resume(directory)


def test_two_processes_in_one_directory(raw: dict[str, Any], tmp_path: Path) -> None:
    expected, directory = uninterrupted(raw, tmp_path), stopped(raw)
    other, lock, deadline = killable.hold(directory), directory / "lock", time.time() + 50
    while not (lock.exists() and lock.read_text() == f"{other.pid}\n") and time.time() < deadline:
        time.sleep(0.02)
    with pytest.raises(UserError, match=rf"in use by another process \({other.pid}\); wait for it, or stop it"):
        resume(directory)
    other.kill()
    other.join()
    assert lock.read_text() == f"{other.pid}\n"  # stale: its process is gone
    resume(directory)
    assert_same(directory, expected)
    assert not lock.exists()


def test_a_disk_that_fills_up_in_round_three(raw: dict[str, Any], tmp_path: Path) -> None:
    expected = uninterrupted(raw, tmp_path)
    for code in (28, 5):  # ENOSPC, EIO
        for name in ("rounds.jsonl", "manifest.json", "clients.safetensors", "round-0003"):
            shutil.rmtree(directory_of(raw), ignore_errors=True)
            round_of: dict[str, int] = {"now": 0}

            def note(round: int, update: ClientUpdate, now: dict[str, int] = round_of) -> ClientUpdate:
                now["now"] = round
                return update

            def full(path: Path, code: int = code, name: str = name, now: dict[str, int] = round_of) -> None:
                if now["now"] >= 3 and path.name == name:
                    raise OSError(code, os.strerror(code))

            with pytest.raises(UserError, match=f"can't be written: {os.strerror(code)}"):
                simulate(parse_config(raw), hooks=Hooks(before_write=full, update=note))
            resume(directory_of(raw))
            assert_same(directory_of(raw), expected)


def test_an_image_that_vanishes_in_round_three(raw: dict[str, Any], tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    images = tmp_path / "images"
    for index in range(24):
        path = images / f"thing {index % 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    raw.update(data={"name": "image_folder", "root": str(images)}, partition="iid", clients={"number": 2})
    raw["local"]["augmentation"] = "crop_flip"
    expected = uninterrupted(raw, tmp_path)
    hidden = tmp_path / "hidden"

    def vanish(round: int, clients: tuple[int, ...]) -> None:
        if round == 3:
            images.rename(hidden)

    with pytest.raises(UserError, match=r"\.png: can't be read as an image: .*No such file"):
        simulate(parse_config(raw), hooks=Hooks(before_block=vanish))
    with pytest.raises(UserError, match=r"data\.root: .*images"):
        resume(directory_of(raw))
    hidden.rename(images)
    resume(directory_of(raw))
    assert_same(directory_of(raw), expected)


@pytest.mark.stress
def test_memory_and_files_stay_flat_over_five_hundred_rounds(raw: dict[str, Any]) -> None:
    measured: dict[int, tuple[int, int]] = {}

    def measure(round: int, clients: tuple[int, ...]) -> None:
        if round in (100, 500):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            measured[round] = pages, len(os.listdir("/proc/self/fd"))

    raw.update(rounds=500, clients={"number": 6, "cohort": {"name": "uniform", "number": 4}})
    raw["local"]["optimizer_state"] = "kept"
    simulate(parse_config(raw), hooks=Hooks(before_block=measure))
    assert measured[500][0] < 1.02 * measured[100][0]
    assert measured[500][1] == measured[100][1]


def test_a_run_closes_what_it_opens(raw: dict[str, Any]) -> None:
    simulate(parse_config(raw), numbered=True)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        simulate(parse_config(raw), numbered=True)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_lock_of_a_closed_run_is_gone(tmp_path: Path) -> None:
    directory = RunDirectory.create(str(tmp_path), "x", numbered=False)
    assert (tmp_path / "x" / "lock").read_text() == f"{os.getpid()}\n"
    directory.close()
    assert not (tmp_path / "x" / "lock").exists()
