"""`python -m flora.benchmark`: what a local step costs, from full fine-tuning to ours, as ratios within one run.

Weights and images are random, because cost is what is measured. Each variant runs in a process of its own, the
variants take turns, and the median of the repeats is shown.
"""

from __future__ import annotations

from flora.parsers import first_look

if __name__ == "__main__":
    first_look("benchmark")  # what is imported from here on takes seconds

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flora.benchmark.experiment import EXPERIMENTS, NUM_ROUNDS, STEPS_PER_ROUND, measure_experiment
from flora.benchmark.folding import compare_sweeps
from flora.benchmark.images import MODELS, ImageSettings, compare_images
from flora.benchmark.methods import compare_methods, measure_method
from flora.benchmark.planning import COHORT, NUM_CLIENTS, measure_planning
from flora.benchmark.processes import compare_processes, measure_rounds
from flora.benchmark.profile import profile_round
from flora.benchmark.secure_sums import compare_secure_sums
from flora.benchmark.timing import matrix_rate, timed
from flora.benchmark.tokens import compare_tokens
from flora.benchmark.variants import ROUND_STEPS, VARIANTS, Setting
from flora.clip.backbone import Backbone
from flora.core.command_line import run_program, split_arguments
from flora.core.errors import UserError
from flora.core.memory import peak_memory_bytes
from flora.core.processes import refuse_several
from flora.engine.recording import STEPS_BEFORE_RECORDING
from flora.evaluation.summary import size
from flora.parsers import benchmark_parser


@dataclass(frozen=True)
class Result:
    """What one process measured. Bytes of memory are above the imports'.

    `step_seconds` are per local step and client: a client-round of `ROUND_STEPS` steps, from the server's adapter to
    the client's, over their number.
    """

    variant: str
    step_seconds: float
    round_seconds: float
    evaluation_seconds: float
    peak_bytes: int
    device_bytes: int
    sent_bytes: int
    flops_per_second: float | None
    matmul_flops_per_second: float | None


def measure(variant: str, setting: Setting, seconds: float) -> Result:
    """Build a variant, warm it up, and time client-rounds for about `seconds`, at least one."""
    before = resident_bytes()
    step = VARIANTS[variant].build(setting)
    times: list[float] = []
    for warm_up in (1, 1) if setting.torch_device.type == "cpu" else (1, STEPS_BEFORE_RECORDING + 1):
        if timed(partial(step.run, warm_up), setting.device) > seconds:
            break
    started = time.perf_counter()
    while not times or time.perf_counter() - started < seconds:
        times.append(timed(partial(step.run, ROUND_STEPS), setting.device))
    peak = resident_peak_bytes() - before
    device_peak = peak_memory_bytes(setting.torch_device) if setting.torch_device.type == "cuda" else 0
    round_seconds = statistics.median(times) / step.num_clients
    step_seconds = round_seconds / ROUND_STEPS
    evaluation = min(timed(step.evaluate, setting.device) for _ in range(2))
    return Result(
        variant=variant,
        step_seconds=step_seconds,
        round_seconds=round_seconds,
        evaluation_seconds=evaluation,
        peak_bytes=peak,
        device_bytes=device_peak,
        sent_bytes=step.sent_bytes,
        flops_per_second=None if step.flops is None else step.flops / step_seconds,
        matmul_flops_per_second=None if step.flops is None else _text_matrix_rate(setting),
    )


def _text_matrix_rate(setting: Setting) -> float:
    shape = Backbone(model=setting.model, weights="random").architecture().text
    return matrix_rate(shape.width, shape.mlp_width, setting.device)


def resident_bytes() -> int:
    """The process's resident set now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def resident_peak_bytes() -> int:
    """The process's largest resident set so far."""
    return peak_memory_bytes(torch.device("cpu"))


@dataclass(frozen=True)
class Measurements:
    """The results of each variant, and the error messages of those that failed."""

    results: dict[str, list[Result]]
    errors: list[str]


def run_variants(setting: Setting, variants: Sequence[str], *, repeats: int, seconds: float) -> Measurements:
    """Measure each variant `repeats` times in fresh processes, in turns; one that fails is left out from then on."""
    results: dict[str, list[Result]] = {variant: [] for variant in variants}
    errors: dict[str, str] = {}
    for variant in tqdm(list(variants) * repeats, desc="processes", disable=None):
        if variant in errors:
            continue
        order = {"setting": asdict(setting), "variant": variant, "seconds": seconds, "whole": False}
        try:
            results[variant].append(Result(**_in_fresh_process(order)))
        except UserError as error:
            errors[variant] = str(error)
    return Measurements({name: rows for name, rows in results.items() if rows}, list(errors.values()))


def compare_experiments(setting: Setting, *, repeats: int) -> str:
    """A line: the median times of a whole experiment, naive and ours, each in fresh processes that take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in EXPERIMENTS}
    for name in tqdm(list(EXPERIMENTS) * repeats, desc="processes", disable=None):
        order = {"setting": asdict(setting), "variant": name, "seconds": 0, "whole": True}
        seconds[name].append(_in_fresh_process(order)["seconds"])
    naive, ours = (statistics.median(seconds[name]) for name in ("naive", "ours"))
    steps = setting.num_clients * STEPS_PER_ROUND * NUM_ROUNDS
    return (
        f"{steps} client steps of {setting.batch_size} images in {NUM_ROUNDS} rounds, with features and evaluation: "
        f"naive {naive:.1f} s, ours {ours:.1f} s, "
        + (f"{naive / ours:.1f} x faster" if naive > ours else f"{ours / naive:.1f} x slower")
    )


def _in_fresh_process(order: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "flora.benchmark", "--worker", json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        raise UserError(f"{order['variant']}: its process was killed, most likely for want of memory")
    if done.returncode != 0:
        raise UserError(f"{order['variant']}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(results: dict[str, list[Result]]) -> list[str]:
    """The results as Markdown: medians, spread, and ratios to the three loops that others write."""
    references = [name for name in ("full", "naive", "by hand") if name in results]
    median = {name: statistics.median(each.step_seconds for each in rows) for name, rows in results.items()}
    head = ["variant", "ms per step and client", "spread", *(f"x {name}" for name in references)]
    head += [f"client-round of {ROUND_STEPS} steps, s", "evaluation, ms", "peak memory", "sent"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, rows in results.items():
        steps = [each.step_seconds for each in rows]
        cells = [
            VARIANTS[name].title,
            f"{1000 * median[name]:.1f}",
            f"{1000 * min(steps):.1f} to {1000 * max(steps):.1f}",
        ]
        cells += [f"{median[reference] / median[name]:.1f}" for reference in references]
        cells += [f"{statistics.median(each.round_seconds for each in rows):.3g}"]
        cells += [f"{1000 * statistics.median(each.evaluation_seconds for each in rows):.0f}"]
        cells += [
            size(statistics.median(each.device_bytes or each.peak_bytes for each in rows)),
            size(rows[0].sent_bytes),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    counted = {name: rows for name, rows in results.items() if rows[0].flops_per_second is not None}
    if counted:
        name, last = list(counted.items())[-1]
        fractions = [(each.flops_per_second or 0) / (each.matmul_flops_per_second or 1) for each in last]
        rate = statistics.median(each.matmul_flops_per_second or 0 for each in last)
        lines += ["", f"matrix products here: {rate / 1e9:.0f} GFLOP/s; the trained path of {VARIANTS[name].title!r} "]
        lines[-1] += f"reaches {statistics.median(fractions):.0%} of that with the operations that it can't avoid"
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_program(lambda: _main(benchmark_parser().parse(argv)))


def _main(options: argparse.Namespace) -> int:
    if options.worker:
        measured = _work(json.loads(options.worker))
        if measured is not None:
            print(json.dumps(measured))
        return 0
    refuse_several("flora.benchmark")
    if options.images is not None:
        print("\n".join(compare_images(_image_settings(options), options.images, seconds=options.seconds)))
        return 0
    setting = Setting(
        model=options.model or "ViT-B-16", num_classes=options.classes, num_clients=options.clients,
        batch_size=options.batch or (8 if options.tokens else 32),
        rank=options.rank, tower=options.tower, num_layers=options.layers, targets=options.targets,
        objective=options.objective, device=options.device, precision=options.precision or "fp32",
    )  # fmt: skip
    lines = _of_experiments(options)
    if lines is not None:
        print("\n".join(lines))
        return 0
    if options.secure_sums:
        print("\n".join(compare_secure_sums(options.secure_sums)))
        return 0
    if options.planning:
        print("\n".join(compare_planning(setting)))
        return 0
    if options.whole:
        print(compare_experiments(setting, repeats=options.repeats))
        return 0
    if options.tokens is not None:
        print("\n".join(compare_tokens(setting, options.tokens, seconds=options.seconds)))
        return 0
    possible = [name for name, variant in VARIANTS.items() if variant.applies(setting)]
    usual = [name for name in possible if not VARIANTS[name].if_named]
    names = usual if options.variants is None else options.variants.split(",")
    unknown = [name for name in names if name not in possible]
    if unknown:
        raise UserError(f"--variants: {unknown[0]!r} is not one of {', '.join(possible)}")
    measurements = run_variants(setting, names, repeats=options.repeats, seconds=options.seconds)
    if measurements.results:
        print("\n".join(table(measurements.results)))
        if options.json is not None:
            rows = {name: [asdict(each) for each in rows] for name, rows in measurements.results.items()}
            options.json.write_text(json.dumps({"setting": asdict(setting), "results": rows}, indent=2) + "\n")
    if measurements.errors:
        raise UserError("; ".join(measurements.errors))
    return 0


def _of_experiments(options: argparse.Namespace) -> list[str] | None:
    """What is measured of experiments that their configurations describe; None where that isn't asked for."""
    if options.profile:
        return profile_round(options.profile, options.overrides)
    if options.sweep:
        return compare_sweeps(options.sweep, options.overrides)
    if options.processes:
        return compare_processes(options.processes, options.overrides)
    if options.methods:
        paths, overrides = split_arguments([*options.methods, *options.overrides])
        return compare_methods([*map(Path, paths)], overrides, _in_fresh_process, options.repeats)
    if options.overrides:
        of_configs = "(--profile, --sweep, --processes, --methods)"
        raise UserError(f"{options.overrides[0]}: belongs to a CONFIG {of_configs}; see --help")
    return None


def _image_settings(options: argparse.Namespace) -> ImageSettings:
    return ImageSettings(
        models=(options.model,) if options.model else MODELS,
        precisions=(options.precision,) if options.precision else ("fp32", "bf16"),
        batch_size=options.batch or 32,
        device=options.device,
    )


def compare_planning(setting: Setting) -> list[str]:
    """Lines: what a round costs besides training with few clients, and with a million."""
    orders = [{"setting": asdict(setting), "variant": "planning", "planning": number} for number in NUM_CLIENTS]
    few, many = (_in_fresh_process(order) for order in orders)
    lines = [
        f"{number:,} clients, {min(COHORT, number):,} in a round: dealt out in {row['dealing_seconds']:.1f} s, a round "
        f"planned in {row['planning_seconds']:.4f} s, finished in {row['finishing_seconds']:.4f} s, of which the "
        f"aggregation error takes {row['error_seconds']:.4f} s, peak memory {size(row['peak_bytes'])}"
        for number, row in zip(NUM_CLIENTS, (few, many), strict=True)
    ]
    seconds, memory = (many[name] - few[name] for name in ("planning_seconds", "peak_bytes"))
    return [*lines, f"more: {seconds:.4f} s to plan a round, {size(memory)}"]


def _work(order: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a process of its own measures; None in the second and later of several."""
    if "processes" in order:
        return measure_rounds(order["processes"], order["overrides"])
    if "method" in order:
        return measure_method(order["method"], order["overrides"], order["rounds"])
    setting = Setting(**order["setting"])
    if "planning" in order:
        return measure_planning(setting, order["planning"])
    if order["whole"]:
        return {"seconds": measure_experiment(order["variant"], setting)}
    return asdict(measure(order["variant"], setting, order["seconds"]))


if __name__ == "__main__":
    sys.exit(main())
