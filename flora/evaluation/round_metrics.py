"""The metrics of rounds: local training, traffic, time and memory, and the figures of a whole run."""

from __future__ import annotations

from flora.core.metrics import Figure, Metric
from flora.evaluation.declaring import declare, figure, of_last, of_total
from flora.evaluation.over_rounds import seconds_to_accuracy, simulated_seconds, uplink_bytes_per_client_round

declare(
    Metric(
        "train_loss", "mean loss of the local steps, by clients' examples, of what was averaged", "number", "training"
    )
)
declare(
    Metric(
        "delta_norm",
        "how far clients moved: norm of an update (local - broadcast, as the server reads it), mean over the clients",
        "number",
        "training",
    )
)
declare(
    Metric(
        "client_drift",
        "how far they moved apart: root mean square distance of updates from their mean, as a share of their norms",
        "number",
        "training",
    )
)
declare(Metric("num_clients", "clients whose updates came", "count", "training", default=0))
of_total("uplink_bytes", "bytes that clients sent", "bytes", "traffic", figure="total_uplink_bytes")
of_total("downlink_bytes", "bytes that clients got", "bytes", "traffic", figure="total_downlink_bytes")
figure(
    "uplink_bytes_per_client_round",
    "bytes that a client sends in a round, in the mean",
    "bytes",
    uplink_bytes_per_client_round,
    "up per client and round",
)
of_total("train_seconds", "seconds of training", "seconds", "cost", figure="train_seconds", default=0.0)
of_total("eval_seconds", "seconds of evaluation", "seconds", "cost", figure="eval_seconds", default=0.0)
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
of_total("num_dropped", "clients that dropped out on the way", "count", "traffic", figure="num_dropped")
of_total("num_late", "clients that delivered when the round was over", "count", "traffic", figure="num_late")
declare(
    Metric(
        "sum_phases",
        "phases of messages of the secure sum, each up and down; 4: all of them",
        "count",
        "traffic",
    )
)
of_total("sum_messages", "messages of the secure sum", "count", "traffic", figure="sum_messages")
declare(
    Metric(
        "sum_bytes",
        "bytes of the secure sum by phase, up and down; `uplink_bytes` and `downlink_bytes` have them, too",
        "by name",
        "traffic",
    )
)
of_total(
    "num_failed_sums",
    "rounds in which too few clients stayed for the secure sum, so that the adapter stayed as it was",
    "count",
    "traffic",
    figure="num_failed_sums",
)
declare(
    Metric(
        "saturated_fraction",
        "share of the deltas' numbers that were beyond `server.secure_sum.range`, and were set to it",
        "fraction",
        "traffic",
    )
)
declare(
    Metric(
        "cluster_sizes",
        "clients whose updates were averaged in each cluster, where the server keeps several models (ifca)",
        "by name",
        "training",
    )
)
declare(Metric("mean_staleness", "how many rounds old the updates were, in the mean", "number", "traffic"))
of_last(
    "pseudo_label_coverage",
    "share of the cohort's images without a label to which the received adapter gives one with enough probability",
    "fraction",
    "training",
    "pseudo-labels sure",
    "pseudo-labels sure",
)
of_last(
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
figure("wall_seconds", "seconds of the whole run", "seconds")
figure("memory_before_bytes", "memory that the process held before the run", "bytes")
figure("trainable_parameters", "numbers that a client trains", "count", None, "trained")
figure("backbone_parameters", "numbers of the frozen model")
figure("num_unreadable", "images that could not be read")
figure("num_rejected", "updates that were left out", of=lambda records: sum(len(r.rejected_clients) for r in records))
