"""What of an adapter the clients train and send, and how the server makes the next adapter of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from flora.clip.adapters import Adapter, Lora
from flora.records import ClientUpdate
from flora.registry import Component, OptionError, name_of, option, register


@dataclass(frozen=True)
class Strategy(Component):
    """What of an adapter the clients train and send. A tensor is called by its name in the adapter's state dict.

    `server.combiner` makes one delta of what they send, `server.optimizer` steps along it.
    """

    alternates: ClassVar[bool] = False
    """Whether the tensors that are trained differ from round to round."""

    weighting: str = option("what a client's weight is", "examples", choices=("examples", "uniform"))

    def check_fits(self, adapter: Adapter) -> None:
        """Raise `OptionError` if the strategy is for other adapters."""

    def trains(self, name: str, round: int) -> bool:
        """Whether clients train, and send, this tensor in a round, counted from 1. The others are frozen in it."""
        return True

    def broadcasts(self, name: str) -> bool:
        """Whether the server sends this tensor. What never changes is known to all from a shared seed."""
        return True

    def weights(self, updates: Sequence[ClientUpdate]) -> list[float]:
        """How much each update counts."""
        return [float(update.num_examples) if self.weighting == "examples" else 1.0 for update in updates]


@register("fedavg")
@dataclass(frozen=True)
class FedAvg(Strategy):
    """All tensors, A and B each by itself (FedIT, arXiv:2305.05644; arXiv:2404.15182)."""


@dataclass(frozen=True)
class LoraStrategy(Strategy):
    """A strategy that treats A and B differently."""

    def check_fits(self, adapter: Adapter) -> None:
        if not isinstance(adapter, Lora):
            raise OptionError(
                "strategy", f"{name_of(self)} treats A and B differently: expected adapter lora, got {name_of(adapter)}"
            )


@register("ffa_lora")
@dataclass(frozen=True)
class FfaLora(LoraStrategy):
    """B alone; A stays at its random start, which all know, so that the mean is exact (FFA-LoRA, arXiv:2403.12313)."""

    def trains(self, name: str, round: int) -> bool:
        return _factor(name) == "lora_B"

    def broadcasts(self, name: str) -> bool:
        return _factor(name) == "lora_B"


@register("rolora")
@dataclass(frozen=True)
class RoLora(LoraStrategy):
    """B in odd rounds, counted from 1, A in even ones, the other one frozen: the mean is exact (arXiv:2502.01755).

    B comes first, because A has no gradient while B is zero. The server sends both: who missed a round needs both.
    """

    alternates = True

    def trains(self, name: str, round: int) -> bool:
        return _factor(name) == ("lora_B" if round % 2 else "lora_A")


def _factor(name: str) -> str | None:
    """Which factor of a low-rank term the tensor is; None if it is something else."""
    last = name.rpartition(".")[2]
    return last if last in ("lora_A", "lora_B") else None
