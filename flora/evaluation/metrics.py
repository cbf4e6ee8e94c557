"""The metrics and figures there are, each declared once; `round_metric` adds one of your own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flora.core.metrics import Figure, Metric, first, last, mean, total
from flora.evaluation.accuracy import balanced_accuracy, domain_accuracy
from flora.evaluation.classification import macro_auroc, macro_f1, reliability, top_accuracy
from flora.evaluation.collapse import effective_rank, mean_cosine
from flora.evaluation.declaring import (
    COMPUTED,
    FIGURES,
    METRICS,
    ServerView,
    complete,
    computed,
    declare,
    round_metric,
    summed_up,
)
from flora.evaluation.over_rounds import (
    best,
    rounds_to_accuracy,
    seconds_to_accuracy,
    simulated_seconds,
    uplink_bytes_per_client_round,
)

__all__ = [
    "COMPUTED",
    "FIGURES",
    "METRICS",
    "ServerView",
    "complete",
    "computed",
    "declare",
    "round_metric",
    "summed_up",
]


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


def _of_last(name: str, about: str, unit: str, of: str, column: str | None = None, row: str | None = None) -> None:
    """A metric whose last value is in the summary under the same name."""
    figure = Figure(name, f"{about}, after the last round", unit, last(name), column, row)
    declare(Metric(name, about, unit, of, (figure,)))


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
                lambda records: best(records)[0],
                "best round",
            ),
            Figure("best_round", "which round that is", "count", lambda records: best(records)[1]),
            Figure(
                "rounds_to_accuracy",
                "in which evaluated round each tenth of accuracy was first reached, above that of the frozen model",
                "by name",
                rounds_to_accuracy,
            ),
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
    uplink_bytes_per_client_round,
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
COMPUTED["class_accuracy"] = lambda view: view.class_accuracy
_of_last("balanced_accuracy", "mean over classes of the accuracy on each", "fraction", "server", "classes alike")
COMPUTED["balanced_accuracy"] = lambda view: balanced_accuracy(view.class_accuracy)[0]
_of_last("worst_class_accuracy", "accuracy on the class that is recognised worst", "fraction", "server", "worst class")
COMPUTED["worst_class_accuracy"] = lambda view: balanced_accuracy(view.class_accuracy)[1]
_of_last("macro_f1", "mean over classes of F1 on the common test images", "fraction", "server")
COMPUTED["macro_f1"] = lambda view: macro_f1(view.labels, view.evaluation.predicted, len(view.class_names))
_of_last(
    "top5_accuracy",
    "share of the common test images whose class is among the five most probable, where there are more",
    "fraction",
    "server",
)
COMPUTED["top5_accuracy"] = lambda view: top_accuracy(view.evaluation.label_ranks, 5, len(view.class_names))
_of_last(
    "calibration_error",
    "expected calibration error on the common test images: how far confidence is from accuracy, in 15 bins",
    "fraction",
    "server",
)
COMPUTED["calibration_error"] = lambda view: reliability(view.evaluation.confidences, view.evaluation.correct).error
_of_last(
    "auroc",
    "area under the ROC curve of each class against the rest, mean over classes, with `evaluation.auroc`",
    "fraction",
    "server",
    "AUROC",
    "AUROC",
)
COMPUTED["auroc"] = lambda view: (
    None if view.evaluation.probabilities is None else macro_auroc(view.labels, view.evaluation.probabilities)
)
_of_last(
    "effective_rank",
    "along how many directions the classes' features differ: exp of the entropy of their singular values",
    "number",
    "server",
    "rank of classes",
)
COMPUTED["effective_rank"] = lambda view: effective_rank(view.evaluation.class_features)
_of_last("class_cosine", "mean cosine between the features of different classes", "number", "server", "class cosine")
COMPUTED["class_cosine"] = lambda view: mean_cosine(view.evaluation.class_features)
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
    "unheld_accuracy",
    "mean over clients of the accuracy on the test images of classes of which a client has no training example",
    "fraction",
    "server",
    "classes not held",
)
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
                simulated_seconds,
                "simulated time",
            ),
            Figure(
                "seconds_to_accuracy",
                "after how many simulated seconds each tenth of accuracy was reached",
                "by name",
                seconds_to_accuracy,
            ),
        ),
    )
)
_of_total("num_dropped", "clients that dropped out on the way", "count", "traffic", figure="num_dropped")
_of_total("num_late", "clients that delivered when the round was over", "count", "traffic", figure="num_late")
declare(Metric("mean_staleness", "how many rounds old the updates were, in the mean", "number", "traffic"))
_of_last(
    "pseudo_label_coverage",
    "share of the cohort's images without a label to which the received adapter gives one with enough probability",
    "fraction",
    "training",
    "pseudo-labels sure",
    "pseudo-labels sure",
)
_of_last(
    "pseudo_label_precision",
    "share of these labels that are right",
    "fraction",
    "training",
    "pseudo-labels right",
    "pseudo-labels right",
)
declare(
    Metric(
        "client_pseudo_labels",
        "for each client of the cohort: images without a label, those whose label is sure, and right among these",
        "by name",
        "training",
    )
)
declare(
    Metric(
        "warm_up_accuracy",
        "in round 0: accuracy of the adapter that the server trained on synthetic images before round 1",
        "fraction",
        "server",
        (
            Figure(
                "warm_up_accuracy",
                "accuracy of the adapter that the server trained on synthetic images before round 1",
                "fraction",
                first("warm_up_accuracy"),
                "after warm-up",
                "after warm-up",
            ),
        ),
    )
)
declare(
    Metric(
        "start_accuracy",
        "in round 0: accuracy of the adapter that `adapter.start` names",
        "fraction",
        "server",
        (
            Figure(
                "start_accuracy",
                "accuracy of the adapter that `adapter.start` names",
                "fraction",
                first("start_accuracy"),
                None,
                "at the start",
            ),
        ),
    )
)
declare(
    Metric(
        "distillation_loss",
        "mean loss of the steps in which the server learned what the cohort says of public images",
        "number",
        "server",
    )
)
declare(
    Metric(
        "text_loss", "mean loss of the steps in which the server learned descriptions of classes", "number", "server"
    )
)
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
_figure(
    "local_only_unheld_accuracy",
    "their mean accuracy on the test images of classes of which each has no training example",
    "fraction",
    None,
    "alone, classes not held",
)
_figure(
    "personal_unheld_accuracy",
    "the same of their own adapters of the federated run, where clients have some",
    "fraction",
    None,
    "personal, classes not held",
)
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
