"""Arithmetic on the products B A of low-rank adapters, through their factors where these are smaller."""

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


def truncated_mean(
    clients: Sequence[StateLike], weights: Sequence[float], layer: str, rank: int
) -> tuple[Tensor, Tensor]:
    """B `(d_out, rank)` and A `(rank, d_in)` of the product nearest to sum p_k B_k A_k; A's rows are orthonormal.

    By the singular values of a matrix of K r by K r numbers at most, never of the dense product.
    """
    total = sum(weights)
    left = torch.cat(
        [weight / total * client[f"{layer}.lora_B"].double() for client, weight in zip(clients, weights, strict=True)],
        dim=1,
    )
    right = torch.cat([client[f"{layer}.lora_A"].double() for client in clients], dim=0)
    left_basis, left_factor = torch.linalg.qr(left)
    right_basis, right_factor = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(left_factor @ right_factor.T, full_matrices=False)
    return left_basis @ (u[:, :rank] * values[:rank]), v[:rank] @ right_basis.T


def nearest_left(
    clients: Sequence[StateLike], weights: Sequence[float], layer: str, server: StateLike, penalty: float
) -> Tensor:
    """B + dB for the server's B and A, with the dB that minimises |sum p_k B_k A_k - (B + dB) A|^2 + penalty |dB|^2."""
    total = sum(weights)
    own_B, own_A = server[f"{layer}.lora_B"].double(), server[f"{layer}.lora_A"].double()
    missing = -own_B @ (own_A @ own_A.T)
    for client, weight in zip(clients, weights, strict=True):
        missing += weight / total * client[f"{layer}.lora_B"].double() @ (client[f"{layer}.lora_A"].double() @ own_A.T)
    normal = own_A @ own_A.T + penalty * torch.eye(len(own_A), dtype=torch.float64)
    return own_B + torch.linalg.solve(normal, missing.T).T


def _squared_norm(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The squared Frobenius norm of the sum of products B A."""
    left = torch.cat([left for left, _ in pairs], dim=1)
    right = torch.cat([right for _, right in pairs], dim=0)
    if left.shape[1] >= min(len(left), right.shape[1]):  # so many factors are larger than their product
        return float((left @ right).square().sum())
    # Triangular factors have the same product's norm, without its size and without the cancellation of Gram matrices.
    left_factor, right_factor = (torch.linalg.qr(matrix, mode="r").R for matrix in (left, right.T))
    return float((left_factor @ right_factor.T).square().sum())
