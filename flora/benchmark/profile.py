"""Where the time of a round goes: tensor operations, or the simulator's own bookkeeping. Part of `flora.benchmark`."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Sequence
from pathlib import Path

import flora
from flora.config.parse import load_config
from flora.experiment.build import build_experiment
from flora.federated.round import run_round

NUM_SHOWN = 6
OWN = str(Path(flora.__path__[0]))
BUILT_IN = "~"  # the profiler's file of what is not written in Python


def profile_round(path: str, overrides: Sequence[str] = ()) -> list[str]:
    """Run two rounds of an experiment, the second one under a profiler; return what to print.

    Tensor operations are what torch and OpenCLIP do, and the model's own layers in `flora.clip`: an operator such as
    `a * b` counts where it is written, a built-in function such as `isinstance` where it is called. Everything else is
    bookkeeping. The profiler slows Python code, not products of matrices, so bookkeeping's share is an upper bound.
    Raises `UserError` as a run would.
    """
    config = load_config(path, overrides)
    experiment = build_experiment(config)
    state, _ = run_round(experiment.federation, experiment.initial_state())
    profiler = cProfile.Profile()
    _, result = profiler.runcall(run_round, experiment.federation, state)
    stats = pstats.Stats(profiler)
    own = []
    for (file, _, name), (_, _, seconds, _, callers) in stats.stats.items():  # type: ignore[attr-defined]
        if not _is_tensor_operation(file, name):
            if file == BUILT_IN:
                seconds -= sum(times[2] for caller, times in callers.items() if _is_tensor_operation(*caller[::2]))
            own.append((seconds, f"{file.removeprefix(OWN)[1:]}: {name}" if file.startswith(OWN) else name))
    total = stats.total_tt  # type: ignore[attr-defined]
    share = sum(seconds for seconds, _ in own) / total
    lines = [
        f"{path}: a round of {result.num_clients} clients and {result.num_steps} client steps, {total:.2f} s: "
        f"tensor operations {1 - share:.1%}, bookkeeping at most {share:.1%}, most of it in"
    ]
    return lines + [f"  {seconds / total:6.2%}  {name}" for seconds, name in sorted(own, reverse=True)[:NUM_SHOWN]]


def _is_tensor_operation(file: str, name: str) -> bool:
    if file.startswith(OWN):
        return file.startswith(f"{OWN}/clip/")
    return any(part in f"{file} {name}" for part in ("torch", "Tensor", "open_clip", "run_backward"))
