"""Add up the records of a finished run, and format the table and the final line that it prints."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from flora.config.parse import config_to_dict
from flora.config.schema import ExperimentConfig
from flora.core.records import RoundRecord, Summary
from flora.core.registry import Component, name_of

# What the summary takes over from the last round's record.
COPIED = (
    *(
        f"{whose}_accuracy_{figure}"
        for whose in ("client", "personal")
        for figure in ("mean", "std", "worst_decile", "best_decile", "weighted_mean")
    ),
    "new_accuracy",
    "harmonic_mean",
    "broadcast_accuracy",
    "model_privacy_gap",
    "domain_accuracy",
)


def summarise(records: Sequence[RoundRecord], *, alone: Sequence[float], **measured: Any) -> Summary:
    """Add a run up. `measured` are the fields of `Summary` that the records don't hold."""
    evaluated = [(record.accuracy, -record.round) for record in records if record.accuracy is not None]
    best_accuracy, negative_round = max(evaluated)
    last = records[-1]
    uplink = sum(record.uplink_bytes for record in records)
    client_rounds = sum(record.num_clients + record.num_late for record in records)
    clock = list(itertools.accumulate(record.simulated_seconds or 0.0 for record in records))
    errors = [record.aggregation_error for record in records if record.aggregation_error is not None]
    assert records[0].accuracy is not None and last.accuracy is not None  # rounds 0 and last are always evaluated
    return Summary(
        rounds=last.round,
        zero_shot_accuracy=records[0].accuracy,
        last_accuracy=last.accuracy,
        best_accuracy=best_accuracy,
        best_round=-negative_round,
        alone_accuracy_mean=sum(alone) / len(alone) if alone else None,
        alone_accuracy_best=max(alone, default=None),
        num_alone=len(alone),
        **{name: getattr(last, name) for name in COPIED},
        zero_shot_new_accuracy=records[0].new_accuracy,
        simulated_seconds=None if records[-1].simulated_seconds is None else clock[-1],
        seconds_to_accuracy=_seconds_to_accuracy(records, clock) if records[-1].simulated_seconds is not None else None,
        num_dropped=sum(record.num_dropped for record in records),
        num_late=sum(record.num_late for record in records),
        aggregation_error_mean=sum(errors) / len(errors) if errors else None,
        total_uplink_bytes=uplink,
        total_downlink_bytes=sum(record.downlink_bytes for record in records),
        uplink_bytes_per_client_round=uplink / client_rounds if client_rounds else 0.0,
        train_seconds=sum(record.train_seconds for record in records),
        eval_seconds=sum(record.eval_seconds for record in records),
        num_rejected=sum(len(record.rejected_clients) for record in records),
        **measured,
    )


def _seconds_to_accuracy(records: Sequence[RoundRecord], clock: Sequence[float]) -> dict[str, float]:
    """When each tenth of accuracy was first reached, above that of the frozen model."""
    reached: dict[str, float] = {}
    for tenth in range(1, 11):
        times = [
            seconds
            for record, seconds in zip(records, clock, strict=True)
            if record.accuracy is not None and record.accuracy >= tenth / 10
        ]
        if times and times[0] > 0:
            reached[f"{tenth / 10:.1f}"] = times[0]
    return reached


def lines(summary: Summary, config: ExperimentConfig) -> list[str]:
    """The table and the final line that a run ends with."""
    rows = [
        ("zero-shot", percent(summary.zero_shot_accuracy)),
        ("last round", f"{percent(summary.last_accuracy)}   (the result)"),
        ("best round", f"{percent(summary.best_accuracy)}   (round {summary.best_round}; chosen on the test set)"),
    ]
    if summary.broadcast_accuracy is not None:
        points = 100 * (summary.model_privacy_gap or 0)
        gap = f"(what clients read; {abs(points):.1f} points {'less' if points >= 0 else 'more'} than the server has)"
        rows.append(("last broadcast", f"{percent(summary.broadcast_accuracy)}   {gap}"))
    if summary.new_accuracy is not None:
        frozen = f"(zero-shot {percent(summary.zero_shot_new_accuracy)}; nobody trained on them)"
        rows.append(("classes set aside", f"{percent(summary.new_accuracy)}   {frozen}"))
        rows.append(("harmonic mean", f"{percent(summary.harmonic_mean)}   (of the last round and the line above)"))
    for whose, title in (("client", "on clients' own data"), ("personal", "personal adapters")):
        mean, std, worst, best = (
            getattr(summary, f"{whose}_accuracy_{figure}") for figure in ("mean", "std", "worst_decile", "best_decile")
        )
        if mean is not None:
            spread = f"(std {percent(std)}, worst tenth {percent(worst)}, best tenth {percent(best)})"
            rows.append((title, f"{percent(mean)}   {spread}"))
    if summary.domain_accuracy:
        (worst, low), *_, (best, high) = sorted(summary.domain_accuracy.items(), key=lambda pair: pair[1])
        rows.append(("by domain", f"worst {worst} {percent(low)}, best {best} {percent(high)}   (of the test images)"))
    if summary.alone_accuracy_mean is not None:
        note = f"(mean of {summary.num_alone}; the best {percent(summary.alone_accuracy_best)})"
        rows.append(("one client alone", f"{percent(summary.alone_accuracy_mean)}   {note}"))
    if summary.held_out_num_clients:
        rows.append(("together or alone", _comparison(summary)))
    rows += [
        ("trained parameters", _trained(summary)),
        ("sent up, down", f"{size(summary.total_uplink_bytes)}, {size(summary.total_downlink_bytes)}"),
        ("training, evaluation", f"{summary.train_seconds:.1f} s, {summary.eval_seconds:.1f} s"),
        ("whole run", f"{summary.wall_seconds:.1f} s, peak memory {size(summary.peak_memory_bytes)}"),
    ]
    if summary.simulated_seconds is not None:
        *_, (accuracy, seconds) = (summary.seconds_to_accuracy or {"": 0.0}).items()
        reached = f"; {percent(float(accuracy))} after {duration(seconds)}" if accuracy else ""
        lost = f"{summary.num_dropped} dropped out, {summary.num_late} late"
        rows.insert(-2, ("simulated time", f"{duration(summary.simulated_seconds)}   ({lost}{reached})"))
    if summary.num_rejected:
        rows.insert(-3, ("updates left out", f"{summary.num_rejected}   (rounds.jsonl says why)"))
    width = max(len(title) for title, _ in rows)
    return ["", *(f"  {title:<{width}}  {value}" for title, value in rows), "", final_line(summary, config)]


def _comparison(summary: Summary) -> str:
    """What the clients that were also trained alone reach on their own held-out examples, together and alone."""
    found = {
        "federated": summary.held_out_federated_accuracy,
        "personal": summary.held_out_personal_accuracy,
        "alone": summary.held_out_alone_accuracy,
    }
    figures = ", ".join(f"{how} {percent(accuracy)}" for how, accuracy in found.items() if accuracy is not None)
    number = summary.held_out_num_clients
    return f"on clients' own data: {figures}   ({number} client{'s' if number != 1 else ''})"


def _trained(summary: Summary) -> str:
    trained, of_all = summary.trainable_parameters, summary.backbone_parameters
    return f"{trained:,} of {of_all:,}" + (f"   ({of_all // trained:,} x fewer)" if trained < of_all else "")


def final_line(summary: Summary, config: ExperimentConfig) -> str:
    """The run in one line: what it began with, what it reached, between whom, and at what price."""
    before, after = percent(summary.zero_shot_accuracy), percent(summary.last_accuracy)
    clients = f"{summary.num_clients} client{'s' if summary.num_clients != 1 else ''}, {describe(config.partition)}"
    rounds = f"{summary.rounds} round{'s' if summary.rounds != 1 else ''}"
    line = f"zero-shot {before} -> {after} in {rounds}; {clients}"
    if summary.num_clients > 1 and summary.rounds:
        line += f"; {size(summary.uplink_bytes_per_client_round)} up per client and round; no image left a client"
    return line


def describe(component: Component) -> str:
    """A component's name and the options that differ from their defaults: "dirichlet (concentration 0.3)"."""
    defaults = {name: field.default for name, field in component.__dataclass_fields__.items()}
    options = {
        key: value
        for key, value in config_to_dict(component).items()
        if key != "name" and getattr(component, key) != defaults[key]
    }
    text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in options.items())
    return f"{name_of(component)} ({text})" if text else name_of(component)


def percent(fraction: float | None) -> str:
    """0.847 as "84.7 %"; a dash for None."""
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def duration(seconds: float) -> str:
    """Seconds in the largest unit of which there is one: "3.5 h"."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def size(num_bytes: float) -> str:
    """Bytes in decimal units: "24.1 KB"."""
    for unit in ("B", "KB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
