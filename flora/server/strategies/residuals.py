"""Strategies that keep what averaged factors miss of the mean product as a residual beside the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flora.core.low_rank import Pair, factor_of, layers, low_rank_of_sum, mean_product, product_of, residual_of
from flora.core.registry import option, register
from flora.core.tree import State, StateLike
from flora.server.strategies.base import LoraStrategy


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
        return _residual(layer, low_rank_of_sum(products, tolerance=max(self.tolerance, noise)), like=adapter)


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

    def finalize(self, averaged: State, clients: Sequence[StateLike], weights: Sequence[float]) -> State:
        finalized = dict(averaged)
        for layer in layers(averaged):
            finalized |= self.grown(averaged, layer, mean_product(clients, weights, layer))
            finalized[f"{layer}.lora_B"] = torch.zeros_like(averaged[f"{layer}.lora_B"])
        return finalized


@register("fedex_lora")
@dataclass(frozen=True)
class FedExLora(WithResidual):
    """The means of A and B; what their product lacks to the mean product goes into the residual (arXiv:2410.09432)."""

    def finalize(self, averaged: State, clients: Sequence[StateLike], weights: Sequence[float]) -> State:
        finalized = dict(averaged)
        for layer in layers(averaged):
            lora_B, lora_A = product_of(averaged, layer)
            finalized |= self.grown(averaged, layer, [*mean_product(clients, weights, layer), (-lora_B, lora_A)])
        return finalized


def _residual(layer: str, pair: Pair, *, like: StateLike) -> State:
    """The factors of a layer's residual under their names, in the type that the layer's others have in `like`."""
    dtype = like[f"{layer}.lora_A"].dtype
    return {f"{layer}.residual_A": pair[1].to(dtype), f"{layer}.residual_B": pair[0].to(dtype)}
