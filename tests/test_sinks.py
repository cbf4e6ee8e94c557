"""What a run tells its sinks and hooks; hooks of several parties are all called."""

from __future__ import annotations

from typing import Any

import pytest

from flora.config.parse import parse_config
from flora.core.hooks import Hooks
from flora.core.records import RoundRecord
from flora.core.states import ServerState
from flora.experiment.build import Experiment
from flora.runs.sinks import Finished, Sink
from flora.simulate import main, resume, simulate


class Told(Sink):
    """Keeps what it is told, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, experiment: Experiment) -> None:
        self.lines.append(f"start with {len(experiment.federation.clients)} clients")

    def record(self, record: RoundRecord) -> None:
        self.lines.append(f"round {record.round}")

    def finish(self, finished: Finished) -> None:
        assert finished.summary.last_accuracy >= 0 and len(finished.clients["client"]) == 4
        self.lines.append(f"finish after {finished.state.round}")

    def close(self) -> None:
        self.lines.append("close")


def test_a_sink_is_told_of_everything_in_order(raw_config: dict[str, Any]) -> None:
    told = Told()
    result = simulate(parse_config(raw_config), sinks=[told])
    assert told.lines == ["start with 4 clients", "round 0", "round 1", "round 2", "finish after 2", "close"]
    told = Told()
    resume(result.directory, ["rounds=3"], sinks=[told])
    assert told.lines == ["start with 4 clients", "round 3", "finish after 3", "close"]


@pytest.mark.parametrize("every", [1, None])
def test_a_sink_that_fails_ends_the_run_and_loses_nothing(raw_config: dict[str, Any], every: int | None) -> None:
    raw_config["checkpoints"] = {"every": every}

    class Full(Told):
        def record(self, record: RoundRecord) -> None:
            super().record(record)
            if record.round == 2:
                raise OSError("the tracker is full")

    full = Full()
    with pytest.raises(OSError, match="the tracker is full"):
        simulate(parse_config({**raw_config, "rounds": 3}), sinks=[full])
    assert full.lines[-1] == "close"
    config = parse_config({**raw_config, "rounds": 3, "name": "whole"})
    whole = simulate(config)
    rest = resume(whole.directory.parent / "test")
    assert rest.summary.last_accuracy == whole.summary.last_accuracy
    assert [record.round for record in rest.records] == [0, 1, 2, 3]


def test_hooks_of_two_are_both_called_and_updates_go_through_both(raw_config: dict[str, Any]) -> None:
    calls: list[str] = []

    def hooks(name: str) -> Hooks:
        def update(round: int, update: Any) -> Any:
            calls.append(f"{name} update")
            return update

        def after_round(record: RoundRecord, state: ServerState) -> None:
            assert record.round == state.round
            calls.append(f"{name} round {record.round}")

        return Hooks(before_block=lambda round, clients: calls.append(name), update=update, after_round=after_round)

    raw_config["clients"] = {"number": 4, "cohort": {"name": "uniform", "number": 1}}
    simulate(parse_config(raw_config), hooks=hooks("one").then(hooks("two")))
    one_round = ["one", "two", "one update", "two update"]
    assert calls == [*one_round, "one round 1", "two round 1", *one_round, "one round 2", "two round 2"]


def test_a_program_of_ones_own_adds_to_the_command_line(raw_config: dict[str, Any], tmp_path: Any) -> None:
    import json

    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(raw_config))
    told, rounds = Told(), []
    hooks = Hooks(after_round=lambda record, state: rounds.append(record.round))
    assert main([str(path)], hooks=hooks, sinks=[told]) == 0
    assert told.lines[-2:] == ["finish after 2", "close"] and rounds == [1, 2]


def test_a_caller_from_python_gets_bars_only_if_it_asks(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flora.core import progress
    from flora.runs import loop

    shown: list[str] = []
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    monkeypatch.setattr(loop, "on_terminal", lambda: True)
    real = progress.tqdm

    def tqdm(*arguments: Any, **options: Any) -> Any:
        if not options["disable"]:
            shown.append(options["desc"])
        return real(*arguments, **{**options, "disable": True})

    monkeypatch.setattr(progress, "tqdm", tqdm)
    lines: list[str] = []
    simulate(parse_config(raw_config), numbered=True, echo=lines.append)
    assert shown == [] and any(line.startswith("round 2 of 2: ") for line in lines)
    simulate(parse_config({**raw_config, "cache": {"folder": None}}), numbered=True, progress=True)
    assert {"rounds", "  client steps"} <= set(shown)
