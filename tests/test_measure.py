"""When a run measures what, and that round 0 is the frozen model wherever it is measured."""

from __future__ import annotations

import csv
from typing import Any

import pytest

from flora.config import parse_config
from flora.simulate import simulate


def client_accuracies(raw: dict[str, Any]) -> list[str]:
    result = simulate(parse_config(raw))
    with (result.directory / "clients.csv").open(newline="") as file:
        return [row["accuracy"] for row in csv.DictReader(file)]


def test_without_rounds_clients_meet_the_frozen_model(raw_config: dict[str, Any]) -> None:
    """CLIP-Adapter's random start changes the model at once, LoRA's doesn't: both must report the same model."""
    raw = {**raw_config, "rounds": 0, "data": {"name": "patterns", "num_train": 240, "num_classes": 8}}
    lora = client_accuracies({**raw, "name": "lora"})
    assert any(float(cell) not in (0.0, 1.0) for cell in lora)
    assert client_accuracies({**raw, "name": "clip_adapter", "adapter": {"name": "clip_adapter", "ratio": 1.0}}) == lora


@pytest.mark.parametrize("every", [1, 2, 5])
def test_clients_are_measured_when_they_are_due(raw_config: dict[str, Any], every: int) -> None:
    raw = {**raw_config, "rounds": 7, "evaluation": {"every": 3, "clients_every": every}}
    records = simulate(parse_config(raw)).records
    assert [record.round for record in records if record.accuracy is not None] == [0, 3, 6, 7]
    due = [round for round in range(1, 8) if round % every == 0 or round == 7]
    assert [record.round for record in records if record.client_accuracy_mean is not None] == due
