"""What a server with several models, one for each cluster of clients, combines with."""

from __future__ import annotations

from flora.client.personalization import NoPersonalization
from flora.config.combinations.rule import Rule, remembers, server_trains, waits_for_buffer
from flora.config.schema import ExperimentConfig


def _has_clusters(config: ExperimentConfig) -> bool:
    return config.server.strategy.num_clusters > 1


CLUSTERS: tuple[Rule, ...] = (
    Rule(
        "server.strategy",
        "several models at the server (ifca) need clients that have no adapter of their own",
        lambda c: _has_clusters(c) and (c.adapter.has_personal or c.personal != NoPersonalization()),
        "{strategy} gives each client one of several models: expected an adapter that keeps nothing, and personal none",
    ),
    Rule(
        "server.strategy",
        "and that remember nothing of the model that they had before",
        lambda c: (
            _has_clusters(c) and (remembers(c) or c.local.optimizer_state == "kept" or c.communication.error_feedback)
        ),
        "{strategy} gives a client another model than before: expected no error feedback, local.optimizer_state fresh, "
        "local.correction none or fedprox",
    ),
    Rule(
        "server.strategy",
        "and a server that sees whose update is of which: no privacy, local.privacy, secure sum or canaries",
        lambda c: _has_clusters(c) and any((c.privacy, c.local.privacy, c.server.secure_sum, c.canaries)),
        "{strategy} can't be used with privacy, local.privacy, server.secure_sum or canaries: a cluster's number tells "
        "of its client's examples",
    ),
    Rule(
        "server.strategy",
        "and that trains none of them by itself",
        lambda c: _has_clusters(c) and server_trains(c),
        "{strategy} keeps several models: expected no server.synthetic, server.distillation or server.text_rounds",
    ),
    Rule(
        "server.schedule",
        "and waits for its cohort",
        lambda c: _has_clusters(c) and waits_for_buffer(c),
        "expected synchronous, because with {strategy} an update is of the model that its client took in its round",
    ),
    Rule(
        "evaluation.predictions",
        "and no table of predictions, which are one model's",
        lambda c: _has_clusters(c) and c.evaluation.predictions > 0,
        "expected 0, because with {strategy} the server has no single model",
    ),
    Rule(
        "clients.held_out_fraction",
        "and no clients that never train, who have no cluster",
        lambda c: _has_clusters(c) and c.clients.held_out_fraction > 0,
        "expected 0, because with {strategy} the server has a model for each cluster of those who train",
    ),
    Rule(
        "evaluation.held_classes",
        "nor accuracies by the classes that clients hold",
        lambda c: _has_clusters(c) and c.evaluation.held_classes,
        "expected false, because with {strategy} the server has no single model",
    ),
)
