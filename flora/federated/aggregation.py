"""How the server turns the cohort's updates into the next adapter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from flora import tree
from flora.records import ClientUpdate
from flora.registry import Component, option, register
from flora.tree import State


@dataclass(frozen=True)
class Strategy(Component):
    """How the server turns the cohort's updates into the next adapter."""

    def init(self, adapter: State) -> State:
        """What the strategy remembers between rounds, at the start: tensors by name."""
        return {}

    @abstractmethod
    def combine(self, updates: Sequence[ClientUpdate]) -> State:
        """One delta from the cohort's updates, which come in the order of client ids."""

    def step(self, adapter: State, delta: State, state: State) -> tuple[State, State]:
        """The next adapter and the next strategy state."""
        return tree.add(adapter, delta), state


@register("fedavg")
@dataclass(frozen=True)
class FedAvg(Strategy):
    """The mean of the adapters, A and B each by itself (arXiv:1602.05629, algorithm 1; arXiv:2404.15182)."""

    weighting: str = option("what a client's weight is", "examples", choices=("examples", "uniform"))

    def combine(self, updates: Sequence[ClientUpdate]) -> State:
        weights = [update.num_examples if self.weighting == "examples" else 1 for update in updates]
        return tree.weighted_mean((update.delta for update in updates), weights)
