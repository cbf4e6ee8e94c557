"""What a round costs besides training, by how many virtual clients there are. Part of `flora.benchmark`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from flora.benchmark.variants import TEMPLATE, Setting
from flora.client.local_training import LocalTraining
from flora.clip.towers.towers import AdaptedClip
from flora.communication.participation import Participation
from flora.communication.sampling import Uniform
from flora.core import tree
from flora.core.low_rank import aggregation_error
from flora.core.memory import peak_memory_bytes
from flora.core.rng import Rng
from flora.core.states import FRESH, ClientData, ServerState
from flora.core.tree import Moved, StateLike
from flora.data.partition import Iid
from flora.engine.engine import Engine
from flora.engine.tasks import ClientResult, ClientTask
from flora.experiment.clients import hold_out
from flora.features.features import StoredFeatures
from flora.federated.federation import Federation
from flora.federated.round import run_round
from flora.federated.synchronous import Synchronous

NUM_CLIENTS, COHORT, NUM_ROUNDS, NUM_FINISHED = (10, 1_000_000), 1000, 20, 5
EXAMPLES_PER_CLIENT = 2


class Prepared(Engine):
    """Hands out results that were made before, so that a round is all but its training."""

    results: Sequence[ClientResult] = ()

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        return iter(self.results[: len(tasks)])


def measure_planning(setting: Setting, num_clients: int) -> dict[str, Any]:
    """Deal examples out to so many clients, plan rounds, and finish them: seconds, and bytes of memory at the peak.

    The peak is that of dealing out and planning. Rounds are finished with results whose adapters are random numbers.
    """
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
    engine = Prepared(model, features, 32)
    federation = Federation(
        engine=engine,
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
    peak_bytes = peak_memory_bytes(torch.device("cpu"))
    engine.results = _results(state.adapter, federation.schedule.plan(federation, state).tasks)
    return {
        "dealing_seconds": dealing,
        "planning_seconds": statistics.median(seconds),
        "finishing_seconds": _finishing_seconds(federation, state),
        "error_seconds": _error_seconds(state, engine.results),
        "peak_bytes": peak_bytes,
    }


def _results(adapter: StateLike, tasks: Sequence[ClientTask]) -> list[ClientResult]:
    """Return a result for each task: its adapter is the server's, moved by random numbers."""
    generator, start = Rng(0).torch(), tree.flat(adapter)
    moved = start.vector + 0.01 * torch.randn(len(tasks), len(start.vector), generator=generator)
    return [
        ClientResult(task.client, each, 1.0, 1, None, FRESH, {})
        for task, each in zip(tasks, start.layout.rows(moved.to(start.vector.dtype)), strict=True)
    ]


def _finishing_seconds(federation: Federation, state: ServerState) -> float:
    """How long a round takes besides planning and training: the median of a few."""
    seconds = []
    for _ in range(NUM_FINISHED):
        started = time.perf_counter()
        federation.schedule.plan(federation, state)
        planned = time.perf_counter()
        run_round(federation, state)
        seconds.append(time.perf_counter() - planned - (planned - started))
    return statistics.median(seconds)


def _error_seconds(state: ServerState, results: Sequence[ClientResult]) -> float:
    """How long the aggregation error of a round takes, which is a part of finishing it: the median of a few."""
    ends = [Moved(state.adapter, tree.subtract(tree.flat(result.adapter), state.adapter)) for result in results]
    seconds = []
    for _ in range(NUM_FINISHED):
        started = time.perf_counter()
        aggregation_error(ends, [1.0] * len(ends), state.adapter)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
