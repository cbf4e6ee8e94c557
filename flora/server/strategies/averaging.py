"""Strategies that average every tensor by itself: in rounds (FedAvg), or when a buffer is full (FedBuff)."""

from __future__ import annotations

from dataclasses import dataclass

from flora.core.registry import option, register
from flora.server.strategies.base import Strategy


@register("fedavg")
@dataclass(frozen=True)
class FedAvg(Strategy):
    """All tensors, A and B each by itself (FedIT, arXiv:2305.05644; arXiv:2404.15182)."""


@register("fedbuff")
@dataclass(frozen=True)
class FedBuff(Strategy):
    """Asynchronous: the server steps when `buffer` updates have come in, however old they are (arXiv:2106.06639).

    Needs a network, whose clock says when that is. The cohort's size is how many clients are at work at any time.
    """

    weighting: str = option("what a client's weight is", "uniform", choices=("examples", "uniform"))
    buffer: int = option("updates in a step of the server", 10, at_least=1)

    @property
    def buffer_size(self) -> int:
        return self.buffer
