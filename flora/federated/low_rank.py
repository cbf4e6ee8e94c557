"""Arithmetic on the products B A of low-rank adapters, through their factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flora.tree import StateLike


def layers(state: StateLike) -> list[str]:
    """The layers of which a state dict has both factors, `LAYER.lora_A` `(r, d_in)` and `LAYER.lora_B` `(d_out, r)`."""
    names = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    return [name for name in names if f"{name}.lora_B" in state]


def aggregation_error(clients: Sequence[StateLike], weights: Sequence[float], server: StateLike) -> float | None:
    """|sum p_k B_k A_k - B A|_F / |sum p_k B_k A_k|_F over all layers: what averaging the factors gets wrong.

    `clients` are the adapters that clients ended with, p_k their share of the `weights`, `server` has B and A. None if
    there are no low-rank layers, or if the mean product is zero.
    """
    shares = [weight / sum(weights) for weight in weights]
    wrong = mean = 0.0
    for layer in layers(server):
        factors = [(client[f"{layer}.lora_B"].double(), client[f"{layer}.lora_A"].double()) for client in clients]
        scaled = [(share * left, right) for share, (left, right) in zip(shares, factors, strict=True)]
        own = -server[f"{layer}.lora_B"].double(), server[f"{layer}.lora_A"].double()
        mean += _squared_norm(scaled)
        wrong += _squared_norm([*scaled, own])
    return math.sqrt(wrong / mean) if mean > 0 else None


def _squared_norm(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The squared Frobenius norm of the sum of products B A."""
    left = torch.cat([left for left, _ in pairs], dim=1)
    right = torch.cat([right for _, right in pairs], dim=0)
    # Triangular factors have the same product's norm, without its size and without the cancellation of Gram matrices.
    left_factor, right_factor = (torch.linalg.qr(matrix, mode="r").R for matrix in (left, right.T))
    return float((left_factor @ right_factor.T).square().sum())
