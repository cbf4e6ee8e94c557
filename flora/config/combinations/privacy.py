"""What differential privacy of clients combines with: nothing that reads single updates, or is told of them."""

from __future__ import annotations

from flora.config.combinations.rule import Rule, remembers, waits_for_buffer
from flora.config.schema import ExperimentConfig
from flora.privacy.banded import Banded
from flora.server.aggregators import Mean
from flora.server.strategies.base import Strategy

PRIVACY: tuple[Rule, ...] = (
    Rule(
        "server.strategy",
        "differential privacy of clients (privacy) needs a strategy that reads nothing but the mean",
        lambda c: c.privacy is not None and type(c.server.strategy).finalize is not Strategy.finalize,
        "{strategy} reads what single clients ended with, which no noise covers: expected one that reads the mean "
        "alone (fedavg, ffa_lora, rolora, fedsa_lora) with privacy",
    ),
    Rule(
        "server.aggregator",
        "and the aggregator mean",
        lambda c: c.privacy is not None and c.server.aggregator != Mean(),
        "expected mean with privacy: with {aggregator} one client moves others' updates in or out of what is released",
    ),
    Rule(
        "local.correction",
        "and no correction that remembers",
        lambda c: c.privacy is not None and remembers(c),
        "expected none or fedprox with privacy: the server's memory of {correction} is a sum that no noise covers",
    ),
    Rule(
        "clients.ranks",
        "and no clients' own ranks",
        lambda c: c.privacy is not None and c.clients.ranks is not None,
        "expected none with privacy: which ranks are averaged depends on who takes part",
    ),
    Rule(
        "server.screening.max_norm_ratio",
        "and no bound that depends on the other updates",
        lambda c: c.privacy is not None and c.server.screening.max_norm_ratio is not None,
        "expected none with privacy: a median of the cohort's norms lets one client decide about others",
    ),
    Rule(
        "server.screening.policy",
        "and no run that one client's update ends",
        lambda c: c.privacy is not None and c.server.screening.policy == "abort",
        "expected skip with privacy: whether the run ends would tell of one client",
    ),
    Rule(
        "server.schedule",
        "and a schedule that waits for its cohort",
        lambda c: c.privacy is not None and waits_for_buffer(c),
        "expected synchronous with privacy: how often a client is in a buffer depends on how fast the others are",
    ),
    Rule(
        "server.stragglers.over_selection",
        "and a server that waits for all whom it asks, or until a deadline",
        lambda c: c.privacy is not None and c.server.stragglers.over_selection > 1,
        "expected 1 with privacy: whose updates are the first depends on all clients' data",
    ),
    Rule(
        "server.distillation",
        "and no lessons from single clients",
        lambda c: c.privacy is not None and c.server.distillation is not None,
        "expected none with privacy: the teachers are single clients' adapters, which no noise covers",
    ),
    Rule(
        "clients.cohort",
        "and cohorts that don't depend on clients' data",
        lambda c: c.privacy is not None and c.clients.cohort.reads_sizes,
        "expected uniform, poisson, dynamic or in_turn with privacy: by_size looks at the clients' data",
    ),
    Rule(
        "privacy",
        "noise that rounds share (privacy tree, banded) needs a strategy that sends the same tensors each round",
        lambda c: c.privacy is not None and c.privacy.same_tensors and c.server.strategy.alternates,
        "tree and banded can't be used, because the strategy trains other tensors from round to round than the noise "
        "before was for",
    ),
    Rule(
        "privacy.bands",
        "noise of several bands (privacy banded) needs cohorts in turn (clients.cohort in_turn)",
        lambda c: isinstance(c.privacy, Banded) and c.privacy.bands > 1 and not c.clients.cohort.takes_turns,
        "expected 1, or clients.cohort in_turn: with other cohorts a client may take part in every round, and then "
        "noise that rounds share is worse than independent noise",
    ),
    Rule(
        "privacy.publish",
        "figures that are left out (privacy.publish: false) are not to be asked for",
        lambda c: c.privacy is not None and not c.privacy.publish and _asks_for_clients(c),
        "expected true, or none of evaluation.num_local_only, evaluation.predictions, evaluation.held_classes and "
        "clients.held_out_fraction: they tell of single clients",
    ),
    Rule(
        "clients.cohort",
        "cohorts in turn (in_turn) need clients that are always there: no network",
        lambda c: c.clients.cohort.takes_turns and c.network is not None,
        "in_turn can't be used with a network: whose turn it is may be away",
    ),
    Rule(
        "clients.cohort",
        "cohorts of varying size (poisson) need a server that waits for its cohort, and asks nobody in reserve",
        lambda c: c.clients.cohort.varies and (waits_for_buffer(c) or c.server.stragglers.over_selection > 1),
        "poisson draws how many clients there are: expected no buffered schedule and no over_selection",
    ),
)


def _asks_for_clients(config: ExperimentConfig) -> bool:
    asked = config.evaluation
    return bool(asked.num_local_only or asked.predictions or asked.held_classes or config.clients.held_out_fraction)
