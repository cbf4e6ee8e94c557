"""A pipe in place of a file is refused in one line; nothing waits for whoever would write to it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from flora.clip.adapters.files import read_adapter
from flora.config.parse import load_config, parse_config
from flora.core.errors import UserError
from flora.core.files import open_regular, read_text, refuse_irregular
from flora.core.hooks import Hooks
from flora.simulate import main, simulate
from flora.sweep.outcomes import read_outcome


@pytest.fixture(autouse=True)
def impatience() -> Iterator[None]:
    """What waits for a pipe fails after some seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> Path:
    """A pipe in place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def test_regular_files_alone_are_opened(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("é", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert read_text(tmp_path / "link") == "é"
    for path, reason in (
        (pipe(tmp_path / "pipe"), "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "no", "No such file"),
    ):
        with pytest.raises(OSError, match=reason):
            open_regular(path)
    refuse_irregular(tmp_path / "no")
    with pytest.raises(OSError, match="not a regular file"):
        refuse_irregular(tmp_path / "pipe")


def test_what_a_user_names(tmp_path: Path, raw_config: dict[str, Any]) -> None:
    place = pipe(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match=r"pipe\.yaml: not a regular file"):
        load_config(str(place))
    for section, value in (
        ("backbone", {"model": str(pipe(tmp_path / "pipe.json"))}),
        ("backbone", {**raw_config["backbone"], "weights": str(pipe(tmp_path / "pipe.safetensors"))}),
        ("data", {"name": "csv", "path": str(pipe(tmp_path / "pipe.csv"))}),
        ("network", {"name": "csv", "path": str(tmp_path / "pipe.csv")}),
    ):
        with pytest.raises(UserError, match=r"not a regular file|neither a file nor a tag"):
            simulate(parse_config({**raw_config, section: value}))
    with pytest.raises(UserError, match="not a regular file"):
        read_adapter(tmp_path / "pipe.safetensors")


def test_the_weights_of_a_models_folder(tmp_path: Path, raw_config: dict[str, Any]) -> None:
    folder = pipe(tmp_path / "model" / "open_clip_model.safetensors").parent
    (folder / "open_clip_config.json").write_text(Path(raw_config["backbone"]["model"]).read_text())
    with pytest.raises(UserError, match=r"backbone.weights: .*open_clip_model.safetensors: not a regular file"):
        simulate(parse_config({**raw_config, "backbone": {"model": str(folder)}}))


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml", "config.yaml.part", "environment.json", "partition.json", "prompts.json", "rounds.jsonl",
        "log.txt", "summary.json", "lock", "checkpoints/round-0001/manifest.json",
        "checkpoints/round-0001/adapter.safetensors",
    ],
)  # fmt: skip
def test_what_a_run_left_behind(raw_config: dict[str, Any], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(round: int, clients: Any) -> None:
        if round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(parse_config(raw_config), hooks=Hooks(before_block=stop))
    directory = Path(raw_config["output"]) / raw_config["name"]
    assert (directory / "checkpoints" / "round-0001").is_dir()
    pipe(directory / name)
    status = main(["--resume", str(directory)])
    assert status in (0, 2)
    if status:
        assert "Traceback" not in capsys.readouterr().err


def test_what_a_table_reads(raw_config: dict[str, Any]) -> None:
    directory = simulate(parse_config({**raw_config, "rounds": 1})).directory
    for name in ("rounds.jsonl", "summary.json"):
        pipe(directory / name)
        with pytest.raises(UserError, match=f"{name}: not a regular file"):
            read_outcome(directory)
