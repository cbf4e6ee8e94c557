"""Strategies whose server approximates the clients' mean product B A by one pair of factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flora.core.low_rank import layers, low_rank_of_sum, mean_product, ridge_left_factor
from flora.core.registry import option, register
from flora.core.tree import State, StateLike
from flora.server.strategies.base import LoraStrategy


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

    def finalize(self, averaged: State, clients: Sequence[StateLike], weights: Sequence[float]) -> State:
        finalized = dict(averaged)
        for layer in layers(averaged):
            lora_B, lora_A = low_rank_of_sum(
                mean_product(clients, weights, layer), rank=len(averaged[f"{layer}.lora_A"])
            )
            if lora_B.any():  # the product is zero while nobody has trained: then A stays at its random start
                dtype = averaged[f"{layer}.lora_A"].dtype
                finalized |= {f"{layer}.lora_A": lora_A.to(dtype), f"{layer}.lora_B": lora_B.to(dtype)}
        return finalized


@register("lora_fair")
@dataclass(frozen=True)
class LoraFair(LoraStrategy):
    """The means of A and B, and a term added to B that brings B A near the mean product (arXiv:2411.14961).

    The term dB minimises |sum p_k B_k A_k - (B + dB) A|^2 + penalty |dB|^2 in closed form. Differs from the paper,
    which maximises a cosine similarity.
    """

    replaces_mean = True
    penalty: float = option("weight of the term's own squared norm", 0.01, above=0)

    def finalize(self, averaged: State, clients: Sequence[StateLike], weights: Sequence[float]) -> State:
        finalized = dict(averaged)
        for layer in layers(averaged):
            lora_B = ridge_left_factor(clients, weights, layer, averaged, self.penalty)
            finalized[f"{layer}.lora_B"] = lora_B.to(averaged[f"{layer}.lora_B"].dtype)
        return finalized
