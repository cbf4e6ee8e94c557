"""The metrics of differential privacy, and which of the others it does not cover."""

from __future__ import annotations

from flora.core.metrics import Metric
from flora.evaluation.declaring import METRICS, declare, figure, not_covered, of_last

of_last(
    "epsilon",
    "privacy spent so far, at `privacy.delta`: what the updates of one client more or less can change",
    "number",
    "privacy",
    "epsilon",
    "privacy spent (epsilon)",
)
of_last(
    "sum_epsilon",
    "the same against who sees sums of updates alone, where clients add noise by themselves",
    "number",
    "privacy",
    "epsilon of sums",
    "of sums alone",
)
of_last("clip_norm", "the bound of updates in the round", "number", "privacy")
declare(Metric("clipped_fraction", "share of the updates that lay beyond the bound", "fraction", "privacy"))
figure("noise_multiplier", "standard deviation of the noise, in clip norms, given or searched", "number")

not_covered(
    "aggregation_error",
    "clipped_fraction",
    "client_pseudo_labels",
    "distillation_loss",
    "downlink_bytes",
    "mean_staleness",
    "num_clients",
    "num_dropped",
    "num_examples",
    "num_late",
    "num_steps",
    "pseudo_label_coverage",
    "pseudo_label_precision",
    "simulated_seconds",
    "sum_epsilon",
    "train_loss",
    "unheld_accuracy",
    "uplink_bytes",
    *(name for name, metric in METRICS.items() if metric.of == "clients"),
)
