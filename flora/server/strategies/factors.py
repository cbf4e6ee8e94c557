"""Strategies that train, send or keep one factor of LoRA, A or B, differently from the other one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flora.core.low_rank import factor_of
from flora.core.registry import register
from flora.server.strategies.base import LoraStrategy


@register("ffa_lora")
@dataclass(frozen=True)
class FfaLora(LoraStrategy):
    """B alone; A stays at its random start, which all know, so that the mean is exact (FFA-LoRA, arXiv:2403.12313)."""

    def trains(self, name: str, round: int) -> bool:
        return factor_of(name) == "lora_B"

    def broadcasts(self, name: str) -> bool:
        return factor_of(name) == "lora_B"


@dataclass(frozen=True)
class OneFactorStays(LoraStrategy):
    """Both factors are trained, one is averaged, the other one stays with its client.

    The server's own adapter has the start of what it never sees, so the result is what clients reach with theirs.
    """

    has_personal = True
    own_factor: ClassVar[str]

    def stays(self, name: str) -> bool:
        return factor_of(name) == self.own_factor

    def broadcasts(self, name: str) -> bool:
        return factor_of(name) != self.own_factor


@register("fedsa_lora")
@dataclass(frozen=True)
class FedSaLora(OneFactorStays):
    """A and B are trained, A is averaged, B stays with its client (FedSA-LoRA, arXiv:2410.01463)."""

    own_factor = "lora_B"


@register("plora")
@dataclass(frozen=True)
class PLora(OneFactorStays):
    """A and B are trained, B is averaged, A stays with its client (pLoRA of FedVLM, arXiv:2507.17088)."""

    own_factor = "lora_A"


@register("rolora")
@dataclass(frozen=True)
class RoLora(LoraStrategy):
    """B in odd rounds, counted from 1, A in even ones, the other one frozen: the mean is exact (arXiv:2502.01755).

    B comes first, because A has no gradient while B is zero. The server sends both: who missed a round needs both.
    """

    alternates = True

    def trains(self, name: str, round: int) -> bool:
        return factor_of(name) == ("lora_B" if round % 2 else "lora_A")
