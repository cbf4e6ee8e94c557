"""The pictures of one run: how it went over rounds, bytes, time and privacy, its clients, its classes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from flora.evaluation.metrics import METRICS
from flora.report.curves import COLOURS, GREY
from flora.report.elements import Html, element, joined
from flora.report.pictures import (
    MAX_COLUMNS,
    PAPER,
    Line,
    bars_along,
    heat_map,
    legend,
    lines_picture,
    shortened,
    svg,
    thinned,
)
from flora.report.reading import Absent, RunFiles, confusion_of, numbers, partition_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What the first pictures show, or what says nothing over rounds.
SHOWN = ("accuracy", "loss", "train_loss", "client_accuracy_mean", "client_accuracy_worst_decile", "num_clients",
         "uplink_bytes", "downlink_bytes", "simulated_seconds", "num_examples", "num_steps", "top5_accuracy",
         "macro_f1", "balanced_accuracy")  # fmt: skip
ABBREVIATIONS = {"auroc": "AUROC"}
SENT = "megabytes sent, up and down, all clients"
SPENT = "epsilon spent by then"
# Clients drawn as points of their own; more are lines.
MAX_POINTS = 150
# Width and height of a picture above another one, in inches.
STACKED = (4.6, 3.4)


def picture(title: str, draw: Callable[[], Html], caption: str = "") -> Html:
    """Return a picture under its title, or a sentence that says why it is left out."""
    try:
        content = draw()
    except Absent as reason:
        return element("p", element("b", f"{title}: "), str(reason), class_="absent")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return element("p", element("b", f"{title}: "), "left out: a file of the run is damaged.", class_="absent")
    below = [element("figcaption", caption)] if caption else []
    return element("figure", element("h3", title), content, *below)


def sent_bytes(run: RunFiles) -> dict[int, float]:
    """Return the bytes that all clients had sent and got by the end of each round."""
    sent = [sum(record.metrics.get(f"{way}_bytes") or 0 for way in ("uplink", "downlink")) for record in run.records]
    return dict(zip((record.round for record in run.records), itertools.accumulate(sent), strict=True))


def elapsed(run: RunFiles) -> dict[int, float] | None:
    """Return the simulated seconds by the end of each round; None without a simulated network."""
    seconds = [record.metrics.get("simulated_seconds") for record in run.records]
    if not any(seconds):
        return None
    total = itertools.accumulate(each or 0.0 for each in seconds)
    return dict(zip((record.round for record in run.records), total, strict=True))


def spent(run: RunFiles) -> dict[int, float] | None:
    """Return the epsilon of clients' privacy that was spent by the end of each round; None where none is counted."""
    by_round = {record.round: record.metrics.get("epsilon") or 0.0 for record in run.records}
    return by_round if any(by_round.values()) and all(map(math.isfinite, by_round.values())) else None


def axes_of(run: RunFiles) -> dict[str, tuple[str, dict[int, float]]]:
    """Return what curves can go over, and the axis's title and each round's place: rounds, bytes, time, epsilon.

    Without bytes if none travelled, without time if there was no clock, without epsilon if no privacy was spent.
    """
    axes = {"rounds": ("round", {record.round: float(record.round) for record in run.records})}
    sent, seconds = sent_bytes(run), elapsed(run)
    if max(sent.values()) > 0:
        axes["bytes"] = (SENT, scaled(sent, 1e6))
    if seconds is not None:
        unit, length = time_unit(max(seconds.values()))
        axes["simulated time"] = (f"simulated {unit}", scaled(seconds, length))
    epsilon = spent(run)
    if epsilon is not None:
        axes["privacy spent"] = (SPENT, epsilon)
    return axes


def scaled(values: Mapping[int, float], unit: float) -> dict[int, float]:
    """Return values in another unit."""
    return {key: value / unit for key, value in values.items()}


def time_unit(seconds: float) -> tuple[str, int]:
    """Return the unit in which to show so many seconds, and its length in seconds."""
    known = (("days", 86_400), ("hours", 3600), ("minutes", 60))
    return next((unit for unit in known if seconds > 2 * unit[1]), ("seconds", 1))


def accuracy_lines(run: RunFiles, places: dict[int, float]) -> list[Line]:
    """Return the accuracies of the server's adapter, and what they are to be compared with."""
    lines = [_line(run, "common test images", "accuracy", places, 0)]
    spread = [_line(run, "", f"client_accuracy_{which}_decile", places, 2) for which in ("worst", "best")]
    mean = _line(run, "clients' own images (band: worst to best tenth)", "client_accuracy_mean", places, 2)
    same = all(list(each.xs) == list(mean.xs) for each in spread)
    if len(mean.xs) > 1:
        band = (spread[0].ys, spread[1].ys) if same else (None, None)
        lines.append(Line(mean.name, mean.xs, mean.ys, 2, *band))
    personal = _line(run, "clients' own adapters", "personal_accuracy_mean", places, 3)
    lines += [personal] * (len(personal.xs) > 1)
    ends = (min(places.values()), max(places.values()))
    for name, figure, style in (
        ("zero-shot", "zero_shot_accuracy", None),
        ("one client alone", "local_only_accuracy_mean", 1),
        ("all images in one place", "centralized_accuracy", 4),
    ):
        level = run.figure(figure)
        if level is not None:
            lines.append(Line(name, ends, (level, level), style, is_level=True))
    return [line for line in lines if line.xs]


def loss_lines(run: RunFiles, places: dict[int, float]) -> list[Line]:
    """Return the losses on the common test images and of the local steps."""
    lines = [
        _line(run, "common test images", "loss", places, 0),
        _line(run, "clients' training images, while they train", "train_loss", places, 5),
    ]
    return [line for line in lines if line.xs]


def _line(run: RunFiles, name: str, metric: str, places: dict[int, float], style: int) -> Line:
    points = run.points(metric)
    return Line(name, [places[round] for round, _ in points], [value for _, value in points], style)


def curves(run: RunFiles) -> Html:
    """Return accuracy and loss over everything that they can go over."""
    pictures = []
    for title, of in (("Accuracy", accuracy_lines), ("Loss", loss_lines)):
        for over, (x_title, places) in axes_of(run).items():
            whole = f"{title} over {over}"
            pictures.append(picture(whole, partial(_curve, of(run, places), f"{whole} of {run.name}", x_title)))
    return joined(pictures)


def _curve(lines: Sequence[Line], about: str, x_title: str) -> Html:
    if not any(len(line.xs) > 1 for line in lines if not line.is_level):
        raise Absent("No two rounds were evaluated.")
    return lines_picture(lines, about, x_title, percent=about.startswith("Accuracy"))


def client_strip(run: RunFiles) -> Html:
    """Return each client's accuracies on its own held-out images, sorted, above its number of training images."""
    columns = run.columns("clients.csv")
    server = numbers(columns["accuracy"])
    if np.isnan(server).all():
        raise Absent("No client has held-out images (clients.holdout_fraction).")
    order = np.argsort(np.where(np.isnan(server), np.inf, server), kind="stable")
    order = order[~np.isnan(server[order])]
    others = (
        ("alone", "local_only_held_out_accuracy", 1),
        ("own adapter", "personal_accuracy", 3),
        ("all images in one place", "centralized_held_out_accuracy", 4),
    )
    lines = [Line("server's adapter", range(len(order)), server[order], 0)]
    for name, column, style in others:
        if column in columns and not np.isnan(values := numbers(columns[column])[order]).all():
            lines.append(Line(name, range(len(order)), values, style))
    names = columns.get("name", columns["client"])
    labels = [shortened(names[place] or columns["client"][place]) for place in order]
    sizes = numbers(columns["num_train"])[order]

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        for line in reversed(lines):
            if len(order) > MAX_POINTS:
                places = thinned(len(order))
                above.plot(places, 100 * np.sort(line.ys)[places], color=line.colour)
            else:  # the server's points are filled, smaller and in front, so that none hides another
                look = {"markersize": 4.5} if line.style == 0 else {"markersize": 7, "markerfacecolor": "none"}
                above.plot(line.xs, 100 * np.array(line.ys), "o", color=line.colour, **look)
        if len(lines) > 1 and len(order) <= MAX_POINTS:
            stacked = np.stack([100 * np.array(line.ys) for line in lines])
            above.vlines(
                range(len(order)), np.nanmin(stacked, 0), np.nanmax(stacked, 0), colors=GREY, linewidth=0.6, zorder=1
            )
        above.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        bars_along(below, sizes, GREY, MAX_POINTS)
        below.set_ylabel("images")
        if len(order) <= 12:
            is_long = sum(map(len, labels)) > 36
            below.set_xticks(range(len(order)), labels, rotation=90 if is_long else 0)
        else:
            below.tick_params(labelbottom=False)
        below.set_xlabel("clients, sorted by the server's accuracy")

    return Html(
        svg(draw, f"held-out accuracy by client of {run.name}", STACKED)
        + legend(lines, of_points=len(order) <= MAX_POINTS)
    )


def gini(values: np.ndarray) -> float:
    """Return the Gini coefficient of numbers that are not negative: 0 where all are the same; NaN without any."""
    ordered = np.sort(values[~np.isnan(values)])
    if not len(ordered) or not ordered.sum():
        return float("nan") if not len(ordered) else 0.0
    weights = 2 * np.arange(1, len(ordered) + 1) - len(ordered) - 1
    return float((weights * ordered).sum() / (len(ordered) * ordered.sum()))


def partition_map(run: RunFiles) -> Html:
    """Return how many training images of each class each client has."""
    partition = partition_of(run)
    about = f"training images by class and client of {run.name}"
    title = "client" if len(partition.clients) <= MAX_COLUMNS else f"the first {MAX_COLUMNS:,} clients"
    return heat_map(partition.counts, partition.classes, partition.clients, about, (title, "class"))


def participation(run: RunFiles) -> Html:
    """Return in how many rounds each client's update came. Raises `Absent` where all came always."""
    num_clients = len(partition_of(run).clients)
    cohorts = [record.cohort for record in run.records if record.round and record.cohort is not None]
    if not cohorts:
        raise Absent("No round says who took part.")
    if all(len(cohort) == num_clients for cohort in cohorts):
        raise Absent(f"All {num_clients} clients took part in each of {len(cohorts)} rounds.")
    from matplotlib.ticker import MaxNLocator

    counts = np.bincount([client for cohort in cohorts for client in cohort], minlength=num_clients)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars_along(axes, counts if num_clients <= MAX_POINTS else np.sort(counts), COLOURS[0], MAX_POINTS)
        axes.axhline(counts.mean(), color=GREY, dashes=(2, 3))
        axes.set_xlabel("client" if num_clients <= MAX_POINTS else "clients, sorted")
        axes.set_ylabel("rounds")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))

    return svg(draw, f"rounds in which each client took part, {run.name}")


def confusion_map(run: RunFiles) -> Html:
    """Return who is taken for whom, each class's images as shares; who is right is on the diagonal."""
    names, counts = confusion_of(run)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return heat_map(shares, names, names, f"confusion matrix of {run.name}", ("predicted", "labelled"))


def class_accuracies(run: RunFiles) -> Html:
    """Return each class's accuracy before the first round and after the last, sorted."""
    first, last = (record.metrics.get("class_accuracy") for record in (run.records[0], run.records[-1]))
    if not first or not last or run.records[0].round:
        raise Absent("The rounds say nothing of single classes.")
    names = sorted((name for name in last if last[name] is not None), key=lambda name: last[name])
    lines = [Line("zero-shot", (), (), None), Line("last round", (), (), 0)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        before, after = ([100 * (of.get(name) or 0.0) for name in names] for of in (first, last))
        if len(names) > MAX_POINTS // 2:
            axes.plot(sorted(before), color=GREY, dashes=(2, 3))
            axes.plot(after, color=COLOURS[0])
            axes.set_xlabel("classes, sorted")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
            return
        places = range(len(names))
        axes.hlines(places, before, after, colors=GREY, linewidth=0.8)
        axes.plot(before, places, "o", color=GREY, markerfacecolor=PAPER, markersize=5)
        axes.plot(after, places, "o", color=COLOURS[0], markersize=5.5)
        axes.set_yticks(places, [shortened(name) for name in names], fontsize=10 if len(names) < 25 else 6)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")

    height = min(max(0.2 * len(names) + 0.9, 2.6), 5.5)
    drawn = svg(draw, f"accuracy by class of {run.name}", (4.6, height))
    return Html(drawn + legend(lines, of_points=len(names) <= MAX_POINTS // 2))


def reliability(run: RunFiles) -> Html:
    """Return accuracy by confidence: on the diagonal a probability is to be believed."""
    columns = run.columns("reliability.csv")
    counts, confidence, accuracy = (numbers(columns[name]) for name in ("num_images", "confidence", "accuracy"))
    if not counts.sum():
        raise Absent("reliability.csv has no images.")

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        above.plot([0, 100], [0, 100], color=GREY, dashes=(2, 3))
        above.plot(100 * confidence, 100 * accuracy, color=COLOURS[0], marker="o", markersize=5, linewidth=1.4)
        width = 100 / len(counts)
        below.bar((np.arange(len(counts)) + 0.5) * width, counts, color=GREY, width=0.85 * width)
        above.set_ylabel("accuracy, %")
        below.set_ylabel("images")
        below.set_xlabel("confidence, %")

    return svg(draw, f"reliability diagram of {run.name}", STACKED)


def other_metrics(run: RunFiles) -> list[Html]:
    """Return a picture of each other metric that changes over rounds, and of rejected updates if there are any."""
    pictures = []
    declared = METRICS | {name: None for name in run.records[-1].metrics if name not in METRICS}
    for name, metric in declared.items():
        points = [(round, value) for round, value in run.points(name) if math.isfinite(value)]
        if metric is not None and metric.of != "server":
            points = [(round, value) for round, value in points if round]
        told = metric is None or (metric.of in ("server", "training", "traffic", "privacy") and name not in SHOWN)
        if told and len({value for _, value in points}) > 1:
            title = ABBREVIATIONS.get(name) or name.replace("_", " ").capitalize()
            pictures.append(picture(title, partial(_simple, run, name, points), metric.about if metric else ""))
    rejected = [(record.round, float(len(record.rejected_clients))) for record in run.records if record.round]
    if any(count for _, count in rejected):
        draw = partial(_simple, run, "rejected updates", rejected)
        pictures.append(picture("Rejected updates", draw, "updates that were left out of the average"))
    return pictures


def _simple(run: RunFiles, name: str, points: Sequence[tuple[int, float]]) -> Html:
    percent = name in METRICS and METRICS[name].unit in ("fraction", "points")
    line = Line(name, [round for round, _ in points], [value for _, value in points])
    return lines_picture([line], f"{name} of {run.name}", "round", percent=percent)
