"""Add up the records of a finished run, and format the table and the final line that it prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flora.config.parse import config_to_dict
from flora.config.schema import ExperimentConfig
from flora.core.counts import counted
from flora.core.records import RoundRecord, Summary
from flora.core.registry import Component, name_of
from flora.evaluation.metrics import FIGURES, summed_up


def summarise(records: Sequence[RoundRecord], **measured: Any) -> Summary:
    """Add a run up. `measured` are the figures that the records don't hold."""
    assert records[0].accuracy is not None and records[-1].accuracy is not None  # rounds 0 and last are evaluated
    return Summary(summed_up(records, measured))


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
    if summary.local_only_accuracy_mean is not None:
        note = f"(mean of {summary.num_local_only}; the best {percent(summary.local_only_accuracy_best)})"
        rows.append(("one client alone", f"{percent(summary.local_only_accuracy_mean)}   {note}"))
    if summary.centralized_accuracy is not None:
        rows.append(("all in one place", f"{percent(summary.centralized_accuracy)}   (one client with all images)"))
    if summary.held_out_num_clients:
        rows.append(("together or alone", _comparison(summary)))
    rows += own_rows(summary)
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


def own_rows(summary: Summary) -> list[tuple[str, str]]:
    """The figures that are declared with a row of their own in the final table."""
    declared = [(figure.row, figure.unit, summary.figures[name]) for name, figure in FIGURES.items() if figure.row]
    return [(title, shown(unit, value)) for title, unit, value in declared if value is not None]


def shown(unit: str, value: Any) -> str:
    """A figure in a table: "84.7 %", "24.1 KB", "3.5 h", "0.613"."""
    formats = {"fraction": percent, "points": percent, "bytes": size, "seconds": duration, "count": "{:,.0f}".format}
    return str(formats[unit](value)) if unit in formats else f"{value:.3g}" if isinstance(value, float) else str(value)


def _comparison(summary: Summary) -> str:
    """Return what the clients that were also trained alone reach on their own held-out examples, together and alone."""
    accuracies = {
        "federated": summary.held_out_federated_accuracy,
        "personal": summary.held_out_personal_accuracy,
        "alone": summary.held_out_local_only_accuracy,
        "all in one place": summary.held_out_centralized_accuracy,
    }
    figures = ", ".join(f"{how} {percent(accuracy)}" for how, accuracy in accuracies.items() if accuracy is not None)
    number = summary.held_out_num_clients
    return f"on clients' own data: {figures}   ({counted(number, 'client')})"


def _trained(summary: Summary) -> str:
    trained, of_all = summary.trainable_parameters, summary.backbone_parameters
    return f"{trained:,} of {of_all:,}" + (f"   ({of_all // trained:,} x fewer)" if trained < of_all else "")


def final_line(summary: Summary, config: ExperimentConfig) -> str:
    """The run in one line: what it began with, what it reached, between whom, and at what price."""
    before, after = percent(summary.zero_shot_accuracy), percent(summary.last_accuracy)
    clients = f"{counted(summary.num_clients, 'client')}, {describe(config.partition)}"
    line = f"zero-shot {before} -> {after} in {counted(summary.rounds, 'round')}; {clients}"
    if summary.num_clients > 1 and summary.rounds and summary.uplink_bytes_per_client_round is not None:
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
    listed = {
        key: " and ".join(map(str, value)) if isinstance(value, list) else value for key, value in options.items()
    }
    text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in listed.items())
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


def size(num_bytes: float | None) -> str:
    """Bytes in decimal units: "24.1 KB"; a dash for None."""
    if num_bytes is None:
        return "-"
    for unit in ("B", "KB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
