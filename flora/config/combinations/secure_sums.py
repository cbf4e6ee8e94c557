"""What a secure sum combines with: all that needs no client's update by itself."""

from __future__ import annotations

from flora.config.combinations.rule import Rule, remembers, waits_for_buffer
from flora.config.schema import ExperimentConfig
from flora.privacy.bounds import ClipNorm
from flora.server.aggregators import Mean
from flora.server.strategies.base import Strategy


def _is_secure(config: ExperimentConfig) -> bool:
    return config.server.secure_sum is not None


def _reads_single_updates(strategy: Strategy) -> bool:
    """Whether the server's next adapter, or the weights, come from what single clients ended with."""
    kind = type(strategy)
    return strategy.replaces_mean or kind.finalize is not Strategy.finalize or kind.weights is not Strategy.weights


_EXPECT_NONE = "expected none, because the server sees no client's update:"

SECURE_SUMS: tuple[Rule, ...] = (
    Rule(
        "server.secure_sum",
        "a secure sum, in which the server sees no client's update, needs the aggregator mean",
        lambda c: _is_secure(c) and c.server.aggregator != Mean(),
        f"{_EXPECT_NONE} server.aggregator {{aggregator}} compares single ones",
    ),
    Rule(
        "server.secure_sum",
        "and a strategy that needs the mean alone (no flexlora, lora_fair, flora_stacking, fedex_lora)",
        lambda c: _is_secure(c) and _reads_single_updates(c.server.strategy),
        f"{_EXPECT_NONE} server.strategy {{strategy}} needs what each client ended with",
    ),
    Rule(
        "server.secure_sum",
        "and no bound on norms",
        lambda c: _is_secure(c) and c.server.screening.max_norm_ratio is not None,
        f"{_EXPECT_NONE} server.screening.max_norm_ratio compares their norms",
    ),
    Rule(
        "server.secure_sum",
        "and no correction that remembers",
        lambda c: _is_secure(c) and remembers(c),
        f"{_EXPECT_NONE} local.correction {{correction}} sends more than a delta, or remembers each one",
    ),
    Rule(
        "server.secure_sum",
        "and no clients' own ranks, which say of an update who it is of",
        lambda c: _is_secure(c) and c.clients.ranks is not None,
        f"{_EXPECT_NONE} with clients.ranks each has other zeros, and masks would hide them",
    ),
    Rule(
        "server.secure_sum",
        "and uploads that are not compressed: a sum of words needs all of them, in the ring",
        lambda c: _is_secure(c) and not c.communication.upload.is_identity,
        "expected none, because communication.upload writes other numbers than words that can be added up under masks",
    ),
    Rule(
        "server.secure_sum",
        "and no distillation, whose teachers are single clients",
        lambda c: _is_secure(c) and c.server.distillation is not None,
        f"{_EXPECT_NONE} in server.distillation each one teaches",
    ),
    Rule(
        "server.secure_sum",
        "and a cohort that is there at the same time: no buffered schedule",
        lambda c: _is_secure(c) and waits_for_buffer(c),
        "expected none: clients agree on masks with those of their round, and a buffered schedule has none",
    ),
    Rule(
        "privacy.clip_norm",
        "and with differential privacy a bound that does not adapt: how many updates lay within it is in no sum",
        lambda c: _is_secure(c) and c.privacy is not None and isinstance(c.privacy.clip_norm, ClipNorm),
        "expected a number with server.secure_sum: nobody counts the updates that lie within a bound that adapts",
    ),
    Rule(
        "server.secure_sum",
        "and more than one client",
        lambda c: _is_secure(c) and c.clients.centralized,
        "expected none where clients.centralized leaves one client: its sum would be its update",
    ),
    Rule(
        "privacy",
        "noise that clients share (distributed_discrete_gaussian) needs a secure sum",
        lambda c: c.privacy is not None and c.privacy.noises_in_sum and not _is_secure(c),
        "expected server.secure_sum with distributed_discrete_gaussian: without one the server sees each client's "
        "share of the noise",
    ),
)
