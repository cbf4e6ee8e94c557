"""What of an adapter the clients train and send, and how the server makes the next adapter of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from flora.clip.adapters import Adapter, Lora
from flora.federated.low_rank import (
    Pair,
    factor_of,
    layers,
    mean_product,
    nearest,
    nearest_left,
    product_of,
    residual_of,
)
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
    restarts: ClassVar[bool] = False
    """Whether what clients train starts anew each round, at random from a seed that all know."""
    changes_basis: ClassVar[bool] = False
    """Whether each round's A and B are other factors of the product than before, so that a number at a place of them,
    or a direction, means nothing in the next round."""
    takes_ranks: ClassVar[bool] = False
    """Whether clients may have ranks of their own."""
    keeps_residual: ClassVar[bool] = False
    """Whether the adapter has residuals."""
    has_personal: ClassVar[bool] = False
    """Whether some tensors stay with their clients."""
    replaces_mean: ClassVar[bool] = False
    """Whether `settle` starts from the plain mean of the clients, and nothing else."""

    weighting: str = option("what a client's weight is", "examples", choices=("examples", "uniform"))

    @property
    def buffer_size(self) -> int:
        """How many updates the server waits for, whoever sends them; 0: it waits for the cohort."""
        return 0

    def check_fits(self, adapter: Adapter) -> None:
        """Raise `OptionError` if the strategy is for other adapters."""

    def trains(self, name: str, round: int) -> bool:
        """Whether clients train, and send, this tensor in a round, counted from 1. The others are frozen in it."""
        return True

    def stays(self, name: str) -> bool:
        """Whether clients train this tensor, but keep it to themselves: each has its own."""
        return False

    def broadcasts(self, name: str) -> bool:
        """Whether the server sends this tensor. What never changes is known to all from a shared seed."""
        return True

    def initial(self, adapter: State) -> State:
        """What the server starts from: the adapter, with all that the strategy adds to it."""
        return adapter

    def settle(self, averaged: State, clients: Sequence[StateLike], weights: Sequence[float]) -> State:
        """The next adapter, from the one that averaging came to and those that the clients ended with."""
        return averaged

    def weights(self, updates: Sequence[ClientUpdate]) -> list[float]:
        """How much each update counts."""
        return [self.weight(update.num_examples) for update in updates]

    def weight(self, num_examples: int) -> float:
        """How much a client of so many examples counts."""
        return float(num_examples) if self.weighting == "examples" else 1.0


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


@register("hetlora")
@dataclass(frozen=True)
class HetLora(LoraStrategy):
    """A and B each by itself; a client of a lower rank gets the first rows of A, and has zeros in place of the others.

    The zeros count in the mean (HetLoRA, arXiv:2401.06432). Differs from the paper: weights are as in FedAvg, clients
    keep their ranks, and rows that nobody in the cohort has stay as they are.
    """

    takes_ranks = True


@register("flexlora")
@dataclass(frozen=True)
class FlexLora(LoraStrategy):
    """A and B are trained; the server keeps the rank r nearest to the mean product (FlexLoRA, arXiv:2402.11505).

    A's rows are orthonormal after a round, B has the singular values in falling order, so that no direction is dead,
    and the first ones, which a client of a lower rank gets, are the best product of that rank.
    """

    replaces_mean = True
    changes_basis = True
    takes_ranks = True

    def settle(self, averaged: State, clients: Sequence[StateLike], weights: Sequence[float]) -> State:
        settled = dict(averaged)
        for layer in layers(averaged):
            lora_B, lora_A = nearest(mean_product(clients, weights, layer), rank=len(averaged[f"{layer}.lora_A"]))
            if lora_B.any():  # the product is zero while nobody has trained: then A stays at its random start
                dtype = averaged[f"{layer}.lora_A"].dtype
                settled |= {f"{layer}.lora_A": lora_A.to(dtype), f"{layer}.lora_B": lora_B.to(dtype)}
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
            lora_B = nearest_left(clients, weights, layer, averaged, self.penalty)
            settled[f"{layer}.lora_B"] = lora_B.to(averaged[f"{layer}.lora_B"].dtype)
        return settled


@dataclass(frozen=True)
class WithResidual(LoraStrategy):
    """What A and B can't hold goes into a residual beside the frozen weight: low-rank factors that clients don't train.

    After each round they are compressed again. They are sent whole, since who missed a round needs that: as their dense
    product once it is smaller than they are.
    """

    replaces_mean = True
    keeps_residual = True
    tolerance: float = option(
        "singular values of the residual at most this share of the largest product in it are left out, and those that "
        "the numbers' precision can't tell from zero (a share of 5e-7 in fp32)",
        0.0,
        at_least=0,
        below=1,
    )

    def initial(self, adapter: State) -> State:
        residual: State = {}
        for layer in layers(adapter):
            lora_B, lora_A = product_of(adapter, layer)
            residual |= _residual(layer, (lora_B[:, :0], lora_A[:0]), like=adapter)
        return {**adapter, **residual}

    def grown(self, adapter: StateLike, layer: str, products: Sequence[Pair]) -> State:
        """The layer's residual and `products` as one residual."""
        # The means are rounded to half an eps. What that makes of their product, and of it over rounds, must not pass
        # for ranks: they would differ with the order of sums, and travel.
        noise = 4 * torch.finfo(adapter[f"{layer}.lora_A"].dtype).eps
        products = [*residual_of(adapter, layer), *products]
        return _residual(layer, nearest(products, tolerance=max(self.tolerance, noise)), like=adapter)


@register("flora_stacking")
@dataclass(frozen=True)
class FloraStacking(WithResidual):
    """The mean product, which is the product of stacked factors, goes into the residual (arXiv:2409.05976): exact.

    A and B start anew each round, so the server sends the residual alone. Ranks may differ.
    """

    restarts = True
    takes_ranks = True

    def broadcasts(self, name: str) -> bool:
        return factor_of(name) is None

    def settle(self, averaged: State, clients: Sequence[StateLike], weights: Sequence[float]) -> State:
        settled = dict(averaged)
        for layer in layers(averaged):
            settled |= self.grown(averaged, layer, mean_product(clients, weights, layer))
            settled[f"{layer}.lora_B"] = torch.zeros_like(averaged[f"{layer}.lora_B"])
        return settled


@register("fedex_lora")
@dataclass(frozen=True)
class FedExLora(WithResidual):
    """The means of A and B; what their product lacks to the mean product goes into the residual (arXiv:2410.09432)."""

    def settle(self, averaged: State, clients: Sequence[StateLike], weights: Sequence[float]) -> State:
        settled = dict(averaged)
        for layer in layers(averaged):
            lora_B, lora_A = product_of(averaged, layer)
            settled |= self.grown(averaged, layer, [*mean_product(clients, weights, layer), (-lora_B, lora_A)])
        return settled


def _residual(layer: str, pair: Pair, *, like: StateLike) -> State:
    """The factors of a layer's residual under their names, in the type that the layer's others have in `like`."""
    dtype = like[f"{layer}.lora_A"].dtype
    return {f"{layer}.residual_A": pair[1].to(dtype), f"{layer}.residual_B": pair[0].to(dtype)}
