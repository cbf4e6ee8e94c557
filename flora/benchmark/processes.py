"""What several processes bring in the rounds of an experiment, against one that has as many threads."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from flora.config.parse import load_config
from flora.core.errors import UserError
from flora.core.processes import Message, Processes
from flora.engine.engine import Engine
from flora.engine.tasks import ClientResult, ClientTask
from flora.evaluation.summary import size
from flora.experiment.build import build_experiment
from flora.federated.round import run_round
from flora.runs.measure import measure

# Rounds that are measured, after one that is not.
NUM_ROUNDS = 5


@dataclass(eq=False)
class TimedEngine(Engine):
    """An engine that adds up the seconds of training: in all, and those of its own blocks."""

    train_seconds: float = 0.0
    block_seconds: list[float] = field(default_factory=list)

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        results = super().train(tasks)
        while True:
            started = time.perf_counter()
            result = next(results, None)
            self.train_seconds += time.perf_counter() - started
            if result is None:
                return
            yield result

    def _train_block(self, tasks: Sequence[ClientTask], advance: Callable[[int], object]) -> list[ClientResult]:
        started = time.perf_counter()
        try:
            return super()._train_block(tasks, advance)
        finally:
            self.block_seconds.append(time.perf_counter() - started)


def compare_processes(path: str, overrides: Sequence[str]) -> list[str]:
    """Lines: a round of an experiment by one process with N threads, and by N with one thread, N being the cores."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    costs = {each: _measured(path, overrides, each, number // each) for each in (1, number)}
    lines = []
    for each, row in costs.items():
        lines.append(
            f"{each} x {number // each} threads: a round takes {row['round']:.3f} s: training {row['train']:.3f} s, of "
            f"which {row['busy']:.3f} s in blocks, evaluation {row['evaluation']:.3f} s, planning and aggregation "
            f"{row['rest']:.3f} s; {size(row['bytes'])} exchanged, blocks of up to {row['clients_per_block']:.0f}"
        )
    one, many = costs[1], costs[number]
    return [
        *lines,
        f"{number} processes against one: {one['round'] / many['round']:.2f} x in a round, "
        f"{one['train'] / many['train']:.2f} x in training; planning and aggregation, which all do, are "
        f"{many['rest'] / many['round']:.1%} of a round",
    ]


def _measured(path: str, overrides: Sequence[str], number: int, threads: int) -> dict[str, float]:
    order = json.dumps({"processes": path, "overrides": [*overrides, f"threads={threads}"]})
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"] if number > 1 else []
    command = [sys.executable, *starter, "-m", "flora.benchmark", "--worker", order]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError((done.stderr.strip().splitlines() or ["failed"])[0])
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_rounds(path: str, overrides: Sequence[str]) -> dict[str, Any] | None:
    """Run some rounds of an experiment; return median seconds and bytes of a round in process 0, None in the others."""
    with Processes.of_environment() as processes:
        config = load_config(path, [*overrides, f"rounds={NUM_ROUNDS + 1}"])
        torch.set_num_threads(config.threads or 1)
        experiment = build_experiment(config, processes=processes)
        plain = experiment.federation.engine
        engine = TimedEngine(**{each.name: getattr(plain, each.name) for each in fields(Engine)})
        experiment = replace(experiment, federation=replace(experiment.federation, engine=engine))
        state, rows = experiment.initial_state(), []
        for _ in range(NUM_ROUNDS + 1):
            engine.train_seconds, engine.block_seconds, num_bytes = 0.0, [], processes.num_bytes
            processes.exchange(Message())
            started = time.perf_counter()
            state, result = run_round(experiment.federation, state)
            after = time.perf_counter()
            measure(experiment, state, result)
            ended = time.perf_counter()
            rows.append(
                {
                    "round": ended - started,
                    "train": engine.train_seconds,
                    "busy": sum(engine.block_seconds),
                    "evaluation": ended - after,
                    "rest": after - started - engine.train_seconds,
                    "bytes": processes.num_bytes - num_bytes,
                    "clients_per_block": engine.clients_per_block,
                }
            )
    medians = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    return medians if processes.is_first else None
