"""The number of threads: PyTorch's, or fewer where other processes compete and that is clearly faster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flora.config.parse import parse_config
from flora.core.hooks import Hooks
from flora.runs import threads
from flora.simulate import RunResult, resume, simulate

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def pretend(patch: Patch, *, others: float, seconds: dict[int, float]) -> list[int]:
    """A machine on which other processes run, and a step takes so long; the numbers of threads that were timed."""
    timed: list[int] = []

    def seconds_of(step: Any) -> float:
        step()
        timed.append(torch.get_num_threads())
        return seconds[timed[-1]]

    patch.setattr(threads, "num_others_running", lambda: others)
    patch.setattr(threads, "seconds_of", seconds_of)
    return timed


def recorded(result: RunResult) -> int:
    return int(json.loads((result.directory / "environment.json").read_text())["num_threads"])


@pytest.mark.parametrize(
    ("others", "seconds", "chosen", "timed"),
    [
        (0.0, {}, 4, []),  # an idle machine: nothing is timed
        (0.8, {}, 4, []),
        (1.0, {4: 0.9, 2: 0.3, 1: 0.4}, 2, [4, 2, 1]),
        (3.0, {4: 0.9, 2: 0.5, 1: 0.2}, 1, [4, 2, 1]),
        (1.0, {4: 0.3, 2: 0.25, 1: 0.5}, 4, [4, 2, 1]),  # not clearly faster
    ],
)
def test_what_is_chosen_said_and_recorded(
    others: float,
    seconds: dict[int, float],
    chosen: int,
    timed: list[int],
    raw_config: dict[str, Any],
    monkeypatch: Patch,
) -> None:
    found, lines = pretend(monkeypatch, others=others, seconds=seconds), []
    during: list[int] = []
    hooks = Hooks(before_block=lambda round, clients: during.append(torch.get_num_threads()))
    result = simulate(parse_config(raw_config), echo=lines.append, hooks=hooks)
    assert found == timed
    assert set(during) == {chosen}
    assert recorded(result) == chosen
    assert torch.get_num_threads() == 4
    said = [line for line in lines if line.startswith("threads: ")]
    assert len(said) == bool(timed)
    assert all(
        line.startswith(f"threads: {chosen} of 4, because other processes are at work here: a step ") for line in said
    )


def test_the_option_is_the_last_word(raw_config: dict[str, Any], monkeypatch: Patch) -> None:
    timed = pretend(monkeypatch, others=9.0, seconds={4: 9.0, 2: 1.0, 1: 0.1})
    assert recorded(simulate(parse_config({**raw_config, "threads": 3}))) == 3
    assert timed == []


def test_timing_changes_no_bit(raw_config: dict[str, Any], monkeypatch: Patch) -> None:
    for changes in (
        {},
        {"local": {**raw_config["local"], "optimizer": "sgd", "correction": "scaffold"}},
        {"server": {"strategy": "rolora"}},
    ):
        raw = {**raw_config, **changes}
        plain = simulate(parse_config({**raw, "threads": 4}), numbered=True)
        with monkeypatch.context() as patch:
            pretend(patch, others=1.0, seconds={4: 0.1, 2: 0.1, 1: 0.1})
            timed = simulate(parse_config(raw), numbered=True)
        assert all(torch.equal(plain.adapter[name], timed.adapter[name]) for name in plain.adapter)


def test_a_run_goes_on_with_the_number_that_it_began_with(raw_config: dict[str, Any], monkeypatch: Patch) -> None:
    pretend(monkeypatch, others=1.0, seconds={4: 0.9, 2: 0.1, 1: 0.5})
    result = simulate(parse_config({**raw_config, "rounds": 1}))
    assert recorded(result) == 2
    timed = pretend(monkeypatch, others=1.0, seconds={4: 0.1, 2: 0.5, 1: 0.5})
    during: list[int] = []
    hooks = Hooks(before_block=lambda round, clients: during.append(torch.get_num_threads()))
    lines: list[str] = []
    resume(result.directory, ["rounds=2"], hooks=hooks, echo=lines.append)
    assert set(during) == {2}
    assert timed == []
    assert not any("began elsewhere" in line for line in lines)


def test_what_runs_is_counted() -> None:
    assert 0 <= threads.num_others_running() < 100_000
