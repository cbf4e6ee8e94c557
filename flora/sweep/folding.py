"""Which runs of a sweep can share their steps, and so train together in one process."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from flora.config.schema import ExperimentConfig
from flora.core.devices import choose_device

# Runs that train together unless the user says how many; more would hardly be faster.
MOST_TOGETHER = 64


def why_alone(config: ExperimentConfig) -> str | None:
    """Why a run can share steps with no other; None if it can."""
    server, local, cache = config.server, config.local, config.cache
    reasons = {
        "adapter is as large as the model": config.adapter.is_large,
        "cache.enabled: false computes the features of images at each use": cache.enabled is False,
        "local.augmentation changes images at each use": local.augmentation.changes_images,
        "local.self_training needs images of its own": local.active_self_training is not None,
        "the server trains, too": any((server.synthetic, server.distillation, server.text_rounds)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def fold_key(config: ExperimentConfig) -> Hashable:
    """The key of a run: runs with the same one can share their steps."""
    seed = config.seed if config.backbone.weights == "random" else None
    model = config.backbone, config.adapter, config.prompts, config.speed, str(choose_device(config.device))
    images = config.data, config.split, config.cache
    step = config.local.step_key, config.clients.per_block, config.threads
    return seed, repr((model, images, step)), config.evaluation.patches is not None


def foldable(configs: Sequence[ExperimentConfig], *, most: int, jobs: int) -> list[tuple[ExperimentConfig, ...]]:
    """The runs in groups that train together: up to `most` in one, and so many groups that `jobs` have work."""
    groups: dict[Hashable, list[ExperimentConfig]] = {}
    for config in configs:
        is_alone = most == 1 or why_alone(config) is not None
        groups.setdefault(config.name if is_alone else fold_key(config), []).append(config)
    if len(groups) < jobs:
        most = min(most, -(-len(configs) // jobs))
    return [tuple(group[start : start + most]) for group in groups.values() for start in range(0, len(group), most)]


def described(groups: Sequence[Sequence[ExperimentConfig]]) -> list[str]:
    """Lines that say which runs train together, and why others don't."""
    lines = [f"{len(group)} runs train together: {_names(group)}" for group in groups if len(group) > 1]
    alone: dict[str, list[ExperimentConfig]] = {}
    for config, *others in groups:
        if not others:
            alone.setdefault(why_alone(config) or "no other one here has the same steps", []).append(config)
    return lines + [f"by itself: {_names(configs)}: {reason}" for reason, configs in alone.items()]


def _names(configs: Sequence[ExperimentConfig]) -> str:
    first, last = configs[0].name, configs[-1].name
    return first if len(configs) == 1 else f"{first} ... {last}" if len(configs) > 2 else f"{first}, {last}"
