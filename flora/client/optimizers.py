"""Element-wise optimisers over the flat parameters of K clients, and the learning rate over rounds.

A block's parameters are one matrix `(K, P)`, a row a client. Each update equals `torch.optim`'s of the same name.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flora.core.registry import Component, OptionError, option, register
from flora.core.tree import State

# Numbers of one matrix that a CPU's second-level cache holds beside those of the other matrices of a step.
CACHED_NUMBERS = 2**16


Rate = float | Tensor
"""A learning rate: one for all clients of a step, or one for each of them, `(K, 1)` in double precision."""


@dataclass(frozen=True)
class Optimizer(Component):
    """How a client turns gradients into steps."""

    rate_by_client: ClassVar[bool] = False
    """Whether `step` also takes learning rates `(K, 1)`, so that runs that differ in theirs can share a step."""

    @abstractmethod
    def init(self, parameters: Tensor) -> State:
        """Fresh state for `parameters` `(K, P)`; every tensor has the leading client axis."""

    @abstractmethod
    def step(self, parameters: Tensor, gradients: Tensor, state: State, learning_rate: Rate) -> None:
        """One update of `parameters` `(K, P)` and `state`, in place.

        `learning_rate` is a number; with `rate_by_client` it may be `(K, 1)`, of clients of several runs.
        """


@register("sgd")
@dataclass(frozen=True)
class Sgd(Optimizer):
    """Stochastic gradient descent, as `torch.optim.SGD`."""

    rate_by_client = True
    momentum: float = option("share of the last step that is kept", 0.0, at_least=0, below=1)
    nesterov: bool = option("look ahead along the momentum", False)
    weight_decay: float = option("L2 penalty added to the gradient", 0.0, at_least=0)

    def check(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise OptionError("nesterov", "needs a momentum above 0")

    def init(self, parameters: Tensor) -> State:
        return {"momentum": torch.zeros_like(parameters)} if self.momentum else {}

    def step(self, parameters: Tensor, gradients: Tensor, state: State, learning_rate: Rate) -> None:
        if self.weight_decay:
            gradients = gradients.add(parameters, alpha=self.weight_decay)
        if self.momentum:
            buffer = state["momentum"].mul_(self.momentum).add_(gradients)
            gradients = gradients.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        if isinstance(learning_rate, Tensor):
            parameters.sub_(gradients * learning_rate.to(gradients.dtype))
        else:
            parameters.add_(gradients, alpha=-learning_rate)


@register("adam")
@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam with L2 weight decay in the gradient (arXiv:1412.6980), as `torch.optim.Adam`."""

    rate_by_client = True
    beta1: float = option("decay of the mean of gradients", 0.9, at_least=0, below=1)
    beta2: float = option("decay of the mean of squared gradients", 0.999, at_least=0, below=1)
    eps: float = option("added to the denominator", 1e-8, above=0)
    weight_decay: float = option("L2 penalty added to the gradient", 0.0, at_least=0)

    def init(self, parameters: Tensor) -> State:
        # In double precision, because 1 - beta ** steps is the difference of two nearly equal numbers.
        steps = torch.zeros(len(parameters), 1, device=parameters.device, dtype=torch.float64)
        return {"mean": torch.zeros_like(parameters), "square": torch.zeros_like(parameters), "steps": steps}

    def step(self, parameters: Tensor, gradients: Tensor, state: State, learning_rate: Rate) -> None:
        if self.weight_decay:
            gradients = gradients.add(parameters, alpha=self.weight_decay)
        self._adam_step(parameters, gradients, state, learning_rate)

    def _adam_step(self, parameters: Tensor, gradients: Tensor, state: State, learning_rate: Rate) -> None:
        # Clients may have taken different numbers of steps, so the bias corrections are (K, 1).
        steps = state["steps"].add_(1)
        step_size = (learning_rate / (1 - self.beta1**steps)).to(parameters.dtype)
        correction = (1 - self.beta2**steps).sqrt().to(parameters.dtype)
        for part, gradient, mean, square in _columns(parameters, gradients, state["mean"], state["square"]):
            mean.lerp_(gradient, 1 - self.beta1)
            square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
            denominator = square.sqrt().div_(correction).add_(self.eps)
            part.sub_(denominator.reciprocal_().mul_(mean).mul_(step_size))


@register("adamw")
@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (arXiv:1711.05101), as `torch.optim.AdamW`."""

    weight_decay: float = option("shrinkage of the parameters by learning rate times this", 0.01, at_least=0)

    def step(self, parameters: Tensor, gradients: Tensor, state: State, learning_rate: Rate) -> None:
        if self.weight_decay:
            shrunk = 1 - learning_rate * self.weight_decay
            parameters.mul_(shrunk.to(parameters.dtype) if isinstance(shrunk, Tensor) else shrunk)
        self._adam_step(parameters, gradients, state, learning_rate)


def _columns(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matrices `(K, P)` in bands of columns: on a CPU so narrow that what one operation writes the next finds cached.

    With the ten million parameters of a small CLIP that takes half of the time, bit for bit the same.
    """
    rows, width = matrices[0].shape
    band = max(CACHED_NUMBERS // rows, 1) if matrices[0].device.type == "cpu" else width
    return zip(*(matrix.split(band, dim=1) for matrix in matrices), strict=True)


@dataclass(frozen=True)
class Schedule(Component):
    """The learning rate over rounds. `needs_num_rounds` says that it depends on how many there will be."""

    needs_num_rounds: ClassVar[bool] = False
    warmup_rounds: int = option("rounds over which the rate rises linearly to its full value", 0, at_least=0)

    @abstractmethod
    def after_warmup(self, num_done: int, number: int) -> float:
        """The factor in a round behind the warm-up, when `num_done` of the `number` such rounds are done."""

    def factor(self, round: int, num_rounds: int) -> float:
        """The factor on the learning rate in `round`, counted from 1."""
        if round <= self.warmup_rounds:
            return round / (self.warmup_rounds + 1)
        rest = max(num_rounds - self.warmup_rounds, 1)
        return self.after_warmup(round - self.warmup_rounds - 1, rest)


@register("constant")
@dataclass(frozen=True)
class Constant(Schedule):
    """One learning rate for all rounds."""

    def after_warmup(self, num_done: int, number: int) -> float:
        return 1.0


@register("cosine")
@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from the full rate down (arXiv:1608.03983, without restarts)."""

    needs_num_rounds: ClassVar[bool] = True
    final_fraction: float = option("share of the rate that it ends near", 0.0, at_least=0, at_most=1)

    def after_warmup(self, num_done: int, number: int) -> float:
        return self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * (num_done / number))) / 2


@register("step")
@dataclass(frozen=True)
class StepDecay(Schedule):
    """The rate falls to a share of itself after every so many rounds."""

    every: int = option("rounds between two falls", 10, at_least=1)
    gamma: float = option("what the rate is multiplied by at each", 0.1, above=0, at_most=1)

    def after_warmup(self, num_done: int, number: int) -> float:
        return self.gamma ** (num_done // self.every)


@register("exponential")
@dataclass(frozen=True)
class ExponentialDecay(Schedule):
    """The rate falls to a share of itself after each round."""

    gamma: float = option("what the rate is multiplied by after a round", 0.99, above=0, at_most=1)

    def after_warmup(self, num_done: int, number: int) -> float:
        return self.gamma**num_done


def clip_rows(gradients: Tensor, clip_norm: float) -> Tensor:
    """`gradients` `(K, P)` with each row scaled down to a Euclidean norm of at most `clip_norm`."""
    norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
    # The 1e-6 is torch.nn.utils.clip_grad_norm_'s, so that both give the same numbers.
    return gradients * (clip_norm / (norms + 1e-6)).clamp(max=1.0)
