"""What is written down of a run: rejected updates, evaluations, the record of a round, the summary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rejection:
    """A client whose update was left out of a round: why, and at which of its steps it failed, if that is known."""

    client: int
    step: int | None
    reason: str


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Results of one adapter on a set of examples: `correct` (bool) and `losses` (float64), both `(N,)`."""

    correct: np.ndarray
    losses: np.ndarray

    @property
    def accuracy(self) -> float:
        """The fraction that is right; NaN without examples."""
        return float(self.correct.mean()) if len(self.correct) else float("nan")

    @property
    def loss(self) -> float:
        """The mean loss; NaN without examples."""
        return float(self.losses.mean()) if len(self.losses) else float("nan")


@dataclass(frozen=True)
class RoundRecord:
    """One line of `rounds.jsonl`. Fractions are 0 to 1; round 0 is zero-shot and has neither training nor traffic.

    `cohort` are the ids of the `num_clients` clients whose updates came, those in `rejected_clients` included; None in
    a record of a version that did not say.
    `domain_accuracy` is that of test images by the group that the data name for them (a client, a camera).
    `client_accuracy_...` is the server's adapter on clients' own held-out examples, `personal_accuracy_...` that of
    each client's own adapter; `..._weighted_mean` counts a client as often as it has held-out examples. `new_accuracy`
    is on classes that nobody trains on, if some are set aside; `accuracy` is on the others then, and `harmonic_mean`
    that of both. `broadcast_accuracy` is that of what clients would read of the next broadcast, if that is quantised,
    and `model_privacy_gap` by how much the server's own adapter is better.
    `simulated_seconds` is how long the round took on the network's clock; `num_dropped` clients were lost on the way,
    `num_late` delivered when the round was over; `mean_staleness` is how many rounds old the updates were.
    """

    round: int
    accuracy: float | None
    loss: float | None
    train_loss: float | None
    num_clients: int
    uplink_bytes: int
    downlink_bytes: int
    train_seconds: float
    eval_seconds: float
    peak_memory_bytes: int
    learning_rate: float | None = None
    num_steps: int = 0
    num_examples: int = 0
    aggregation_error: float | None = None
    rejected_clients: tuple[Rejection, ...] = ()
    class_accuracy: dict[str, float | None] | None = None
    client_accuracy_mean: float | None = None
    client_accuracy_std: float | None = None
    client_accuracy_worst_decile: float | None = None
    client_accuracy_best_decile: float | None = None
    personal_accuracy_mean: float | None = None
    personal_accuracy_std: float | None = None
    personal_accuracy_worst_decile: float | None = None
    personal_accuracy_best_decile: float | None = None
    new_accuracy: float | None = None
    harmonic_mean: float | None = None
    broadcast_accuracy: float | None = None
    model_privacy_gap: float | None = None
    simulated_seconds: float | None = None
    num_dropped: int = 0
    num_late: int = 0
    mean_staleness: float | None = None
    cohort: tuple[int, ...] | None = None
    client_accuracy_weighted_mean: float | None = None
    personal_accuracy_weighted_mean: float | None = None
    domain_accuracy: dict[str, float] | None = None


@dataclass(frozen=True)
class Summary:
    """`summary.json`. The result is the LAST round; the best round is chosen on the test set and only shown.

    `seconds_to_accuracy` says of each tenth of accuracy that was reached after how many simulated seconds that was.
    `held_out_...` compare, on the held-out examples of the `held_out_num_clients` clients that were also trained alone,
    the server's adapter with what each reached alone, and with its personal adapter, as means over these clients.
    """

    name: str
    rounds: int
    num_clients: int
    zero_shot_accuracy: float
    last_accuracy: float
    best_accuracy: float
    best_round: int
    alone_accuracy_mean: float | None
    alone_accuracy_best: float | None
    num_alone: int
    client_accuracy_mean: float | None
    client_accuracy_std: float | None
    client_accuracy_worst_decile: float | None
    client_accuracy_best_decile: float | None
    personal_accuracy_mean: float | None
    personal_accuracy_std: float | None
    personal_accuracy_worst_decile: float | None
    personal_accuracy_best_decile: float | None
    zero_shot_new_accuracy: float | None
    new_accuracy: float | None
    harmonic_mean: float | None
    broadcast_accuracy: float | None
    model_privacy_gap: float | None
    aggregation_error_mean: float | None
    simulated_seconds: float | None
    seconds_to_accuracy: dict[str, float] | None
    num_dropped: int
    num_late: int
    total_uplink_bytes: int
    total_downlink_bytes: int
    uplink_bytes_per_client_round: float
    wall_seconds: float
    train_seconds: float
    eval_seconds: float
    peak_memory_bytes: int
    memory_before_bytes: int
    trainable_parameters: int
    backbone_parameters: int
    num_unreadable: int
    num_rejected: int
    client_accuracy_weighted_mean: float | None = None
    personal_accuracy_weighted_mean: float | None = None
    held_out_num_clients: int = 0
    held_out_federated_accuracy: float | None = None
    held_out_alone_accuracy: float | None = None
    held_out_personal_accuracy: float | None = None
    domain_accuracy: dict[str, float] | None = None
