"""Corrections of each client's gradient that keep clients with different data from drifting apart.

All vectors are what is trained, flattened in the order of the adapter's names: P numbers, K clients `(K, P)`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flora.client.optimizers import Optimizer, Sgd
from flora.core.registry import Component, OptionError, option, register
from flora.core.tree import State, StateLike


@dataclass(frozen=True, eq=False)
class Cohort:
    """What a correction reads at the server: what each client of a cohort moved `(P,)` and sent, and its weight.

    `total_weight` is that of all clients, those outside the cohort included. With it a sum over cohorts of what each
    client changed is, at any time, the weighted mean of what all clients have come to.
    """

    moved: Sequence[Tensor]
    sent: Sequence[StateLike]
    weights: Sequence[float]
    total_weight: float

    def share_of_all(self, vectors: Sequence[Tensor]) -> Tensor:
        """sum w_k v_k / W `(P,)` in double precision, where W is the weight of all clients, not of the cohort."""
        rows = torch.stack(list(vectors)).double()
        return (rows * torch.tensor(self.weights, dtype=torch.float64).unsqueeze(1)).sum(dim=0) / self.total_weight


@dataclass(frozen=True)
class Correction(Component):
    """What is added to each client's gradient, before it is clipped."""

    is_idle: ClassVar[bool] = False
    """Whether it changes no gradient."""
    is_broadcast: ClassVar[bool] = False
    """Whether clients need what the server remembers."""
    reads_deltas: ClassVar[bool] = False
    """Whether what clients and the server remember are made of the same deltas, so that nothing of them may be lost."""

    def check_fits(self, optimizer: Optimizer) -> None:
        """Raise `OptionError` if it makes no sense with the optimiser."""

    def memory(self, vector: Tensor) -> State:
        """Return what a client remembers from round to round, and the server too, at the start.

        Its vectors have the size and type of `vector` `(P,)`, whose numbers mean nothing.
        """
        return {}

    @abstractmethod
    def correct(
        self, gradients: Tensor, parameters: Tensor, start: Tensor, own: StateLike, server: StateLike
    ) -> Tensor:
        """The corrected gradients `(K, P)` at `parameters` `(K, P)`.

        `start` `(K, P)` is what the server sent; `own` is what the clients remember, `(K, P)`, `server` what the
        server does, `(1, P)`.
        """

    def remember(
        self, moved: Tensor, own: StateLike, server: StateLike, num_steps: Tensor, learning_rate: float
    ) -> State:
        """Return what the clients remember after a round in which they `moved` `(K, P)` in `num_steps` `(K, 1)`."""
        return {}

    def sent(self, before: StateLike, after: StateLike) -> State:
        """Return what a client sends beside its delta, from what it remembered before and after the round."""
        return {}

    def at_server(self, delta: Tensor, server: StateLike, cohort: Cohort) -> tuple[Tensor, State]:
        """The delta `(P,)` to step along, from the combined one, and what the server remembers then."""
        return delta, dict(server)


@register("none")
@dataclass(frozen=True)
class NoCorrection(Correction):
    """The gradient as it is."""

    is_idle = True

    def correct(
        self, gradients: Tensor, parameters: Tensor, start: Tensor, own: StateLike, server: StateLike
    ) -> Tensor:
        return gradients


@register("fedprox")
@dataclass(frozen=True)
class FedProx(Correction):
    """The gradient of mu / 2 |w - w_broadcast|^2, the square included (arXiv:1812.06127, equation 2)."""

    mu: float = option("weight of the squared distance from what the server sent", 0.01, at_least=0)

    def correct(
        self, gradients: Tensor, parameters: Tensor, start: Tensor, own: StateLike, server: StateLike
    ) -> Tensor:
        return gradients + self.mu * (parameters - start)


@register("scaffold")
@dataclass(frozen=True)
class Scaffold(Correction):
    """Gradient - c_k + c, with control variates c_k of the clients and c of the server (arXiv:1910.06378).

    After S steps c_k becomes c_k - c + (w_broadcast - w_k) / (S learning_rate), its option II, and the server adds
    the cohort's changes, each by its client's share of all clients' weight: c is the weighted mean of all c_k, so that
    what it comes to rest at is the optimum of `weighting`. Both controls travel, so bytes double either way.
    """

    is_broadcast = True

    def check_fits(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Sgd) or optimizer.momentum:
            raise OptionError("optimizer", "scaffold reads gradients off a client's way: expected sgd without momentum")

    def memory(self, vector: Tensor) -> State:
        return {"control": torch.zeros_like(vector)}

    def correct(
        self, gradients: Tensor, parameters: Tensor, start: Tensor, own: StateLike, server: StateLike
    ) -> Tensor:
        return gradients - own["control"] + server["control"]

    def remember(
        self, moved: Tensor, own: StateLike, server: StateLike, num_steps: Tensor, learning_rate: float
    ) -> State:
        return {"control": own["control"] - server["control"] - moved / (num_steps * learning_rate)}

    def sent(self, before: StateLike, after: StateLike) -> State:
        return {"control": after["control"] - before["control"]}

    def at_server(self, delta: Tensor, server: StateLike, cohort: Cohort) -> tuple[Tensor, State]:
        change = cohort.share_of_all([each["control"] for each in cohort.sent])
        return delta, {"control": (server["control"].double() + change).to(delta.dtype)}


@register("feddyn")
@dataclass(frozen=True)
class FedDyn(Correction):
    """Gradient - h_k + alpha (w - w_broadcast), and a server that steps past the mean (arXiv:2111.04263, algorithm 1).

    After a round h_k loses alpha times the client's way, the server's h alpha times the mean way over all clients, by
    their weights, and the next adapter is the mean minus h / alpha. So h is the weighted mean of all h_k, and what it
    comes to rest at is the optimum of `weighting` (the paper's, whose clients weigh the same, with uniform).
    """

    reads_deltas = True
    alpha: float = option("weight of the dynamic term", 0.01, above=0)

    def memory(self, vector: Tensor) -> State:
        return {"gradient": torch.zeros_like(vector)}

    def correct(
        self, gradients: Tensor, parameters: Tensor, start: Tensor, own: StateLike, server: StateLike
    ) -> Tensor:
        return gradients - own["gradient"] + self.alpha * (parameters - start)

    def remember(
        self, moved: Tensor, own: StateLike, server: StateLike, num_steps: Tensor, learning_rate: float
    ) -> State:
        return {"gradient": own["gradient"] - self.alpha * moved}

    def at_server(self, delta: Tensor, server: StateLike, cohort: Cohort) -> tuple[Tensor, State]:
        way = cohort.share_of_all(cohort.moved)
        gradient = server["gradient"].double() - self.alpha * way
        after = delta.double() - gradient / self.alpha
        return after.to(delta.dtype), {"gradient": gradient.to(delta.dtype)}
