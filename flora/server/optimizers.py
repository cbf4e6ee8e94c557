"""Server optimizers: step the adapter along the combined delta (arXiv:2003.00295, algorithm 2)."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch

from flora.core import tree
from flora.core.registry import Component, option, register
from flora.core.tree import State


@dataclass(frozen=True)
class ServerOptimizer(Component):
    """How the server steps along the combined delta."""

    learning_rate: float = option("step size", 1.0, above=0)

    def init(self, adapter: State) -> State:
        """Return what is remembered between rounds, at the start: tensors by name."""
        return {}

    @abstractmethod
    def step(self, adapter: State, delta: State, state: State) -> tuple[State, State]:
        """The next adapter and state. Tensors that have no delta, and what is remembered of them, stay as they are."""

    def continued(self, adapter: State, state: State) -> State:
        """The adapter that the next round goes on from: the server's, unless that is a mean over rounds."""
        return adapter

    def released(self, before: State, adapter: State, state: State, round: int) -> tuple[State, State]:
        """The server's adapter after a round, counted from 1, and the next state.

        `adapter` is what the round has come to, `before` the server's adapter before it.
        """
        return adapter, state


@register("sgd")
@dataclass(frozen=True)
class ServerSgd(ServerOptimizer):
    """adapter + learning_rate * delta: the mean itself (FedAvg), or with a momentum FedAvgM (arXiv:1909.06335)."""

    momentum: float = option("share of the last step that is kept", 0.0, at_least=0, below=1)

    def init(self, adapter: State) -> State:
        return {f"momentum.{name}": torch.zeros_like(tensor) for name, tensor in adapter.items() if self.momentum}

    def step(self, adapter: State, delta: State, state: State) -> tuple[State, State]:
        if self.momentum:
            delta = {name: self.momentum * state[f"momentum.{name}"] + own for name, own in delta.items()}
            state = {**state, **{f"momentum.{name}": own for name, own in delta.items()}}
        return {**adapter, **tree.add({name: adapter[name] for name in delta}, delta, self.learning_rate)}, state


@register("gaussian_average")
@dataclass(frozen=True)
class GaussianAverage(ServerSgd):
    """As sgd, but the server's adapter is a Gaussian-weighted mean over rounds (PromptSRC, arXiv:2307.06948).

    Round t of T counts g_t / (g_1 + ... + g_T), where g_t = exp(-(t - mean)^2 / (2 std^2)) (section 3.2.2, where it is
    epochs). Clients go on from what the last round came to, not from the mean. Differs from the paper: after each round
    it is the mean of the rounds so far; there it is computed once, after the last one, and the same then.
    """

    mean: float = option("the round that counts most", 15.0)
    std: float = option("how many rounds on either side count, as a standard deviation", 1.0, above=0)

    def init(self, adapter: State) -> State:
        return super().init(adapter) | {f"last.{name}": tensor.clone() for name, tensor in adapter.items()}

    def continued(self, adapter: State, state: State) -> State:
        return {**adapter, **{name: state[f"last.{name}"] for name in adapter}}

    def released(self, before: State, adapter: State, state: State, round: int) -> tuple[State, State]:
        share = self.share(round)
        averaged = {name: torch.lerp(before[name], tensor, share) for name, tensor in adapter.items()}
        return averaged, {**state, **{f"last.{name}": tensor for name, tensor in adapter.items()}}

    def share(self, round: int) -> float:
        """How much a round counts in the mean of those up to it: g_t / (g_1 + ... + g_t)."""
        logs = [-((each - self.mean) ** 2) / (2 * self.std**2) for each in range(1, round + 1)]
        most = max(logs)
        return math.exp(logs[-1] - most) / sum(math.exp(each - most) for each in logs)


@dataclass(frozen=True)
class Adaptive(ServerOptimizer):
    """Steps of m / (sqrt(v) + tau), with m the dynamic mean of deltas; subclasses say what v is (arXiv:2003.00295).

    As there m is not corrected for its start at 0, and v starts at tau squared.
    """

    learning_rate: float = option("step size", 0.1, above=0)
    beta1: float = option("decay of the mean of deltas", 0.9, at_least=0, below=1)
    tau: float = option("added to the denominator: how adaptive it is", 1e-3, above=0)

    def init(self, adapter: State) -> State:
        mean = {f"mean.{name}": torch.zeros_like(tensor) for name, tensor in adapter.items()}
        return mean | {f"square.{name}": torch.full_like(tensor, self.tau**2) for name, tensor in adapter.items()}

    @abstractmethod
    def square(self, before: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Return the next v, from the one `before` and the delta, all three of one shape."""

    def step(self, adapter: State, delta: State, state: State) -> tuple[State, State]:
        adapter, state = dict(adapter), dict(state)
        for name, own in delta.items():
            mean = self.beta1 * state[f"mean.{name}"] + (1 - self.beta1) * own
            square = self.square(state[f"square.{name}"], own)
            adapter[name] = adapter[name] + self.learning_rate * mean / (square.sqrt() + self.tau)
            state[f"mean.{name}"], state[f"square.{name}"] = mean, square
        return adapter, state


@register("adagrad")
@dataclass(frozen=True)
class ServerAdagrad(Adaptive):
    """FedAdagrad: v is the sum of squared deltas (arXiv:2003.00295)."""

    def square(self, before: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return before + delta.square()


@register("adam")
@dataclass(frozen=True)
class ServerAdam(Adaptive):
    """FedAdam: v is the dynamic mean of squared deltas (arXiv:2003.00295)."""

    beta2: float = option("decay of the mean of squared deltas", 0.99, at_least=0, below=1)

    def square(self, before: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return self.beta2 * before + (1 - self.beta2) * delta.square()


@register("yogi")
@dataclass(frozen=True)
class ServerYogi(Adaptive):
    """FedYogi: v moves towards squared deltas by (1 - beta2) of them, whatever the distance (arXiv:2003.00295)."""

    beta2: float = option("1 minus the share of a squared delta by which v moves", 0.99, at_least=0, below=1)

    def square(self, before: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        squared = delta.square()
        return before - (1 - self.beta2) * squared * torch.sign(before - squared)
