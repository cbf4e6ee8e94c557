"""The metrics of the server's adapter: what it says of test images, what averaging and training it cost."""

from __future__ import annotations

from flora.core.metrics import Figure, Metric, first, last, mean
from flora.evaluation.accuracy import balanced_accuracy, domain_accuracy, worst_class_accuracy
from flora.evaluation.classification import macro_auroc, macro_f1, reliability, top_accuracy
from flora.evaluation.collapse import effective_rank, mean_cosine, over_adapters
from flora.evaluation.declaring import COMPUTED, declare, figure, of_last
from flora.evaluation.over_rounds import best, rounds_to_accuracy


def _mean_over_domains(by_domain: dict[str, float] | None) -> float | None:
    return sum(by_domain.values()) / len(by_domain) if by_domain else None


figure("name", "the run's name", "text")
figure("rounds", "rounds done", of=lambda records: records[-1].round)
figure("num_clients", "clients there are")
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
of_last("balanced_accuracy", "mean over classes of the accuracy on each", "fraction", "server", "classes alike")
COMPUTED["balanced_accuracy"] = lambda view: balanced_accuracy(view.class_accuracy)
of_last("worst_class_accuracy", "accuracy on the class that is recognised worst", "fraction", "server", "worst class")
COMPUTED["worst_class_accuracy"] = lambda view: worst_class_accuracy(view.class_accuracy)
of_last("macro_f1", "mean over classes of F1 on the common test images", "fraction", "server")
COMPUTED["macro_f1"] = lambda view: macro_f1(view.labels, view.evaluation.predicted, len(view.class_names))
of_last(
    "top5_accuracy",
    "share of the common test images whose class is among the five most probable, where there are more",
    "fraction",
    "server",
)
COMPUTED["top5_accuracy"] = lambda view: top_accuracy(view.evaluation.label_ranks, 5, len(view.class_names))
of_last(
    "calibration_error",
    "expected calibration error on the common test images: how far confidence is from accuracy, in 15 bins",
    "fraction",
    "server",
)
COMPUTED["calibration_error"] = lambda view: reliability(view.evaluation.confidences, view.evaluation.correct).error
of_last(
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
of_last(
    "effective_rank",
    "along how many directions the classes' features differ: exp of the entropy of their singular values",
    "number",
    "server",
    "rank of classes",
)
COMPUTED["effective_rank"] = lambda view: over_adapters(effective_rank, view.evaluation.class_features)
of_last("class_cosine", "mean cosine between the features of different classes", "number", "server", "class cosine")
COMPUTED["class_cosine"] = lambda view: over_adapters(mean_cosine, view.evaluation.class_features)
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
of_last("harmonic_mean", "harmonic mean of `accuracy` and `new_accuracy`", "fraction", "server", "harmonic mean")
of_last(
    "broadcast_accuracy",
    "accuracy of what clients would read of the next broadcast, where that is quantised",
    "fraction",
    "server",
    "last broadcast",
)
of_last(
    "model_privacy_gap",
    "by how much the server's own adapter is better than `broadcast_accuracy`",
    "points",
    "server",
    "model privacy gap",
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
of_last("domain_accuracy", "accuracy of test images by the client or folder that the data name", "by name", "server")
COMPUTED["domain_accuracy"] = lambda view: domain_accuracy(view.evaluation, view.domains)
of_last(
    "domain_accuracy_mean",
    "mean of `domain_accuracy` over the domains, each of them once",
    "fraction",
    "server",
    "domains alike",
    "domains alike",
)
COMPUTED["domain_accuracy_mean"] = lambda view: _mean_over_domains(domain_accuracy(view.evaluation, view.domains))
of_last(
    "template_accuracy",
    "accuracy with the prompts of each of `evaluation.templates` alone, by template",
    "by name",
    "server",
)
for _statistic, _about, _title in (
    ("mean", "mean of `template_accuracy` over the templates", "other templates"),
    ("std", "standard deviation (n) of `template_accuracy` over the templates", "std of these"),
):
    of_last(f"template_accuracy_{_statistic}", _about, "fraction", "server", _title, _title)
declare(
    Metric(
        "other_accuracy",
        "accuracy on each of the data sets of `evaluation.also`, in round 0 and the last one",
        "by name",
        "server",
        (
            Figure("zero_shot_other_accuracy", "the frozen model's on them", "by name", first("other_accuracy")),
            Figure("other_accuracy", "after the last round", "by name", last("other_accuracy")),
        ),
    )
)
declare(
    Metric(
        "other_accuracy_mean",
        "mean of `other_accuracy` over the data sets",
        "fraction",
        "server",
        (
            Figure(
                "zero_shot_other_accuracy_mean",
                "mean over the data sets of `evaluation.also`, the frozen model",
                "fraction",
                first("other_accuracy_mean"),
                "other data, zero-shot",
                "other data sets, zero-shot",
            ),
            Figure(
                "other_accuracy_mean",
                "mean over the data sets of `evaluation.also`, after the last round",
                "fraction",
                last("other_accuracy_mean"),
                "other data",
                "other data sets",
            ),
        ),
    )
)
of_last("other_accuracy_std", "standard deviation (n) of `other_accuracy` over the data sets", "fraction", "server")
