"""A hundred thousand virtual clients cost no more than their lists of examples, and nothing in a round."""

from __future__ import annotations

import cProfile
import pstats
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CLASSES, adapt

from flora.benchmark.__main__ import resident_bytes
from flora.client.training import LocalTraining
from flora.communication.sampling import Uniform
from flora.config.parse import parse_config
from flora.core.records import ServerState
from flora.core.rng import Rng
from flora.experiment import deal_out
from flora.features.features import StoredFeatures
from flora.federated.federation import Federation
from flora.federated.round import run_round
from flora.server.strategies.averaging import FedAvg

NUM_EXAMPLES = 200_000


@pytest.mark.parametrize("partition", ["iid", {"name": "dirichlet", "concentration": 0.5, "minimum_examples": 1}])
def test_clients_that_do_not_take_part_cost_nothing(
    tiny_model: str, raw_config: dict[str, Any], partition: Any
) -> None:
    labels = np.arange(NUM_EXAMPLES) % len(CLASSES)
    model = adapt(tiny_model)
    stem = torch.randn(NUM_EXAMPLES, 16)
    features = StoredFeatures(stem, torch.arange(NUM_EXAMPLES), torch.from_numpy(labels), np.arange(NUM_EXAMPLES))
    calls, added = {}, {}
    for number in (50, 100_000):
        before = resident_bytes()
        config = parse_config({**raw_config, "clients": {"number": number}, "partition": partition})
        federation = Federation(
            model=model,
            features=features,
            clients=deal_out(config, labels, None, Rng(0)),
            local=LocalTraining(steps=1, batch_size=4),
            sampler=Uniform(number=50),
            strategy=FedAvg(),
            num_rounds=3,
            clients_per_block=32,
            rng=Rng(0),
        )
        state = ServerState(0, model.adapter.initial_state(Rng(1)), {})
        for _ in range(2):
            state, _ = run_round(federation, state)
        profiler = cProfile.Profile()
        profiler.runcall(run_round, federation, state)
        calls[number] = pstats.Stats(profiler).total_calls  # type: ignore[attr-defined]
        added[number] = resident_bytes() - before
    assert added[100_000] < 200e6
    assert calls[100_000] < 1.05 * calls[50]
