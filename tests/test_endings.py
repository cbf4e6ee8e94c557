"""However a program ends, it ends in one line: signals at any moment, no memory, streams that are closed or full."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from flora.core.interrupts import SIGNALS, Interrupts
from flora.export import main as export
from flora.runs import loop as program
from flora.simulate import main
from flora.sweep.__main__ import main as sweep

ROOT = Path(__file__).parents[1]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config_file(tmp_path: Path, raw_config: dict[str, Any]) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**raw_config, "name": "mine", "output": str(tmp_path / "runs"), "rounds": 1}))
    return str(path)


# Signals before the first step


def images(folder: Path) -> None:
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for index in range(10):
            pixels = np.full((16, 16, 3), 20 * index + 5, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")


@pytest.mark.usefixtures("built_anew")
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("place", ["open_clip.CLIP.__init__", "PIL.Image.open", "torch.nn.Conv2d.forward"])
def test_a_signal_before_the_first_step_ends_the_run_at_once(
    place: str,
    number: signal.Signals,
    config_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    images(tmp_path / "images")

    sent: list[int] = []

    def stop(*arguments: Any, **options: Any) -> None:
        sent.append(number)
        if len(sent) == 1:  # images are read in several threads, and a second signal leaves at once
            os.kill(os.getpid(), number)
        raise RuntimeError("the signal was not obeyed")

    monkeypatch.setattr(place, stop)
    overrides = ["data={name: image_folder, root: " + str(tmp_path / "images") + "}"]
    assert main([config_file, *overrides]) == 128 + number
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == f"stopped by {number.name}"
    assert captured.out == ""
    assert not list((tmp_path / "runs").glob("*"))  # nothing was begun


def test_a_signal_that_a_library_swallows_still_stops_the_run() -> None:
    with Interrupts() as interrupts:
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(BaseException, match="SIGTERM"):
            interrupts.check()


# Memory and threads that the system refuses outside of a block of clients


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("std::bad_alloc"), "out of memory: std::bad_alloc; lower clients.per_block"),
        (MemoryError(), "out of memory: no memory left; lower clients.per_block"),
        (RuntimeError("can't start new thread"), "the system allows no more threads (ulimit -u,"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
            "out of memory: ",
        ),
    ],
)
@pytest.mark.parametrize("place", ["built", "measure", "measure_clients"])
def test_what_the_system_refuses_is_one_line(
    place: str, error: Exception, said: str, config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(program, place, refuse)
    monkeypatch.setattr("flora.runs.measure.measure_clients", refuse)
    assert main([config_file]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{config_file}: {said}")


def test_other_errors_are_not_taken_for_the_user_s(config_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("a mistake in the program")

    monkeypatch.setattr(program, "built", fail)
    with pytest.raises(RuntimeError, match="a mistake in the program"):
        main([config_file])


# Streams


def test_a_full_standard_output_is_one_line(config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([config_file]) == 2
        monkeypatch.undo()
    assert capsys.readouterr().err.splitlines()[-1] == "standard output: No space left on device"


@pytest.mark.parametrize("stderr", ["/dev/full", None])
def test_a_standard_error_that_takes_nothing_is_not_in_the_way(
    stderr: str | None, config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    stream = None if stderr is None else open(stderr, "w")  # noqa: SIM115  (closed below)
    monkeypatch.setattr(sys, "stderr", stream)
    assert main([config_file]) == 0
    monkeypatch.undo()
    if stream is not None:
        stream.close()
    assert "written to" in capsys.readouterr().out
    assert (tmp_path / "runs" / "mine" / "summary.json").is_file()


def test_a_closed_standard_output_is_not_in_the_way(
    config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main([config_file]) == 0
    assert (tmp_path / "runs" / "mine" / "summary.json").is_file()


def test_letters_that_a_stream_lacks_are_escaped(config_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main([config_file, "name=größe"]) == 0
    sys.stdout.flush()
    assert b"gr\\xf6\\xdfe" in written.getvalue()


def test_the_exit_status_with_every_stream_full(config_file: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "flora.simulate", config_file], stdout=full, stderr=full, cwd=ROOT, check=False
        )
    assert done.returncode == 2


# A user's own components


COMPONENT = """
from dataclasses import dataclass
from flora.core import tree
from flora.server.aggregators import Aggregator
from flora.core.registry import option, register

@register("halved")
@dataclass(frozen=True)
class Halved(Aggregator):
    factor: float = option("what the mean is multiplied with", 0.5)

    def combine(self, deltas, weights):
        return tree.scale(tree.weighted_mean(deltas, weights), self.factor)
"""


def test_every_program_takes_a_user_s_own_component(config_file: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "my_halved.py").write_text(COMPONENT)
    own = ["--import", str(tmp_path / "my_halved.py")]
    assert main([config_file, "server.aggregator=halved", *own]) == 0
    run = tmp_path / "runs" / "mine"
    assert main(["--resume", str(run), "rounds=2", *own]) == 0
    assert export([str(run), str(tmp_path / "adapted"), *own]) == 0
    assert sweep([config_file, "server.aggregator=mean,halved", "--output", str(tmp_path / "sweep"), *own]) == 0
    table = capsys.readouterr().out
    assert "halved" in table
    assert main(["--list", *own]) == 0
    assert "halved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("missing.py", None, "expected a Python file called name.py"),
        ("notes.txt", "", "expected a Python file called name.py"),
        ("my-own.py", "", "expected a Python file called name.py"),
        ("my_mistake.py", "1 / 0", "my_mistake.py: ZeroDivisionError: division by zero"),
        ("random.py", "", "there is another module called random; rename the file"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(
    name: str, text: str | None, said: str, tmp_path: Path, capsys: Capture
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["--list", "--import", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
