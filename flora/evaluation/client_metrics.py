"""The metrics of clients: accuracies on their own data, with their own adapters, without the others."""

from __future__ import annotations

from flora.evaluation.declaring import figure, figures_of_spread, of_first_and_last, of_last

figures_of_spread(
    "client_accuracy",
    "the server's adapter (with ifca its client's cluster's)",
    {"mean": "on clients' own data", "worst_decile": "worst tenth"},
)
figures_of_spread(
    "personal_accuracy",
    "each client's own adapter",
    {"mean": "personal adapters", "worst_decile": "worst tenth of these"},
)
of_last(
    "unheld_accuracy",
    "mean over clients of the accuracy on the test images of classes of which a client has no training example",
    "fraction",
    "server",
    "classes not held",
)
of_first_and_last(
    "unseen_accuracy",
    "mean over the clients that never train (`clients.held_out_fraction`) of the accuracy of the server's adapter on "
    "the examples that each holds out",
    ("clients not seen", "clients not seen"),
)
of_first_and_last(
    "unseen_tuned_accuracy",
    "the same of what one pass of fine-tuning on a client's training examples makes of the adapter",
    ("not seen, one pass", "not seen, one pass"),
    has_frozen=False,
)
of_first_and_last(
    "held_class_accuracy",
    "mean over clients of the accuracy of each one's adapter on the test images of the classes that it holds, told "
    "apart among these, with `evaluation.held_classes`",
    ("held classes", "held classes"),
)
of_first_and_last(
    "other_class_accuracy",
    "the same on the test images of the classes that only others hold, told apart among those",
    ("others' classes", "others' classes"),
)
of_last(
    "held_other_harmonic_mean",
    "harmonic mean of `held_class_accuracy` and `other_class_accuracy`",
    "fraction",
    "clients",
    "mean of both",
    "mean of both",
)
figure("num_unseen", "clients that never train")
figure("num_local_only", "clients that were also trained without the others")
figure(
    "local_only_accuracy_mean", "their mean accuracy on the common test images", "fraction", None, "one client alone"
)
figure("local_only_accuracy_best", "the best one's", "fraction")
figure(
    "local_only_unheld_accuracy",
    "their mean accuracy on the test images of classes of which each has no training example",
    "fraction",
    None,
    "alone, classes not held",
)
figure(
    "personal_unheld_accuracy",
    "the same of their own adapters of the federated run, where clients have some",
    "fraction",
    None,
    "personal, classes not held",
)
figure(
    "centralized_accuracy",
    "accuracy on the common test images after training on all images in one place, with `evaluation.centralized`",
    "fraction",
    None,
    "all in one place",
)
figure("held_out_num_clients", "those of them that have held-out examples")
figure("held_out_federated_accuracy", "mean over these of the server's adapter on their own data", "fraction")
figure(
    "held_out_local_only_accuracy",
    "mean over these of what each reaches alone, on its own data",
    "fraction",
)
figure("held_out_personal_accuracy", "mean over these of their own adapters of the federated run", "fraction")
figure("held_out_centralized_accuracy", "mean over these of training on all images in one place", "fraction")
