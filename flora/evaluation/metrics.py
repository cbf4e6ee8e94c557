"""The metrics and figures there are, each declared once; `round_metric` adds one of your own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flora.core.errors import UserError
from flora.core.metrics import Figure, Metric, first, last, mean, total, values_of
from flora.core.records import Evaluation, RoundRecord
from flora.core.states import ServerState
from flora.evaluation.accuracy import class_accuracy, domain_accuracy


@dataclass(frozen=True, eq=False)
class ServerView:
    """What a metric of the server's adapter is computed from, after an evaluated round.

    `evaluation` has for each of the N common test images what was predicted, whether it is right, and the loss;
    `labels` `(N,)` are their classes, places in `class_names`; `domains` `(N,)` the groups (client, camera) that the
    data name for them, None if they name none. Round 0 is the frozen model.
    """

    state: ServerState
    evaluation: Evaluation
    labels: np.ndarray
    class_names: tuple[str, ...]
    domains: np.ndarray | None = None


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


def complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """All declared metrics in their order: `values`, and what a round without one has. Raises ValueError for others."""
    unknown = values.keys() - METRICS.keys()
    if unknown:
        raise ValueError(f"no metric is declared as {', '.join(sorted(unknown))}")
    return {name: values.get(name, metric.default) for name, metric in METRICS.items()}


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


def _best(records: Sequence[RoundRecord]) -> tuple[float, int]:
    accuracy, negative_round = max((each.accuracy, -each.round) for each in records if each.accuracy is not None)
    return accuracy, -negative_round


def _clock(records: Sequence[RoundRecord]) -> list[float]:
    """The simulated seconds from the start to the end of each round."""
    return list(itertools.accumulate(record.simulated_seconds or 0.0 for record in records))


def _simulated_seconds(records: Sequence[RoundRecord]) -> float | None:
    return None if records[-1].simulated_seconds is None else _clock(records)[-1]


def _seconds_to_accuracy(records: Sequence[RoundRecord]) -> dict[str, float] | None:
    """When each tenth of accuracy was first reached, above that of the frozen model."""
    if records[-1].simulated_seconds is None:
        return None
    reached: dict[str, float] = {}
    for tenth in range(1, 11):
        times = [
            seconds
            for record, seconds in zip(records, _clock(records), strict=True)
            if record.accuracy is not None and record.accuracy >= tenth / 10
        ]
        if times and times[0] > 0:
            reached[f"{tenth / 10:.1f}"] = times[0]
    return reached


def _uplink_bytes_per_client_round(records: Sequence[RoundRecord]) -> float:
    client_rounds = sum(record.num_clients + record.num_late for record in records)
    return sum(values_of(records, "uplink_bytes")) / client_rounds if client_rounds else 0.0


def _figures_of_spread(name: str, whose: str, titles: Mapping[str, str]) -> None:
    """The metrics of accuracies over clients: their mean, spread, and mean weighted by held-out examples."""
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


def _of_last(name: str, about: str, unit: str, of: str, column: str | None = None) -> None:
    """A metric whose last value is in the summary under the same name."""
    declare(Metric(name, about, unit, of, (Figure(name, f"{about}, after the last round", unit, last(name), column),)))


def _of_total(name: str, about: str, unit: str, of: str, *, figure: str, default: Any = 0) -> None:
    """A metric whose sum over the rounds is in the summary as `figure`."""
    declare(Metric(name, about, unit, of, (Figure(figure, f"{about}, all rounds", unit, total(name)),), default))


def _figure(name: str, about: str, unit: str = "count", of: Any = None, column: str | None = None) -> None:
    """A figure of the summary that is no single metric's."""
    FIGURES[name] = Figure(name, about, unit, of, column)


_figure("name", "the run's name", "text")
_figure("rounds", "rounds done", of=lambda records: records[-1].round)
_figure("num_clients", "clients there are")
declare(
    Metric(
        "accuracy",
        "accuracy of the server's adapter on the common test images (without the classes set aside)",
        "fraction",
        "server",
        (
            Figure("zero_shot_accuracy", "the frozen model's accuracy", "fraction", first("accuracy"), "zero-shot"),
            Figure(
                "last_accuracy", "the result: accuracy after the last round", "fraction", last("accuracy"), "last round"
            ),
            Figure(
                "best_accuracy",
                "accuracy of the best round, which is chosen on the test set",
                "fraction",
                lambda records: _best(records)[0],
                "best round",
            ),
            Figure("best_round", "which round that is", "count", lambda records: _best(records)[1]),
        ),
    )
)
COMPUTED["accuracy"] = lambda view: view.evaluation.accuracy
declare(Metric("loss", "cross-entropy over all classes on the common test images", "number", "server"))
COMPUTED["loss"] = lambda view: view.evaluation.loss
declare(
    Metric(
        "train_loss", "mean loss of the local steps, by clients' examples, of what was averaged", "number", "training"
    )
)
declare(Metric("num_clients", "clients whose updates came", "count", "training", default=0))
_of_total("uplink_bytes", "bytes that clients sent", "bytes", "traffic", figure="total_uplink_bytes")
_of_total("downlink_bytes", "bytes that clients got", "bytes", "traffic", figure="total_downlink_bytes")
_figure(
    "uplink_bytes_per_client_round",
    "bytes that a client sends in a round, in the mean",
    "bytes",
    _uplink_bytes_per_client_round,
    "up per client and round",
)
_of_total("train_seconds", "seconds of training", "seconds", "cost", figure="train_seconds", default=0.0)
_of_total("eval_seconds", "seconds of evaluation", "seconds", "cost", figure="eval_seconds", default=0.0)
declare(
    Metric(
        "peak_memory_bytes",
        "most memory so far: of the CUDA device, or the process's resident set",
        "bytes",
        "cost",
        (Figure("peak_memory_bytes", "most memory: of the CUDA device, or the process's resident set", "bytes"),),
        0,
    )
)
declare(Metric("learning_rate", "the clients' learning rate", "number", "training"))
declare(Metric("num_steps", "local steps, added up over clients", "count", "training", default=0))
declare(Metric("num_examples", "training examples of the clients whose updates came", "count", "training", default=0))
declare(
    Metric(
        "aggregation_error",
        "what averaging A and B by themselves gets wrong of the mean product, as a share of it (LoRA)",
        "number",
        "server",
        (
            Figure(
                "aggregation_error_mean",
                "what averaging gets wrong of the mean product, as a share of it, mean over rounds",
                "number",
                mean("aggregation_error"),
                "aggregation error",
            ),
        ),
    )
)
declare(Metric("class_accuracy", "accuracy by class on the common test images", "by name", "server"))
COMPUTED["class_accuracy"] = lambda view: class_accuracy(view.evaluation, view.labels, view.class_names)
_figures_of_spread(
    "client_accuracy",
    "the server's adapter",
    {"mean": "on clients' own data", "worst_decile": "worst tenth"},
)
_figures_of_spread(
    "personal_accuracy",
    "each client's own adapter",
    {"mean": "personal adapters", "worst_decile": "worst tenth of these"},
)
declare(
    Metric(
        "new_accuracy",
        "accuracy on the classes that were set aside and that nobody trains on",
        "fraction",
        "server",
        (
            Figure("zero_shot_new_accuracy", "the frozen model's on them", "fraction", first("new_accuracy")),
            Figure(
                "new_accuracy",
                "accuracy on the classes that were set aside, after the last round",
                "fraction",
                last("new_accuracy"),
                "classes set aside",
            ),
        ),
    )
)
_of_last("harmonic_mean", "harmonic mean of `accuracy` and `new_accuracy`", "fraction", "server", "harmonic mean")
_of_last(
    "broadcast_accuracy",
    "accuracy of what clients would read of the next broadcast, where that is quantised",
    "fraction",
    "server",
    "last broadcast",
)
_of_last(
    "model_privacy_gap",
    "by how much the server's own adapter is better than `broadcast_accuracy`",
    "points",
    "server",
    "model privacy gap",
)
declare(
    Metric(
        "simulated_seconds",
        "how long the round took on the simulated network's clock",
        "seconds",
        "traffic",
        (
            Figure(
                "simulated_seconds",
                "how long all rounds took on the simulated network's clock",
                "seconds",
                _simulated_seconds,
                "simulated time",
            ),
            Figure(
                "seconds_to_accuracy",
                "after how many simulated seconds each tenth of accuracy was reached",
                "by name",
                _seconds_to_accuracy,
            ),
        ),
    )
)
_of_total("num_dropped", "clients that dropped out on the way", "count", "traffic", figure="num_dropped")
_of_total("num_late", "clients that delivered when the round was over", "count", "traffic", figure="num_late")
declare(Metric("mean_staleness", "how many rounds old the updates were, in the mean", "number", "traffic"))
_of_last("domain_accuracy", "accuracy of test images by the client or folder that the data name", "by name", "server")
COMPUTED["domain_accuracy"] = lambda view: domain_accuracy(view.evaluation, view.domains)
_of_last(
    "template_accuracy",
    "accuracy with the prompts of each of `evaluation.templates` alone, by template",
    "by name",
    "server",
)
for _statistic, _about, _title in (
    ("mean", "mean of `template_accuracy` over the templates", "other templates"),
    ("std", "standard deviation (n) of `template_accuracy` over the templates", "std of these"),
):
    _name, _last_about = f"template_accuracy_{_statistic}", f"{_about}, after the last round"
    _shown = Figure(_name, _last_about, "fraction", last(_name), _title, _title)
    declare(Metric(_name, _about, "fraction", "server", (_shown,)))

_figure("num_local_only", "clients that were also trained without the others")
_figure(
    "local_only_accuracy_mean", "their mean accuracy on the common test images", "fraction", None, "one client alone"
)
_figure("local_only_accuracy_best", "the best one's", "fraction")
_figure("held_out_num_clients", "those of them that have held-out examples")
_figure("held_out_federated_accuracy", "mean over these of the server's adapter on their own data", "fraction")
_figure(
    "held_out_local_only_accuracy",
    "mean over these of what each reaches alone, on its own data",
    "fraction",
)
_figure("held_out_personal_accuracy", "mean over these of their own adapters of the federated run", "fraction")
_figure("wall_seconds", "seconds of the whole run", "seconds")
_figure("memory_before_bytes", "memory that the process held before the run", "bytes")
_figure("trainable_parameters", "numbers that a client trains", "count", None, "trained")
_figure("backbone_parameters", "numbers of the frozen model")
_figure("num_unreadable", "images that could not be read")
_figure("num_rejected", "updates that were left out", of=lambda records: sum(len(r.rejected_clients) for r in records))
