"""Several prompts for each class, matched with an image's patches by optimal transport."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flora.clip.adapters.base import AttachedAdapter
from flora.clip.adapters.personal_prompts import AttachedTwoContexts
from flora.clip.adapters.prompts import AttachedContext, PromptContext
from flora.clip.comparison import Comparison
from flora.clip.frozen import Architecture, FrozenClip
from flora.core.registry import OptionError, option, register
from flora.core.rng import Rng
from flora.core.tree import State

# Standard deviation of what is added to the words that prompts start from, which would stay alike: about half of that
# of the numbers of words (0.019 in the quickstart's model, 2026-11-28).
SPREAD = 0.01

Scalings = tuple[Tensor, Tensor]
"""Factors of a kernel's rows `(..., M)` and columns `(..., N)`."""


@dataclass(frozen=True)
class Stop:
    """A transport problem ends with the first iteration that moves its scalings by less than this on average.

    Each ends by itself, so that a plan does not depend on those that are computed with it. On CUDA all iterations run.
    """

    max_iterations: int = 100
    threshold: float = 1e-3


def balanced_plan(kernel: Tensor, stop: Stop) -> Tensor:
    """The transport plan `(..., M, N)` whose rows sum to 1 / M and columns to 1 / N, by Sinkhorn's algorithm.

    `kernel` is exp(-cost / epsilon), and the plan is that of least cost less epsilon times its entropy. Its columns sum
    up exactly, its rows as nearly as `stop` asks for, which looks at the rows' scalings. Source: arXiv:1306.0895,
    algorithm 1.
    """
    num_rows, num_columns = kernel.shape[-2:]

    def turn(rows: Tensor, columns: Tensor) -> Scalings:
        rows = 1 / num_rows / _times(kernel, columns)
        return rows, 1 / num_columns / _times(kernel.mT, rows)

    return _scaled(kernel, turn, lambda scalings: scalings[0], stop)


def partial_plan(kernel: Tensor, mass: float, stop: Stop) -> Tensor:
    """The plan `(..., M, N)` whose columns sum to mass / N, and rows to 1 / M at most: Dykstra's algorithm.

    As `balanced_plan`, but that `stop` looks at the columns' scalings. Source: the Bregman-Dykstra iterations of
    arXiv:1412.5154, here with one inequality.
    """
    num_rows, num_columns = kernel.shape[-2:]

    def turn(rows: Tensor, columns: Tensor) -> Scalings:
        rows = (1 / num_rows / _times(kernel, columns)).clamp(max=1)
        return rows, mass / num_columns / _times(kernel.mT, rows)

    return _scaled(kernel, turn, lambda scalings: scalings[1], stop)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def _scaled(
    kernel: Tensor, turn: Callable[[Tensor, Tensor], Scalings], watched: Callable[[Scalings], Tensor], stop: Stop
) -> Tensor:
    """Return `kernel` with its rows and columns scaled as `turn` has made of ones by the time that `watched` rests."""
    scalings = (torch.ones_like(kernel[..., 0]), torch.ones_like(kernel[..., 0, :]))
    moves = torch.ones_like(kernel[..., :1, 0], dtype=torch.bool)
    for _ in range(stop.max_iterations):
        after = turn(*scalings)
        change = (watched(after) - watched(scalings)).abs().mean(dim=-1, keepdim=True)
        scalings = (torch.where(moves, after[0], scalings[0]), torch.where(moves, after[1], scalings[1]))
        moves = moves & (change >= stop.threshold)
        if kernel.device.type == "cpu" and not moves.any():
            break
    rows, columns = scalings
    return rows.unsqueeze(-1) * kernel * columns.unsqueeze(-2)


@dataclass(frozen=True)
class Transport(Comparison):
    """sum_mn T_mn cos(patch m, prompt n), T the plan for costs 1 - cos; no gradient goes through T."""

    reads_patches: ClassVar[bool] = True
    reads_prompts: ClassVar[bool] = True
    epsilon: float
    stop: Stop

    def similarities(self, images: Tensor, classes: Tensor) -> Tensor:
        cosines = torch.einsum("kbmd,kcnd->kbcmn", images, classes)
        with torch.no_grad():
            # Laid out as it is read, or each iteration's products would copy it first.
            plan = self.plan(((cosines - 1) / self.epsilon).exp().contiguous())
        return (plan * cosines).sum(dim=(-2, -1))

    def plan(self, kernel: Tensor) -> Tensor:
        """The transport plan `(..., M, N)` for a kernel."""
        return balanced_plan(kernel, self.stop)


@dataclass(frozen=True)
class PartialTransport(Transport):
    """As `Transport`, where only a part of the patches' mass is matched."""

    mass: float

    def plan(self, kernel: Tensor) -> Tensor:
        return partial_plan(kernel, self.mass, self.stop)


@dataclass(frozen=True)
class TransportedContexts(PromptContext):
    """What `plot` and `fedotp` have in common."""

    epsilon: float = option("weight of the plan's entropy: small ones match sharply", 0.1, at_least=0.01)
    max_iterations: int = option("most iterations for a plan", 100, at_least=1, at_most=10_000)
    threshold: float = option("a plan is done when its scalings move by less than this", 1e-3, at_least=0)

    @property
    def stop(self) -> Stop:
        return Stop(self.max_iterations, self.threshold)

    def check_fits(self, architecture: Architecture) -> None:
        super().check_fits(architecture)
        if not architecture.reads_class_token:
            needs = "a vision tower that is read at its class token"
            raise OptionError("", f"transport needs {needs}: {architecture.name} is read at the mean of all")


@register("plot")
@dataclass(frozen=True)
class Plot(TransportedContexts):
    """Several contexts, whose prompts optimal transport matches with an image's patches (PLOT, arXiv:2210.01253).

    A class's logit is the scale times sum_mn T_mn cos(patch m, prompt n), T the entropic plan between the M patches and
    the N prompts, each side of uniform mass (section 3); T gets no gradient. Patches are all tokens but the class
    token, through the last norm and the projection. All contexts are trained and travel. Differs from the released
    code: each plan stops by itself, where a batch's plans stop together, and at 1e-3 in place of 1e-2; contexts start
    from words, all but the first a little changed, there from random vectors (`words: null`). The frozen model is
    compared by its class token.
    """

    num_prompts: int = option("contexts, and so prompts of each class", 4, at_least=1, at_most=64)

    @property
    def prompts_of_class(self) -> int:
        return self.num_prompts

    @property
    def comparison(self) -> Comparison:
        return Transport(self.epsilon, self.stop)

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedPlot(self, clip)


class AttachedPlot(AttachedContext):
    """Its state dict is `context`: `(N, n, text width)`, `(C, N, n, text width)` where classes have their own."""

    def __init__(self, options: Plot, clip: FrozenClip) -> None:
        super().__init__(options, clip)
        self.comparison = options.comparison
        self._num_prompts = options.num_prompts

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        contexts = []
        for place in range(self._num_prompts):
            stream = rng.child("prompt", place)
            context = super().initial_state(stream, class_features)["context"]
            if self._words is not None and place > 0:
                noise = torch.empty(context.shape).normal_(0, SPREAD, generator=stream.torch())
                context = context + noise.to(context.dtype)
            contexts.append(context)
        return {"context": torch.stack(contexts, dim=-3)}


@register("fedotp")
@dataclass(frozen=True)
class FedOtp(TransportedContexts):
    """Two contexts, one of which stays; transport matches a part of the patches with them (FedOTP, arXiv:2403.00041).

    As `plot` with two prompts for each class, but that only `mass` of the patches' whole mass 1 is matched, half of it
    with each prompt: the plan's rows sum to 1 / M at most. The context that travels is averaged, the other one never
    leaves its client; both learn together. The server's model has the first alone, twice. Differs from the released
    code: each plan stops by itself, where a batch's plans stop together; contexts start from words, there from random
    vectors (`words: null`).
    """

    has_personal = True

    mass: float = option("share of the patches' mass that is matched", 0.8, above=0, at_most=1)

    @property
    def prompts_of_class(self) -> int:
        return 2

    @property
    def comparison(self) -> Comparison:
        return PartialTransport(self.epsilon, self.stop, self.mass)

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedFedOtp(self, clip)


class AttachedFedOtp(AttachedTwoContexts):
    """Beside `context`, which travels, `local_context` of the same shape, which stays."""

    def __init__(self, options: FedOtp, clip: FrozenClip) -> None:
        super().__init__(options, clip)
        self.comparison = options.comparison
