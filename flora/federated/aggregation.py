"""What of an adapter the clients train and send, and how the server makes the next adapter of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from flora.clip.adapters import Adapter, Lora
from flora.federated.low_rank import layers, nearest_left, truncated_mean
from flora.records import ClientUpdate
from flora.registry import Component, OptionError, name_of, option, register
from flora.tree import State, StateLike


@dataclass(frozen=True)
class Strategy(Component):
    """What of an adapter the clients train and send. A tensor is called by its name in the adapter's state dict.

    `server.combiner` makes one delta of what they send, `server.optimizer` steps along it.
    """

    alternates: ClassVar[bool] = False
    """Whether the tensors that are trained differ from round to round."""
    replaces_mean: ClassVar[bool] = False
    """Whether `settle` starts from the plain mean of the clients, and nothing else."""

    weighting: str = option("what a client's weight is", "examples", choices=("examples", "uniform"))

    def check_fits(self, adapter: Adapter) -> None:
        """Raise `OptionError` if the strategy is for other adapters."""

    def trains(self, name: str, round: int) -> bool:
        """Whether clients train, and send, this tensor in a round, counted from 1. The others are frozen in it."""
        return True

    def broadcasts(self, name: str) -> bool:
        """Whether the server sends this tensor. What never changes is known to all from a shared seed."""
        return True

    def settle(self, averaged: State, clients: Sequence[StateLike], weights: Sequence[float]) -> State:
        """The next adapter, from the one that averaging came to and those that the clients ended with."""
        return averaged

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


@register("flexlora")
@dataclass(frozen=True)
class FlexLora(LoraStrategy):
    """A and B are trained; the server keeps the rank r nearest to the mean product (FlexLoRA, arXiv:2402.11505).

    A's rows are orthonormal after a round, B has the singular values, so that no direction is dead. Differs from the
    paper: all clients have one rank.
    """

    replaces_mean = True

    def settle(self, averaged: State, clients: Sequence[StateLike], weights: Sequence[float]) -> State:
        settled = dict(averaged)
        for layer in layers(averaged):
            before = averaged[f"{layer}.lora_A"]
            lora_B, lora_A = truncated_mean(clients, weights, layer, len(before))
            if lora_B.any():  # the product is zero while nobody has trained: then A stays at its random start
                settled |= {f"{layer}.lora_A": lora_A.to(before.dtype), f"{layer}.lora_B": lora_B.to(before.dtype)}
        return settled


@register("lora_fair")
@dataclass(frozen=True)
class LoraFair(LoraStrategy):
    """The means of A and B, and a term added to B that brings B A near the mean product (arXiv:2411.14961).

    The term dB minimises |sum p_k B_k A_k - (B + dB) A|^2 + penalty |dB|^2 in closed form. Differs from the paper,
    which maximises a cosine similarity.
    """

    replaces_mean = True
    penalty: float = option("weight of the term's own squared norm", 0.01, above=0)

    def settle(self, averaged: State, clients: Sequence[StateLike], weights: Sequence[float]) -> State:
        settled = dict(averaged)
        for layer in layers(averaged):
            nearest = nearest_left(clients, weights, layer, averaged, self.penalty)
            settled[f"{layer}.lora_B"] = nearest.to(averaged[f"{layer}.lora_B"].dtype)
        return settled


def _factor(name: str) -> str | None:
    """Which factor of a low-rank term the tensor is; None if it is something else."""
    last = name.rpartition(".")[2]
    return last if last in ("lora_A", "lora_B") else None
