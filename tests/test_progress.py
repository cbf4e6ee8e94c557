"""How far a run is: bars on a terminal, a limited number of lines without one."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from flora.config.parse import parse_config
from flora.core import progress
from flora.core.hooks import Hooks
from flora.core.progress import MAX_ROUND_LINES, TimeLeft, duration, has_line, image_progress
from flora.core.records import RoundRecord
from flora.engine import engine
from flora.simulate import main, simulate


@pytest.fixture
def config_file(tmp_path: Path, raw_config: dict[str, Any]) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**raw_config, "name": "mine", "output": str(tmp_path / "runs")}))
    return str(path)


def on_a_terminal(arguments: list[str], monkeypatch: pytest.MonkeyPatch, *, size: tuple[int, int]) -> str:
    """What the program writes to standard error if that is a terminal of so many lines and columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    written: list[bytes] = []

    def read() -> None:
        while True:
            try:
                written.append(os.read(ours, 4096))
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main(arguments) == 0
        monkeypatch.undo()
    reader.join(timeout=10)
    os.close(ours)
    return b"".join(written).decode()


def test_a_terminal_has_bars_of_rounds_and_of_the_steps_of_a_long_round(
    config_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LONG_ROUND", 0.0)
    text = on_a_terminal([config_file, "rounds=2"], monkeypatch, size=(24, 100))
    assert "rounds: 100%" in text
    assert text.count("left=") >= 2 and "clients/s=" in text
    assert "client steps: " in text
    assert "round 1 of 2" not in text


def test_a_terminal_without_a_size_has_lines(config_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_a_terminal([config_file, "rounds=2"], monkeypatch, size=(0, 0))
    assert "%|" not in text
    assert "round 2 of 2: accuracy" in text


def test_without_a_terminal_each_round_has_a_line_there_and_in_the_log(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([config_file, "rounds=3", "evaluation.every=3"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert not any("client steps" in line for line in said)  # a round must take a minute for these
    lines = [line for line in said if line.startswith("round ")]
    assert [line.split(":")[0] for line in lines] == [f"round {number} of 3" for number in range(4)]
    assert ["accuracy" in line for line in lines] == [True, False, False, True]
    assert all("training loss" in line and "4 clients" in line and " clients/s" in line for line in lines[1:])
    assert [line.endswith(" s left") for line in lines] == [False, True, True, False]
    logged = [line.partition(" ")[2] for line in (tmp_path / "runs/mine/log.txt").read_text().splitlines()]
    assert [line for line in logged if line.startswith("round ")] == lines


def test_many_rounds_have_few_lines() -> None:
    for number in (1, 7, MAX_ROUND_LINES, MAX_ROUND_LINES + 1, 3 * MAX_ROUND_LINES + 7, 100_000):
        lines = [round for round in range(number + 1) if has_line(round, number)]
        assert len(lines) <= MAX_ROUND_LINES + 2
        assert lines[0] == 0
        assert lines[-1] == number
    assert len([round for round in range(51) if has_line(round, 50)]) == 51


def test_what_takes_long_has_a_line_at_each_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    advance = image_progress(lines.append)("image features", 1000)
    for _ in range(200):
        advance(5)
    assert len(lines) == 10
    assert re.fullmatch(r"image features: 300 of 1,000 after \d+ s, \d+ s left", lines[2])
    assert re.fullmatch(r"image features: 1,000 of 1,000 after \d+ s", lines[-1])
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 3600.0)
    image_progress(lines.append)("image features", 1000)(1000)
    assert len(lines) == 10


def test_without_a_terminal_a_long_round_and_clients_alone_have_lines_and_no_carriage_return(
    config_file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_STEP_LINES", 0.0)
    said = StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    assert main([config_file, "rounds=2", "evaluation.num_local_only=2", "clients.per_block=1"]) == 0
    monkeypatch.undo()
    lines = said.getvalue().splitlines()
    assert "\r" not in said.getvalue() and "\x1b" not in said.getvalue()
    steps = [line for line in lines if line.startswith("  client steps")]
    assert len(steps) >= 2
    assert all(re.fullmatch(r"  client steps: \d+ of \d+ after \d+ s(, \d+ s left)?", line) for line in steps)
    assert [line.split(" after")[0] for line in lines if line.startswith("alone")] == ["alone: 1 of 2", "alone: 2 of 2"]
    assert " left" in next(line for line in lines if line.startswith("alone: 1"))


def record(round: int, seconds: float, num_clients: int = 4) -> RoundRecord:
    metrics = {"train_seconds": seconds, "eval_seconds": 1.0, "num_clients": num_clients}
    return RoundRecord(round, metrics)


def test_the_time_left_is_that_of_the_whole_run() -> None:
    alone = TimeLeft(10, num_local_only=0)
    assert alone.after(record(0, 0.0)) is None
    assert alone.after(record(1, 3.0)) == 9 * 4.0
    assert alone.after(record(2, 5.0)) == 8 * 5.0
    assert TimeLeft(2, num_local_only=0).after(record(2, 3.0)) is None
    # Two clients that train alone for ten rounds: half of what ten rounds of four train.
    assert TimeLeft(10, num_local_only=2).after(record(1, 4.0)) == 9 * 5.0 + 20.0
    assert TimeLeft(10, num_local_only=2).after(record(10, 4.0)) == 20.0
    # Nobody came.
    assert TimeLeft(3, num_local_only=1).after(record(1, 0.0, num_clients=0)) == 2.0


def test_the_last_rounds_say_how_long_those_to_come_will_take() -> None:
    left = TimeLeft(1000, num_local_only=0)
    for number in range(1, 101):
        seconds = left.after(record(number, 99.0 if number <= 100 - progress.NUM_RECENT else 1.0))
    assert seconds == 900 * 2.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (86400 + 3 * 3600, "1 d 3 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("per_block", [1, 3, None])
def test_hooks_are_told_of_every_client_step(raw_config: dict[str, Any], per_block: int | None) -> None:
    raw_config["clients"]["per_block"] = per_block
    seen: list[tuple[int, int]] = []
    result = simulate(
        parse_config({**raw_config, "rounds": 1}), hooks=Hooks(after_step=lambda *pair: seen.append(pair))
    )
    total = result.records[1].num_steps
    assert {pair[1] for pair in seen} == {total}
    done = [pair[0] for pair in seen]
    assert done == sorted(done)
    assert done[-1] == total


def test_a_block_that_is_halved_is_not_counted_twice(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = engine.train_block, []

    def only_two(model: Any, features: Any, block: Any, *others: Any) -> Any:
        result = real(model, features, block, *others)
        if len(block.tasks) > 2:
            raise MemoryError
        return result

    monkeypatch.setattr(engine, "train_block", only_two)
    result = simulate(
        parse_config({**raw_config, "rounds": 1}), hooks=Hooks(after_step=lambda *pair: seen.append(pair))
    )
    assert seen[-1] == (result.records[1].num_steps,) * 2
