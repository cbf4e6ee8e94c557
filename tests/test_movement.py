"""How far clients move and drift apart is what the definitions say, of the updates that are averaged."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TOLERANCE

from flora.config.parse import parse_config
from flora.core import tree
from flora.core.hooks import Hooks
from flora.core.states import ClientUpdate
from flora.federated.movement import Movement, movement_of
from flora.simulate import simulate


def moved(*vectors: list[float]) -> Movement:
    return movement_of([{"a": torch.tensor(vector[:1]), "b": torch.tensor([vector[1:]])} for vector in vectors])


def test_movement_by_hand() -> None:
    assert moved([3.0, 0.0, 4.0]) == Movement(5.0, None)
    assert moved() == Movement(None, None)
    assert moved([0.0, 0.0], [0.0, 0.0]) == Movement(0.0, None)
    assert moved([1.0, 0.0], [-1.0, 0.0]) == Movement(1.0, 1.0)
    apart = moved([1.0, 0.0], [0.0, 1.0])
    assert apart.client_drift == pytest.approx(0.5**0.5)
    alike = moved([0.1, 0.7], [0.1, 0.7], [0.1, 0.7])
    assert alike.delta_norm == pytest.approx(0.5**0.5) and alike.client_drift == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("number", [1, 4, 7, 100])
def test_it_is_the_same_of_parts_of_any_size(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = [{"a": torch.randn(7, generator=torch.Generator().manual_seed(seed)).double()} for seed in range(3)]
    whole = torch.stack([delta["a"] for delta in deltas])
    apart = (whole - whole.mean(dim=0)).square().sum().sqrt() / whole.square().sum().sqrt()
    monkeypatch.setattr(tree, "MAX_TOGETHER", number)
    found = movement_of(deltas)
    assert found.delta_norm == pytest.approx(float(whole.norm(dim=1).mean()), abs=TOLERANCE)
    assert found.client_drift == pytest.approx(float(apart), abs=TOLERANCE)


def test_a_round_records_the_movement_of_what_is_averaged(raw_config: dict[str, Any]) -> None:
    seen: list[np.ndarray] = []

    def update(round: int, update: ClientUpdate) -> ClientUpdate:
        if update.client == 1:
            return replace(update, delta=tree.scale(update.delta, math.nan))
        if round == 2:
            seen.append(tree.flatten(update.delta).numpy())
        return update

    raw = {**raw_config, "backbone": {**raw_config["backbone"], "precision": "fp64"}}
    records = simulate(parse_config(raw), hooks=Hooks(update=update)).records
    assert records[0].delta_norm is None and records[0].client_drift is None
    norms = np.array([np.linalg.norm(delta) for delta in seen])
    apart = np.array([np.linalg.norm(delta - np.mean(seen, axis=0)) for delta in seen])
    assert len(seen) == 3 and 0 < records[2].client_drift < 1
    assert records[2].delta_norm == pytest.approx(norms.mean(), abs=TOLERANCE)
    assert records[2].client_drift == pytest.approx((apart**2).mean() ** 0.5 / (norms**2).mean() ** 0.5, abs=TOLERANCE)
