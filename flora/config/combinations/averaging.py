"""What strategies, corrections, personal adapters and ranks of the clients combine with."""

from __future__ import annotations

from flora.client.local_training import LocalTraining
from flora.clip.adapters.lora import Lora
from flora.config.combinations.rule import (
    Rule,
    has_personal,
    has_second,
    is_plain_mean,
    keeps_own,
    remembers,
)
from flora.config.schema import ExperimentConfig
from flora.server.aggregators import Mean
from flora.server.strategies.base import Strategy

_EXPECT_NO_MEMORY = "expected none or fedprox, because"

AVERAGING: tuple[Rule, ...] = (
    Rule(
        "server.strategy",
        "a strategy that replaces the plain mean (flexlora, lora_fair, flora_stacking, fedex_lora) needs aggregator "
        "mean, server optimizer sgd with its defaults, and no correction that remembers",
        lambda c: c.server.strategy.replaces_mean and (not is_plain_mean(c) or remembers(c)),
        "{strategy} replaces the plain mean: expected aggregator mean, optimizer sgd with its defaults, and no "
        "correction that the server remembers",
    ),
    Rule(
        "local.optimizer_state",
        "an optimiser's state can't be kept where the strategy trains other tensors from round to round (rolora)",
        lambda c: c.local.optimizer_state == "kept" and c.server.strategy.alternates,
        "expected fresh, because the strategy trains other tensors from round to round",
    ),
    Rule(
        "local.optimizer_state",
        "nor where what clients train starts anew each round (flora_stacking)",
        lambda c: c.local.optimizer_state == "kept" and c.server.strategy.restarts,
        "expected fresh, because the strategy starts anew each round",
    ),
    Rule(
        "local.optimizer_state",
        "nor where A and B get another basis each round (flexlora)",
        lambda c: c.local.optimizer_state == "kept" and c.server.strategy.changes_basis,
        "expected fresh, because the strategy gives A and B another basis each round",
    ),
    Rule(
        "local.optimizer_state",
        "nor where clients train what stays with them and what they send one after the other (fedrep)",
        lambda c: c.local.optimizer_state == "kept" and _has_phases(c),
        "expected fresh, because clients train what stays with them and what they send one after the other",
    ),
    Rule(
        "server.strategy",
        "a strategy that has clients train what stays first (fedrep) needs an adapter that keeps nothing by itself",
        lambda c: _has_phases(c) and c.adapter.has_personal,
        "{strategy} says what stays and is trained first: expected an adapter that keeps nothing by itself, got "
        "{adapter}",
    ),
    Rule(
        "local.privacy",
        "and no private gradients: what travels is trained beside tensors that no noise covers",
        lambda c: _has_phases(c) and c.local.privacy is not None,
        "expected none, because with {strategy} what travels is trained beside tensors that were trained before",
    ),
    Rule(
        "communication.error_feedback",
        "error feedback needs a strategy that trains the same tensors each round and does not replace the mean",
        lambda c: c.communication.error_feedback and (c.server.strategy.alternates or c.server.strategy.replaces_mean),
        "expected false, because what is lost of one round's factors is no part of the next one's",
    ),
    Rule(
        "communication.upload",
        "a correction that reads deltas (feddyn) needs uploads that lose nothing",
        lambda c: c.local.correction.reads_deltas and not c.communication.upload.is_identity,
        "expected none, because {correction} reads the deltas themselves",
    ),
    Rule(
        "communication.broadcast",
        "a strategy with a residual (flora_stacking, fedex_lora) needs a broadcast that loses nothing",
        lambda c: c.server.strategy.keeps_residual and not c.communication.broadcast.is_identity,
        "expected none, because the strategy sends a residual",
    ),
    Rule(
        "local.correction",
        "a correction that remembers (scaffold, feddyn) needs the same trained tensors each round",
        lambda c: remembers(c) and c.server.strategy.alternates,
        f"{_EXPECT_NO_MEMORY} the strategy trains other tensors from round to round",
    ),
    Rule(
        "local.correction",
        "and no tensors that stay with their clients (fedsa_lora, plora, dual_lora)",
        lambda c: remembers(c) and has_personal(c),
        f"{_EXPECT_NO_MEMORY} some tensors stay with their clients",
    ),
    Rule(
        "local.correction",
        "and no clients' own ranks",
        lambda c: remembers(c) and c.clients.ranks is not None,
        f"{_EXPECT_NO_MEMORY} clients have ranks of their own",
    ),
    Rule(
        "server.screening.policy",
        "and no clipping of updates",
        lambda c: remembers(c) and c.server.screening.policy == "clip",
        "expected skip or abort, because {correction} remembers what clip takes away",
    ),
    Rule(
        "server.aggregator",
        "and the aggregator mean",
        lambda c: remembers(c) and c.server.aggregator != Mean(),
        "expected mean, because {correction} remembers the mean over all clients, those that {aggregator} leaves out "
        "or scales down included",
    ),
    Rule(
        "local.correction",
        "and a strategy that weighs each client by itself (a method `weight`, not `weights`)",
        lambda c: remembers(c) and type(c.server.strategy).weights is not Strategy.weights,
        "expected none or fedprox, because {correction} needs the weights of all clients, and {strategy} has `weights` "
        "of its own: give it a `weight` instead",
    ),
    Rule(
        "personal",
        "ditto and apfl need an adapter of which no tensor stays with its client anyway",
        lambda c: has_second(c) and keeps_own(c),
        "{personal} can't be used, because some of the adapter's tensors stay with their clients anyway",
    ),
    Rule(
        "personal",
        "and a strategy that keeps the basis of A and B",
        lambda c: has_second(c) and c.server.strategy.changes_basis,
        "{personal} can't be used, because the strategy gives A and B another basis each round, and a distance from "
        "them means nothing",
    ),
    Rule(
        "personal",
        "and one without a residual",
        lambda c: has_second(c) and c.server.strategy.keeps_residual,
        "{personal} can't be used, because the strategy restarts or corrects the adapter by a residual",
    ),
    Rule(
        "personal",
        "apfl, whose copies share their steps, needs steps in which each has its own gradient alone: no "
        "local.clip_norm, no local.privacy, no correction",
        lambda c: c.personal.has_personal and _couples_gradients(c.local),
        "{personal} can't be used with local.clip_norm, local.privacy or local.correction, which would make the step "
        "of what travels depend on what stays",
    ),
    Rule(
        "adapter.start",
        "and copies that begin at random, as the adapter does",
        lambda c: c.personal.has_personal and isinstance(c.adapter, Lora) and bool(c.adapter.start),
        "expected none, because the copies of {personal} begin where an adapter without a file does",
    ),
    Rule(
        "clients.ranks",
        "and no clients' own ranks",
        lambda c: c.personal.has_personal and c.clients.ranks is not None,
        "expected none, because the copies of {personal} have all ranks",
    ),
    Rule(
        "clients.ranks",
        "clients' own ranks need adapter lora",
        lambda c: c.clients.ranks is not None and not isinstance(c.adapter, Lora),
        "expected adapter lora, got {adapter}",
    ),
    Rule(
        "clients.ranks",
        "and a strategy for factors of different sizes (hetlora, flexlora, flora_stacking)",
        lambda c: c.clients.ranks is not None and not c.server.strategy.takes_ranks,
        "{strategy} has no rule for factors of different sizes: expected server.strategy hetlora, flexlora or "
        "flora_stacking",
    ),
    Rule(
        "clients.ranks",
        "and the plain mean",
        lambda c: c.clients.ranks is not None and not is_plain_mean(c),
        "expected server.aggregator mean and server.optimizer sgd with its defaults",
    ),
    Rule(
        "clients.ranks",
        "and communication that loses nothing",
        lambda c: c.clients.ranks is not None and not c.communication.is_exact,
        "expected communication.broadcast and communication.upload to lose nothing",
    ),
)


def _has_phases(config: ExperimentConfig) -> bool:
    """Whether clients train what stays with them before what they send."""
    return config.server.strategy.before_the_others(config.local) is not None


def _couples_gradients(local: LocalTraining) -> bool:
    """Whether a tensor's step depends on more than its gradient: on those of others, or on where it began."""
    return local.clip_norm is not None or local.privacy is not None or not local.correction.is_idle
