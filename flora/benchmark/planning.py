"""What planning a round costs, by how many virtual clients there are. Part of `flora.benchmark`."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from flora.benchmark.variants import TEMPLATE, Setting
from flora.client.local_training import LocalTraining
from flora.clip.towers.towers import AdaptedClip
from flora.communication.participation import Participation
from flora.communication.sampling import Uniform
from flora.core.memory import peak_memory_bytes
from flora.core.rng import Rng
from flora.core.states import ClientData
from flora.data.partition import Iid
from flora.engine.engine import Engine
from flora.experiment.clients import hold_out
from flora.features.features import StoredFeatures
from flora.federated.federation import Federation
from flora.federated.synchronous import Synchronous

NUM_CLIENTS, COHORT, NUM_ROUNDS = (10, 1_000_000), 1000, 20
EXAMPLES_PER_CLIENT = 2


def measure_planning(setting: Setting, num_clients: int) -> dict[str, Any]:
    """Deal examples out to so many clients, and plan rounds: seconds, and bytes of memory at the peak."""
    clip = setting.load()
    model = AdaptedClip(clip, setting.lora().attach(clip), class_names=setting.class_names, templates=(TEMPLATE,))
    number = num_clients * EXAMPLES_PER_CLIENT
    labels = np.arange(number) % setting.num_classes
    # Stem outputs are none of planning's business: all images have one row.
    features = StoredFeatures(
        torch.zeros(1, 1), torch.zeros(number, dtype=torch.int64), torch.from_numpy(labels), np.arange(number)
    )
    rng, started = Rng(0), time.perf_counter()
    parts = Iid().split(labels, num_clients, rng.child("partition"))
    clients: list[ClientData] = [hold_out(part, 0.0, rng) for part in parts]
    dealing = time.perf_counter() - started
    cohort = Uniform(number=min(COHORT, num_clients))
    federation = Federation(
        engine=Engine(model, features, 32),
        clients=clients,
        participation=Participation(cohort, np.array([len(client.train) for client in clients])),
        local=LocalTraining(batch_size=setting.batch_size),
        schedule=Synchronous(),
        num_rounds=NUM_ROUNDS,
        rng=rng,
    )
    state = federation.initial_state(model.initial_adapter(rng))
    seconds = []
    for round in range(NUM_ROUNDS):
        started = time.perf_counter()
        plan = federation.schedule.plan(federation, replace(state, round=round))
        seconds.append(time.perf_counter() - started)
        assert len(plan.tasks) == cohort.number
    return {
        "dealing_seconds": dealing,
        "planning_seconds": statistics.median(seconds),
        "peak_bytes": peak_memory_bytes(torch.device("cpu")),
    }
