"""The model of a run on other data sets, whose classes it never trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core.errors import UserError
from flora.core.registry import OptionError
from flora.core.shared import Shared
from flora.evaluate import evaluated
from flora.experiment.build import build_experiment
from flora.runs.finished import read_run
from flora.simulate import simulate


def test_other_data_are_evaluated_first_and_last_and_equal_what_evaluate_says(raw_config: dict[str, Any]) -> None:
    also = ["digits", {"name": "glyphs", "num_train": 40, "num_test": 60, "characters": "abc"}]
    result = simulate(parse_config(raw_config | {"evaluation": {"also": also}}))
    frozen, middle, adapted = (record.metrics["other_accuracy"] for record in result.records)
    assert list(frozen) == list(adapted) == ["digits", "glyphs"] and middle is None
    summary = result.summary
    assert (summary.zero_shot_other_accuracy, summary.other_accuracy) == (frozen, adapted)
    assert summary.other_accuracy_mean == pytest.approx(sum(adapted.values()) / 2)
    record = evaluated(read_run(result.directory, ["data=digits"]))
    assert record["zero_shot"]["accuracy"] == frozen["digits"]
    assert record["metrics"]["accuracy"] == adapted["digits"]
    digests = json.loads((result.directory / "environment.json").read_text())
    assert len(digests["other_images_sha256"]) == 64


def test_experiments_of_one_process_share_other_data(raw_config: dict[str, Any]) -> None:
    shared = Shared()
    one, other = (
        build_experiment(
            parse_config(raw_config | {"evaluation": {"also": ["digits"]}, "local": {"learning_rate": rate}}),
            shared=shared,
        )
        for rate in (0.01, 0.02)
    )
    assert one.other_data["digits"] is other.other_data["digits"]


def test_what_can_not_be_evaluated_on_is_named(raw_config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"evaluation\.also: expected each once, got digits, digits"):
        parse_config(raw_config | {"evaluation": {"also": ["digits", "digits"]}})
    with pytest.raises(OptionError, match=r"evaluation\.also: expected none, because linear_head has weights"):
        check_experiment(parse_config(raw_config | {"evaluation": {"also": ["digits"]}, "adapter": "linear_head"}))
    config = parse_config(raw_config | {"evaluation": {"also": [{"name": "dtd", "root": str(tmp_path)}]}})
    with pytest.raises(UserError, match=r"evaluation\.also \(dtd\)\.root: .*: DTD is not there; expected"):
        simulate(config)
    assert not list((tmp_path / "runs").glob("*"))
