"""Put the canaries of a configuration into an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flora.core.hooks import Hooks
from flora.core.rng import Rng
from flora.core.states import ClientData
from flora.features.features import Features
from flora.privacy.canaries import Canaries, Coins


@dataclass(frozen=True, eq=False)
class PlantedCanaries:
    """The canaries of an experiment and what their coins say."""

    canaries: Canaries
    coins: Coins

    @property
    def hooks(self) -> Hooks:
        """Hooks that replace what canary clients send."""
        return Hooks(update=lambda round, update: self.canaries.update(update, self.coins))

    def relabelled(self, features: Features, num_classes: int) -> Features:
        """Return the training examples with the labels that they are trained with."""
        labels = self.canaries.labels(features.labels.numpy(), num_classes, self.coins)
        return features.with_labels(torch.from_numpy(labels))

    def to_dict(self) -> dict[str, Any]:
        """Which canaries there are and which of them are in, as JSON types."""
        coins = self.coins
        return {"unit": self.canaries.unit, "ids": coins.ids.tolist(), "was_in": coins.was_in.tolist()}


def planted(
    canaries: Canaries | None, clients: Sequence[ClientData], rng: Rng
) -> tuple[PlantedCanaries | None, list[ClientData]]:
    """Flip the coins of `canaries`, and return them with what clients hold then; None if there are no canaries."""
    if canaries is None:
        return None, list(clients)
    coins = canaries.flip(clients, rng)
    return PlantedCanaries(canaries, coins), canaries.deal(clients, coins)
