"""The base class of strategies: which tensors clients train, send and keep, and the server's next adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from flora.client.local_training import LocalTraining
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.lora import Lora
from flora.core.registry import Component, OptionError, name_of, option
from flora.core.states import ClientUpdate
from flora.core.tree import State, StateLike


@dataclass(frozen=True)
class Strategy(Component):
    """What of an adapter the clients train and send. A tensor is called by its name in the adapter's state dict.

    `server.aggregator` makes one delta of what they send, `server.optimizer` steps along it.
    """

    alternates: ClassVar[bool] = False
    """Whether the tensors that are trained differ from round to round."""
    restarts: ClassVar[bool] = False
    """Whether what clients train starts anew each round, at random from a seed that all know."""
    changes_basis: ClassVar[bool] = False
    """Whether each round's A and B are other factors of the product than before, so that a number at a place of them,
    or a direction, means nothing in the next round."""
    takes_ranks: ClassVar[bool] = False
    """Whether clients may have ranks of their own."""
    keeps_residual: ClassVar[bool] = False
    """Whether the adapter has residuals."""
    has_personal: ClassVar[bool] = False
    """Whether some tensors stay with their clients."""
    replaces_mean: ClassVar[bool] = False
    """Whether `finalize` starts from the plain mean of the clients, and nothing else."""

    weighting: str = option("what a client's weight is", "examples", choices=("examples", "uniform"))

    def check_fits(self, adapter: Adapter) -> None:
        """Raise `OptionError` if the strategy is for other adapters."""

    def check_names(self, names: Sequence[str]) -> None:
        """Raise `OptionError` if the strategy does not fit an adapter with tensors of these names."""

    def trains(self, name: str, round: int) -> bool:
        """Whether clients train, and send, this tensor in a round, counted from 1. The others are frozen in it."""
        return True

    def stays(self, name: str) -> bool:
        """Whether clients train this tensor, but keep it to themselves: each has its own."""
        return False

    @property
    def num_clusters(self) -> int:
        """How many models the server keeps: each client trains one of them."""
        return 1

    def is_random(self, round: int) -> bool:
        """Whether the clients of a round, counted from 1, take one of several models by chance."""
        return False

    def before_the_others(self, local: LocalTraining) -> LocalTraining | None:
        """Return how clients train what stays with them before they train what they send; None: all of it at once."""
        return None

    def broadcasts(self, name: str) -> bool:
        """Whether the server sends this tensor. What never changes is known to all from a shared seed."""
        return True

    def initial(self, adapter: State) -> State:
        """Return what the server starts from: the adapter, with all that the strategy adds to it."""
        return adapter

    def finalize(self, averaged: State, clients: Sequence[StateLike], weights: Sequence[float]) -> State:
        """The next adapter, from the one that averaging came to and those that the clients ended with."""
        return averaged

    def weights(self, updates: Sequence[ClientUpdate]) -> list[float]:
        """Return how much each update counts."""
        return [self.weight(update.num_examples) for update in updates]

    def weight(self, num_examples: int) -> float:
        """Return how much a client of so many examples counts."""
        return float(num_examples) if self.weighting == "examples" else 1.0


@dataclass(frozen=True)
class LoraStrategy(Strategy):
    """A strategy that treats A and B differently."""

    def check_fits(self, adapter: Adapter) -> None:
        if not isinstance(adapter, Lora):
            raise OptionError(
                "strategy", f"{name_of(self)} treats A and B differently: expected adapter lora, got {name_of(adapter)}"
            )
