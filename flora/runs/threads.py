"""How many threads a CPU operation has: fewer where another process competes for the cores and that is clearly faster.

OpenMP's threads wait for each other actively, so where one of them has to share its core, all of them wait at each of a
step's hundreds of operations.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from flora.client.corrections import NoCorrection
from flora.core.processes import Message, Processes
from flora.core.rng import Rng
from flora.engine.engine import Engine
from flora.experiment.build import Experiment
from flora.features.features import StoredFeatures

# Clients of a step that is timed, and how often it is.
NUM_CLIENTS, NUM_TIMES = 4, 3
# Fewer threads must be so many times as fast.
CLEARLY = 1.5
# Looks at what runs, and the seconds between two.
NUM_LOOKS, SECONDS_BETWEEN = 5, 0.02


def choose_threads(experiment: Experiment, log: Callable[[str], object]) -> None:
    """Set PyTorch's number of threads to fewer, if others are at work on this machine and that is clearly faster.

    On a machine that is idle, or can't say what runs on it, nothing is timed and nothing changes.
    """
    most, step = torch.get_num_threads(), _training_step(experiment)
    if most == 1 or step is None or num_others_running() < 1:
        return
    seconds = {}
    number = most
    while number:
        torch.set_num_threads(number)
        seconds[number] = seconds_of(step)
        number //= 2
    fastest = min(seconds, key=lambda each: seconds[each])
    chosen = fastest if seconds[most] > CLEARLY * seconds[fastest] else most
    torch.set_num_threads(chosen)
    times = ", ".join(f"{1000 * each:.0f} ms with {number}" for number, each in seconds.items())
    log(f"threads: {chosen} of {most}, because other processes are at work here: a step took {times}; or set `threads`")


def shared_threads(processes: Processes, asked: int | None) -> int:
    """Return how many threads each of several processes has: as process 0 was `asked` to, or its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    number: int = processes.first(lambda: Message(asked or max(1, cores // processes.local_size))).fields
    return number


def seconds_of(step: Callable[[], object]) -> float:
    """The mean seconds that a step takes, after one that is not counted."""
    step()
    started = time.perf_counter()
    for _ in range(NUM_TIMES):
        step()
    return (time.perf_counter() - started) / NUM_TIMES


def num_others_running() -> float:
    """Return how many threads of other processes run at this moment, or want to; 0 where the system doesn't say."""
    counts = []
    for _ in range(NUM_LOOKS):
        try:
            counts.append(int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return 0.0
        time.sleep(SECONDS_BETWEEN)
    return sum(counts) / len(counts)


def _training_step(experiment: Experiment) -> Callable[[], object] | None:
    """Build what trains some clients for a step and forgets it; None on CUDA, and where each step reads images."""
    federation, config = experiment.federation, experiment.config
    engine = federation.engine
    if engine.model.device.type != "cpu" or not isinstance(engine.features, StoredFeatures) or not config.rounds:
        return None
    number = min(NUM_CLIENTS, engine.clients_per_block, len(federation.clients))
    local = replace(config.local, correction=NoCorrection(), epochs=1, steps=1)
    trained = federation.roles.trained(experiment.initial_adapter, round=1)
    setup = replace(federation.setup(1, trained, local), learning_rate=1e-6, width=local.batch_size)
    tasks = [federation.task(client, experiment.initial_adapter, setup, Rng(0)) for client in range(number)]
    # Those that a step sees: before it, things are computed of all examples of a task.
    tasks = [replace(task, examples=task.examples[: local.batch_size]) for task in tasks]
    quiet = Engine(engine.model, engine.features, clients_per_block=number)
    return lambda: list(quiet.train(tasks))
