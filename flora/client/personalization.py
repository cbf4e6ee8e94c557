"""Personalization: what each client trains for itself alone, besides what it trains for the server."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flora.client.corrections import FedProx, NoCorrection
from flora.client.local_training import LocalTraining
from flora.client.optimizers import Constant
from flora.clip.adapters.base import AttachedAdapter
from flora.clip.adapters.interpolated import Interpolated
from flora.core.registry import Component, option, register


@dataclass(frozen=True)
class Personalization(Component):
    """What each client trains for itself alone. Nothing of it ever reaches the server."""

    has_personal: ClassVar[bool] = False
    """Whether it adds tensors to the adapter that never leave their client."""

    def added_to(self, adapter: AttachedAdapter) -> AttachedAdapter:
        """Return the adapter with the tensors that each client keeps of it for itself, if there are some."""
        return adapter

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


@register("apfl")
@dataclass(frozen=True)
class Apfl(Personalization):
    """A copy v of the adapter at each client, whose model is alpha v + (1 - alpha) w (APFL, arXiv:2003.13461).

    Algorithm 1: in each local step w, which the server averages, moves by its gradient, and v by the gradient of the
    loss at alpha v + (1 - alpha) w with respect to v, on the same examples. Both begin where the server's adapter does.
    If alpha is adapted, it moves by its own gradient there, the product of v - w and the gradient at the mixture, and
    stays between 0 and 1. `local.optimizer` takes all of these steps, so plain sgd is the paper's. The loss that is
    recorded is the sum of both models'.
    Differs from the paper: alpha moves in every local step, not once a round. Differs from the authors' code, which
    mixes logits in place of parameters, takes v's step after w's, and moves alpha by a mean of the gradients of v and
    w in place of that of the mixture, and by a term that draws it to 0.
    """

    has_personal = True

    alpha: float = option(
        "the part that a client's own copy has of its model, at the start", 0.5, at_least=0, at_most=1
    )
    adaptive: bool = option("whether each client learns its alpha", True)

    def added_to(self, adapter: AttachedAdapter) -> AttachedAdapter:
        return Interpolated(adapter, self.alpha, learns_share=self.adaptive)


@register("fine_tuning")
@dataclass(frozen=True)
class FineTuning(Personalization):
    """After the last round each client goes on from the server's adapter, on its own examples, at `learning_rate`."""

    epochs: int = option("passes over a client's examples", 1, at_least=1, at_most=1_000_000)

    def at_end(self, local: LocalTraining) -> LocalTraining | None:
        # A schedule has come to its end by then.
        fresh = replace(local.alone, optimizer_state="fresh", correction=NoCorrection(), schedule=Constant())
        return replace(fresh, epochs=self.epochs, steps=None)
