"""What combines with what: one table of rules, each a predicate, the settings that it is about, and a reason.

`check_combinations` reads it, docs/combinations.md is generated from it, and a test runs every pair that it allows.
"""

from __future__ import annotations

from collections.abc import Iterator

from flora.config.combinations.averaging import AVERAGING
from flora.config.combinations.clusters import CLUSTERS
from flora.config.combinations.comparison import COMPARISON
from flora.config.combinations.example_privacy import EXAMPLE_PRIVACY
from flora.config.combinations.privacy import PRIVACY
from flora.config.combinations.rounds import ROUNDS
from flora.config.combinations.rule import Rule
from flora.config.combinations.secure_sums import SECURE_SUMS
from flora.config.combinations.server_training import SERVER_TRAINING
from flora.config.combinations.training import TRAINING
from flora.config.schema import ExperimentConfig
from flora.core.registry import Component, OptionError, name_of

RULES: tuple[Rule, ...] = (
    *AVERAGING,
    *CLUSTERS,
    *ROUNDS,
    *SERVER_TRAINING,
    *TRAINING,
    *COMPARISON,
    *PRIVACY,
    *EXAMPLE_PRIVACY,
    *SECURE_SUMS,
)
"""A rule that begins with "and" or "nor" goes on with the one before it."""


def check_combinations(config: ExperimentConfig) -> None:
    """Raise `OptionError` naming a setting for the first rule of the table that refuses the configuration."""
    for rule in RULES:
        if rule.refuses(config):
            raise OptionError(rule.setting, rule.message.format(**dict(_names(config))))


def _names(config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    components: dict[str, Component] = {
        "strategy": config.server.strategy,
        "aggregator": config.server.aggregator,
        "correction": config.local.correction,
        "personal": config.personal,
        "adapter": config.adapter,
        "objective": config.local.objective,
        "sampling": config.local.sampling,
        "penalty": config.local.penalty,
    }
    for key, component in components.items():
        yield key, name_of(component)
