"""Personalization: what each client trains for itself alone, besides what it trains for the server."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flora.client.corrections import FedProx, NoCorrection
from flora.client.local_training import LocalTraining
from flora.client.optimizers import Constant
from flora.core.registry import Component, option, register


@dataclass(frozen=True)
class Personalization(Component):
    """What each client trains for itself alone. Nothing of it ever reaches the server."""

    def in_round(self, local: LocalTraining) -> LocalTraining | None:
        """Return how clients train adapters of their own in the rounds that they take part in; None if they don't."""
        return None

    def at_end(self, local: LocalTraining) -> LocalTraining | None:
        """Return how all clients train adapters of their own after the last round; None if they don't."""
        return None


@register("none")
@dataclass(frozen=True)
class NoPersonalization(Personalization):
    """Nothing but what the strategy or the adapter leaves with clients."""


@register("ditto")
@dataclass(frozen=True)
class Ditto(Personalization):
    """A second adapter at each client that is drawn towards the server's (arXiv:2012.04221, algorithm 1).

    In each round that it takes part in, a client trains it like the other one, on its loss plus weight / 2 times the
    squared distance from what the server sent. What the server sees and does is as without.
    """

    weight: float = option("weight of the squared distance from the server's adapter, lambda", 0.1, at_least=0)

    def in_round(self, local: LocalTraining) -> LocalTraining | None:
        return replace(local.alone, optimizer_state="fresh", correction=FedProx(mu=self.weight))


@register("fine_tuning")
@dataclass(frozen=True)
class FineTuning(Personalization):
    """After the last round each client goes on from the server's adapter, on its own examples, at `learning_rate`."""

    epochs: int = option("passes over a client's examples", 1, at_least=1, at_most=1_000_000)

    def at_end(self, local: LocalTraining) -> LocalTraining | None:
        # A schedule has come to its end by then.
        fresh = replace(local.alone, optimizer_state="fresh", correction=NoCorrection(), schedule=Constant())
        return replace(fresh, epochs=self.epochs, steps=None)
