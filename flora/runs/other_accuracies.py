"""Accuracies of a run's adapter beside the main one: with other templates, on other data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flora.clip.towers.towers import AdaptedClip
from flora.experiment.build import Experiment
from flora.features.features import Features

AccuracyOf = Callable[[AdaptedClip, Features], float]
"""The accuracy of the adapter that is measured, in a model, on images."""


def by_template(experiment: Experiment, accuracy_of: AccuracyOf) -> dict[str, Any]:
    """The accuracies with each of `evaluation.templates` alone, their mean and deviation (n); nothing without any."""
    return _summed_up(
        "template_accuracy",
        {template: accuracy_of(model, experiment.test) for template, model in experiment.by_template.items()},
    )


def on_other_data(experiment: Experiment, accuracy_of: AccuracyOf) -> dict[str, Any]:
    """The accuracies on each data set of `evaluation.also`, their mean and deviation (n); nothing without any."""
    return _summed_up(
        "other_accuracy",
        {name: accuracy_of(other.model, other.features) for name, other in experiment.other_data.items()},
    )


def _summed_up(name: str, accuracies: Mapping[str, float]) -> dict[str, Any]:
    if not accuracies:
        return {}
    values = list(accuracies.values())
    return {name: dict(accuracies), f"{name}_mean": float(np.mean(values)), f"{name}_std": float(np.std(values))}
