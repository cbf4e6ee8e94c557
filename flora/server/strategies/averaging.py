"""The strategy that averages every tensor by itself."""

from __future__ import annotations

from dataclasses import dataclass

from flora.core.registry import register
from flora.server.strategies.base import Strategy


@register("fedavg")
@dataclass(frozen=True)
class FedAvg(Strategy):
    """All tensors, A and B each by itself (FedIT, arXiv:2305.05644; arXiv:2404.15182)."""
