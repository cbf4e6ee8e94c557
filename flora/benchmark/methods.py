"""What a local step of each method costs, here and as its authors write it. Part of `flora.benchmark`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flora.config.parse import load_config
from flora.core.errors import UserError
from flora.evaluation.summary import size
from flora.experiment.build import build_experiment
from flora.federated.round import run_round

# One client at a time, both towers at each step, prompts as long as the model reads: what the authors' programs do.
AS_WRITTEN = (
    "cache.enabled=false",
    "speed.cut_prompts=false",
    "speed.share_prefixes=false",
    "speed.trim_last_block=false",
    "speed.batch_classes=false",
    "speed.share_first_step=false",
    "speed.cuda_graphs=false",
    "clients.per_block=1",
    "clients.cohort={number: 1}",
    "local.steps=1",
)
OURS = ("local.steps=3",)


@dataclass(frozen=True)
class MethodCost:
    """Seconds of a local step and client, bytes that a client sends, and numbers that it trains."""

    step_seconds: float
    sent_bytes: int
    num_trained: int


def measure_method(path: str, overrides: Sequence[str], num_rounds: int) -> dict[str, Any]:
    """Train some rounds of an experiment after one that isn't counted; return the fields of their `MethodCost`."""
    config = load_config(path, [*overrides, f"rounds={num_rounds + 1}", "evaluation.num_local_only=0"])
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    experiment = build_experiment(config)
    state, seconds = experiment.initial_state(), []
    for _ in range(num_rounds + 1):
        state, result = run_round(experiment.federation, state)
        seconds.append(result.train_seconds / result.num_steps)
    trained = experiment.federation.roles.trained(state.adapter, state.round)
    return {
        "step_seconds": statistics.median(seconds[1:]),
        "sent_bytes": result.uplink_bytes // result.num_clients,
        "num_trained": sum(state.adapter[name].numel() for name in trained),
    }


def compare_methods(
    paths: Sequence[Path], overrides: Sequence[str], work: Callable[[dict[str, Any]], dict[str, Any]], repeats: int
) -> list[str]:
    """Measure each experiment both ways `repeats` times, in turns, by `work`; return a Markdown table of medians."""
    if not paths:
        raise UserError("--methods: expected the YAML files of experiments, such as experiments/paper/lora.yaml")
    costs: dict[tuple[Path, str], list[MethodCost]] = {}
    # As written a step takes seconds: two rounds, of which one counts, are enough.
    ways = (("written", AS_WRITTEN, 1), ("ours", OURS, 3))
    for path, (way, settings, num_rounds) in tqdm(
        [*itertools.product(paths, ways)] * repeats, "processes", disable=None
    ):
        order = {"variant": f"{path}, {way}", "method": str(path), "rounds": num_rounds}
        costs.setdefault((path, way), []).append(MethodCost(**work({**order, "overrides": [*overrides, *settings]})))
    head = ["method", "trained numbers", "sent", "ms per step and client, as written", "ours", "x"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for path in paths:
        written, ours = (
            statistics.median(each.step_seconds for each in costs[path, way]) for way in ("written", "ours")
        )
        first = costs[path, "ours"][0]
        cells = [path.stem, f"{first.num_trained:,}", size(first.sent_bytes), f"{1000 * written:,.0f}"]
        times = written / ours
        cells += [f"{1000 * ours:,.1f}", f"{times:,.0f}" if times >= 10 else f"{times:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
