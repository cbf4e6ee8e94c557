"""How a metric is declared, how those that are come to their values, and a summary to its figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from flora.core.errors import UserError
from flora.core.metrics import Figure, Metric, first, last, total
from flora.core.records import Evaluation, RoundRecord
from flora.core.states import ServerState
from flora.evaluation.accuracy import class_accuracy


@dataclass(frozen=True, eq=False)
class ServerView:
    """What a metric of the server's adapter is computed from, after an evaluated round.

    `evaluation` has for each of the N common test images what was predicted, with which probability, whether it is
    right, and the loss, and the features of the classes; `labels` `(N,)` are the images' classes, places in
    `class_names`; `domains` `(N,)` the groups (client, camera) that the data name for them, None if they name none.
    Round 0 is the frozen model.
    """

    state: ServerState
    evaluation: Evaluation
    labels: np.ndarray
    class_names: tuple[str, ...]
    domains: np.ndarray | None = None

    @cached_property
    def class_accuracy(self) -> dict[str, float | None]:
        """Accuracy by class name; None for a class without test images."""
        return class_accuracy(self.evaluation, self.labels, self.class_names)


Compute = Callable[[ServerView], Any]
METRICS: dict[str, Metric] = {}
COMPUTED: dict[str, Compute] = {}
FIGURES: dict[str, Figure] = {}


def declare(metric: Metric) -> None:
    """Make a metric known: from now on each record has it. Raises ValueError if its name or a figure's is taken."""
    names = [metric.name, *(figure.name for figure in metric.figures)]
    if metric.name in METRICS or any(figure.name in FIGURES for figure in metric.figures):
        taken = next(name for name in names if name in METRICS or name in FIGURES)
        raise ValueError(f"the metric {taken!r} is declared already: choose another name")
    METRICS[metric.name] = metric
    FIGURES.update({figure.name: figure for figure in metric.figures})


def not_covered(*names: str) -> None:
    """Say of declared metrics that they tell of single clients, which the noise of `privacy` does not cover."""
    METRICS.update({name: replace(METRICS[name], is_covered=False) for name in names})


def figures_of_spread(name: str, whose: str, titles: Mapping[str, str]) -> None:
    """Declare the metrics of accuracies over clients: their mean, spread, and mean weighted by held-out examples."""
    what = f"{whose} on each client's own held-out examples"
    abouts = {
        "mean": f"mean over clients of the accuracy of {what}, each client once",
        "std": f"standard deviation (n) over clients of the accuracy of {what}",
        "worst_decile": f"mean accuracy of {what}, of the worst tenth of clients",
        "best_decile": f"mean accuracy of {what}, of the best tenth of clients",
        "weighted_mean": f"accuracy of {what}, each held-out example once",
    }
    for statistic, about in abouts.items():
        full = f"{name}_{statistic}"
        figure = Figure(full, f"{about}, after the last round", "fraction", last(full), titles.get(statistic))
        declare(Metric(full, about, "fraction", "clients", (figure,)))


def of_last(name: str, about: str, unit: str, of: str, column: str | None = None, row: str | None = None) -> None:
    """Declare a metric whose last value is in the summary under the same name."""
    figure = Figure(name, f"{about}, after the last round", unit, last(name), column, row)
    declare(Metric(name, about, unit, of, (figure,)))


def of_first_and_last(name: str, about: str, titles: tuple[str, str], *, has_frozen: bool = True) -> None:
    """Declare an accuracy over clients that is measured in round 0 and after the last one, and its deviation (n).

    `titles` are those of its column and its row. With `has_frozen` the summary has round 0's as `zero_shot_NAME`.
    """
    figures: tuple[Figure, ...] = (Figure(name, f"{about}, after the last round", "fraction", last(name), *titles),)
    if has_frozen:
        figures = (Figure(f"zero_shot_{name}", f"{about}, the frozen model", "fraction", first(name)), *figures)
    declare(Metric(name, about, "fraction", "clients", figures))
    of_last(f"{name}_std", f"standard deviation (n) of `{name}` over these clients", "fraction", "clients")


def of_total(name: str, about: str, unit: str, of: str, *, figure: str, default: Any = 0) -> None:
    """Declare a metric whose sum over the rounds is in the summary as `figure`."""
    declare(Metric(name, about, unit, of, (Figure(figure, f"{about}, all rounds", unit, total(name)),), default))


def figure(name: str, about: str, unit: str = "count", of: Any = None, column: str | None = None) -> None:
    """Declare a figure of the summary that is no single metric's."""
    FIGURES[name] = Figure(name, about, unit, of, column)


def round_metric(name: str, about: str, *, unit: str = "fraction") -> Callable[[Compute], Compute]:
    """Decorator: compute a metric of the server's adapter in each evaluated round, from a `ServerView`.

    Its last value is in the summary under the same name, in the final table, and in a sweep's table. Raises ValueError
    if the name is taken.
    """

    def decorate(compute: Compute) -> Compute:
        title = name.replace("_", " ")
        declare(Metric(name, about, unit, "server", (Figure(name, about, unit, last(name), title, title),)))
        COMPUTED[name] = compute
        return compute

    return decorate


def computed(view: ServerView) -> dict[str, Any]:
    """The metrics that are computed from a view, by name, as plain numbers. Raises `UserError` for what is none."""
    return {name: _plain(name, compute(view)) for name, compute in COMPUTED.items()}


def complete(values: Mapping[str, Any], *, publishes: bool = True) -> dict[str, Any]:
    """All declared metrics in their order: `values`, and what a round without one has. Raises ValueError for others.

    Unless a run `publishes` them, those that differential privacy does not cover are None.
    """
    unknown = values.keys() - METRICS.keys()
    if unknown:
        raise ValueError(f"no metric is declared as {', '.join(sorted(unknown))}")
    return {
        name: values.get(name, metric.default) if publishes or metric.is_covered else None
        for name, metric in METRICS.items()
    }


def summed_up(records: Sequence[RoundRecord], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Every declared figure: of the records where these say it, else as `measured`, None where neither does."""
    return {
        name: measured.get(name) if figure.of_records is None else figure.of_records(records)
        for name, figure in FIGURES.items()
    }


def _plain(name: str, value: Any) -> Any:
    """A metric's value as JSON knows it: a number, numbers by name, or None."""
    value = value.item() if isinstance(value, np.generic) else value
    fault = type(value).__name__
    if isinstance(value, float) and not math.isfinite(value) and name != "loss":  # whose error says more
        fault = str(value)
    elif value is None or isinstance(value, int | float | dict):
        return value
    raise UserError(f"the metric {name!r} is {fault}, expected a number; None where a round has no value")
