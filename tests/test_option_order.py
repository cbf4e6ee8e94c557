"""Options and arguments may stand in any order on every command line."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from flora import export, simulate
from flora.benchmark import __main__ as benchmark
from flora.sweep import __main__ as sweep

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config_file(tmp_path: Path, raw_config: dict[str, Any]) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    return str(path)


def orders(*groups: str | tuple[str, ...]) -> list[list[str]]:
    """The arguments in all orders; those of a group (an option and its value) stay together."""
    parts = [(group,) if isinstance(group, str) else group for group in groups]
    return [list(itertools.chain(*order)) for order in itertools.permutations(parts)]


def test_check_takes_its_arguments_in_any_order(config_file: str, capsys: Capture) -> None:
    for arguments in orders(config_file, "--check", "rounds=5", "seed=3"):
        assert simulate.main(arguments) == 0, arguments
        assert capsys.readouterr().out == f"{config_file}: ok\n"


def test_resume_takes_its_arguments_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(simulate, "_run_one", lambda *arguments, **options: seen.append((arguments, options)))
    for arguments in orders("runs/mine", "--resume", "rounds=40", "threads=1"):
        assert simulate.main(arguments) == 0, arguments
        (path, overrides, _), options = seen.pop()
        assert (path, sorted(overrides)) == ("runs/mine", ["rounds=40", "threads=1"])
        assert options == {"resuming": True, "accept_lost_records": False}


def test_a_sweep_takes_its_arguments_in_any_order(
    config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    grids: list[Any] = []
    monkeypatch.setattr(sweep, "run_all", lambda runs, *arguments, **options: grids.append((runs, options["jobs"])))
    for arguments in orders(config_file, "seed=0,1", ("--set", "rounds=5"), ("--jobs", "2"), ("--output", "x")):
        assert sweep.main(arguments) == 0, arguments
        runs, jobs = grids.pop()
        assert [(run.seed, run.rounds, run.output) for run in runs] == [(0, 5, "x"), (1, 5, "x")]
        assert jobs == 2


def test_export_takes_its_arguments_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def merged(run: Path, client: str | None, overrides: Sequence[str]) -> export.MergedModel:
        asked.append((run, client))
        return export.MergedModel("tiny", {"weight": torch.zeros(2)}, {}, {})

    monkeypatch.setattr(export, "merged_model", merged)
    monkeypatch.setattr(export, "read_run", lambda path, overrides: SimpleNamespace(config=None))
    monkeypatch.setattr(export, "left_out", lambda config: [])
    (before, after) = ("runs/mine", str(tmp_path / "x.safetensors"))  # the only two whose order tells them apart
    for arguments in orders(before, after, ("--client", "1"), ("--dtype", "fp16")):
        if arguments.index(before) < arguments.index(after):
            assert export.main(arguments) == 0, arguments
            assert asked.pop() == (Path(before), "1")
            Path(after).unlink()


def test_the_benchmark_takes_its_arguments_in_any_order(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(benchmark, "profile_round", lambda path, overrides: [path, *sorted(overrides)])
    for arguments in orders(("--profile", "x.yaml"), "rounds=3", "seed=1", ("--repeats", "1")):
        assert benchmark.main(arguments) == 0, arguments
        assert capsys.readouterr().out.split() == ["x.yaml", "rounds=3", "seed=1"]


def test_a_benchmark_without_a_config_takes_no_overrides(capsys: Capture) -> None:
    assert benchmark.main(["rounds=3"]) == 2
    assert (
        capsys.readouterr().err
        == "rounds=3: belongs to a CONFIG (--profile, --sweep, --processes, --methods); see --help\n"
    )
