"""A rule of what combines with what, and what several rules ask of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flora.config.schema import ExperimentConfig
from flora.server.aggregators import Mean
from flora.server.optimizers import ServerSgd


@dataclass(frozen=True)
class Rule:
    """What can't be together: where `refuses` says so, an error names `setting` and says `message`.

    `message` may have the names of the configuration's components in braces: {strategy}, {aggregator}, {correction},
    {personal}, {adapter}, {objective}, {sampling}, {penalty}. `what` is the rule in words, for a reader of the docs.
    """

    setting: str
    what: str
    refuses: Callable[[ExperimentConfig], bool]
    message: str


def remembers(config: ExperimentConfig) -> bool:
    """Whether the correction has a memory at the clients and the server."""
    return bool(config.local.correction.memory(torch.empty(1)))


def is_plain_mean(config: ExperimentConfig) -> bool:
    return (config.server.aggregator, config.server.optimizer) == (Mean(), ServerSgd())


def has_personal(config: ExperimentConfig) -> bool:
    """Whether some tensors stay with their clients."""
    return keeps_own(config) or config.personal.has_personal


def keeps_own(config: ExperimentConfig) -> bool:
    """Whether the strategy or the adapter leaves some tensors with their clients."""
    return config.server.strategy.has_personal or config.adapter.has_personal


def trains_own(config: ExperimentConfig) -> bool:
    """Whether clients train a second adapter in each round."""
    return config.personal.in_round(config.local) is not None


def has_second(config: ExperimentConfig) -> bool:
    """Whether clients have a second adapter, or a copy of its tensors, from round to round."""
    return trains_own(config) or config.personal.has_personal


def waits_for_buffer(config: ExperimentConfig) -> bool:
    return config.server.schedule.waits_for_buffer


def server_trains(config: ExperimentConfig) -> bool:
    """Whether the server trains the adapter by itself."""
    return any((config.server.synthetic, config.server.distillation, config.server.text_rounds))
