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
from flora.client.local_training import LocalTraining
from flora.communication.participation import Participation
from flora.communication.sampling import Uniform
from flora.config.parse import parse_config
from flora.core.rng import Rng
from flora.core.states import ServerState
from flora.engine.engine import Engine
from flora.experiment.clients import deal_out
from flora.features.features import StoredFeatures
from flora.federated.federation import Federation
from flora.federated.round import run_round
from flora.federated.synchronous import Synchronous

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
        clients = deal_out(config, labels, None, Rng(0)).clients
        federation = Federation(
            engine=Engine(model, features, 32),
            clients=clients,
            participation=Participation(Uniform(number=50), np.array([len(client.train) for client in clients])),
            local=LocalTraining(steps=1, batch_size=4),
            schedule=Synchronous(),
            num_rounds=3,
            rng=Rng(0),
        )
        state = ServerState(0, model.adapter.initial_state(Rng(1)))
        for _ in range(2):
            state, _ = run_round(federation, state)
        profiler = cProfile.Profile()
        profiler.runcall(run_round, federation, state)
        calls[number] = pstats.Stats(profiler).total_calls  # type: ignore[attr-defined]
        added[number] = resident_bytes() - before
    assert added[100_000] < 200e6
    assert calls[100_000] < 1.05 * calls[50]
