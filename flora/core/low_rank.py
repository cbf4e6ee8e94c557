"""Arithmetic on the products B A of low-rank adapters, through their factors where these are smaller.

A layer may have a residual too, a product of its own that is added to B A and that no client trains:
`LAYER.residual_A` `(R, d_in)` and `LAYER.residual_B` `(d_out, R)`, whose rank R changes from round to round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flora.core import tree
from flora.core.processes import ALONE, Message, Processes
from flora.core.tree import State, StateLike

# Numbers of a factor of some clients' products that a CPU's second-level cache holds beside the others.
CACHED_NUMBERS = 2**17

Pair = tuple[Tensor, Tensor]
"""The factors of a product: B `(d_out, r)` and A `(r, d_in)`."""


def factor_of(name: str) -> str | None:
    """Which trained factor of a low-rank term the tensor is, `lora_A` or `lora_B`; None if it is something else."""
    last = name.rpartition(".")[2]
    return last if last in ("lora_A", "lora_B") else None


def is_residual(name: str) -> bool:
    """Whether the tensor is a factor of a residual."""
    return name.endswith((".residual_A", ".residual_B"))


def layers(state: StateLike) -> list[str]:
    """The layers of which a state dict has both factors, `LAYER.lora_A` `(r, d_in)` and `LAYER.lora_B` `(d_out, r)`."""
    names = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    return [name for name in names if f"{name}.lora_B" in state]


def rank_first(state: StateLike, rank: int) -> State:
    """The state with the first `rank` rows of each A and columns of each B alone: what a client of that rank sends."""
    cut = {"lora_A": (slice(0, rank),), "lora_B": (..., slice(0, rank))}
    return {name: tensor[cut[factor_of(name) or ""]] if factor_of(name) else tensor for name, tensor in state.items()}


def residuals_at_their_smallest(state: StateLike) -> State:
    """The state with each residual's dense product in its place, where that is smaller: a layout alone, no numbers."""
    smallest = dict(state)
    for name, right in state.items():
        if name.endswith(".residual_A"):
            layer = name.removesuffix(".residual_A")
            left = state[f"{layer}.residual_B"]
            if left.numel() + right.numel() > len(left) * right.shape[1]:
                del smallest[name]
                smallest[f"{layer}.residual_B"] = right.new_empty(len(left), right.shape[1], device="meta")
    return smallest


def with_any_residual(state: StateLike) -> State:
    """The state with residuals of rank 0, as in the initial state, which stand for those of any rank."""
    empty = {"residual_A": (slice(0, 0),), "residual_B": (..., slice(0, 0))}
    return {n: tensor[empty[n.rpartition(".")[2]]] if is_residual(n) else tensor for n, tensor in state.items()}


def rank_padded(state: StateLike, rank: int) -> State:
    """Put zeros beyond `rank` in the rows of A and the columns of B. Where both are zero, their gradients are."""
    padded = {name: tensor.clone() if factor_of(name) else tensor for name, tensor in state.items()}
    for name, tensor in padded.items():
        if factor_of(name) == "lora_A":
            tensor[rank:] = 0
        elif factor_of(name) == "lora_B":
            tensor[:, rank:] = 0
    return padded


def aggregation_error(
    clients: Sequence[StateLike],
    weights: Sequence[float],
    server: StateLike,
    before: StateLike | None = None,
    processes: Processes = ALONE,
) -> float | None:
    """|sum p_k B_k A_k - B A|_F / |sum p_k B_k A_k|_F over all layers: what averaging the factors gets wrong.

    `clients` are the adapters that clients ended with, as the server reads them, padded to the server's rank, p_k their
    share of the `weights`; `server` has B and A. By how much a residual has grown since `before` counts as a part of B
    A. None if there are no low-rank layers, or if the mean product is zero. Each of the `processes` computes some
    layers.
    """
    shares = _shares(weights)
    names = layers(server)
    own = {
        layer: _norms(clients, shares, server, before or {}, layer) for layer in names[processes.rank :: processes.size]
    }
    of_layers = {layer: each for message in processes.exchange(Message(own)) for layer, each in message.fields.items()}
    mean, wrong = (sum(of_layers[layer][part] for layer in names) for part in (0, 1))
    return math.sqrt(wrong / mean) if mean > 0 else None


def _norms(
    clients: Sequence[StateLike], shares: Sequence[float], server: StateLike, before: StateLike, layer: str
) -> tuple[float, float]:
    """|sum p_k B_k A_k|^2 and |sum p_k B_k A_k - B A|^2 of a layer; p_k are the clients' `shares`.

    With any B_0 near all B_k, and a = sum p_k A_k, the second sum is that of p_k (B_k - B_0) A_k, plus (B_0 - B) a and
    B (a - A). No large products cancel out in it, so it is added up in the adapters' precision.
    """
    left, right = product_of(server, layer)
    (start_B, moves_B), (start_A, moves_A) = (
        tree.moves_of(clients, f"{layer}.{each}") for each in ("lora_B", "lora_A")
    )
    dtype, moved = server[f"{layer}.lora_B"].dtype, torch.zeros_like(right)
    wrong = torch.zeros(len(left), right.shape[1], dtype=dtype)
    at_once = max(1, CACHED_NUMBERS // max(left.numel(), right.numel()))
    for first in range(0, len(clients), at_once):
        some = slice(first, first + at_once)
        share = torch.tensor(shares[some], dtype=dtype).view(-1, 1, 1)
        ends = torch.stack(moves_A[some]).to(dtype).mul_(share)
        moved += ends.sum(dim=0)
        ends.addcmul_(share, start_A.to(dtype))
        wrong.addmm_(torch.cat(moves_B[some], dim=1).to(dtype), ends.flatten(0, 1))
    new, old = residual_of(server, layer), residual_of(before, layer)
    rest = [(start_B - left, start_A + moved), (left, start_A - right + moved), *map(_negative, new), *old]
    squares = []
    for pairs in (rest, [(left, right), *new, *map(_negative, old)]):
        wrong.addmm_(*(each.to(dtype) for each in _side_by_side(pairs)))
        squares.append(float(wrong.flatten() @ wrong.flatten()))
    return squares[1], squares[0]


def product_of(state: StateLike, layer: str) -> Pair:
    """B and A of a layer, in double precision."""
    return state[f"{layer}.lora_B"].double(), state[f"{layer}.lora_A"].double()


def residual_of(state: StateLike, layer: str) -> list[Pair]:
    """The factors of a layer's residual, in double precision, in a list that is empty if it has none."""
    if f"{layer}.residual_B" not in state:
        return []
    return [(state[f"{layer}.residual_B"].double(), state[f"{layer}.residual_A"].double())]


def mean_product(clients: Sequence[StateLike], weights: Sequence[float], layer: str) -> list[Pair]:
    """The K products p_k B_k A_k, whose sum is the mean product; p_k is a client's share of the `weights`."""
    pairs = [product_of(client, layer) for client in clients]
    return [(share * left, right) for share, (left, right) in zip(_shares(weights), pairs, strict=True)]


def _shares(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights]


def _side_by_side(pairs: Sequence[Pair]) -> Pair:
    """The factors of the sum of products B A: all B `(d_out, R)`, and all A `(R, d_in)`."""
    return torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs], dim=0)


def low_rank_of_sum(pairs: Sequence[Pair], *, rank: int | None = None, tolerance: float | None = None) -> Pair:
    """B `(d_out, r)` and A `(r, d_in)` of the product nearest to the sum of products; A's rows are orthonormal.

    `rank` is the largest that r may be; with a `tolerance`, singular values of at most that share of the largest
    product's norm are left out. By the singular values of a matrix as wide as all factors together, never of the dense
    product.
    """
    left, right = _side_by_side(pairs)
    left_basis, left_factor = torch.linalg.qr(left)
    right_basis, right_factor = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(left_factor @ right_factor.T, full_matrices=False)
    if tolerance is not None:
        largest = math.sqrt(max(_squared_norm([pair]) for pair in pairs))
        numerical = int((values > tolerance * largest).sum())
        rank = numerical if rank is None else min(numerical, rank)
    return left_basis @ (u[:, :rank] * values[:rank]), v[:rank] @ right_basis.T


def ridge_left_factor(
    clients: Sequence[StateLike], weights: Sequence[float], layer: str, server: StateLike, penalty: float
) -> Tensor:
    """B + dB for the server's B and A, with the dB that minimises |sum p_k B_k A_k - (B + dB) A|^2 + penalty |dB|^2."""
    own_B, own_A = product_of(server, layer)
    missing = -own_B @ (own_A @ own_A.T)
    for left, right in mean_product(clients, weights, layer):
        missing += left @ (right @ own_A.T)
    normal = own_A @ own_A.T + penalty * torch.eye(len(own_A), dtype=torch.float64)
    return own_B + torch.linalg.solve(normal, missing.T).T


def _negative(pair: Pair) -> Pair:
    return -pair[0], pair[1]


def _squared_norm(pairs: Sequence[Pair]) -> float:
    """The squared Frobenius norm of the sum of products B A."""
    left, right = _side_by_side(pairs)
    if left.shape[1] < min(len(left), right.shape[1]):  # else factors are larger than their product
        left, right = _triangular((left, right))
    return float((left @ right).square().sum())


def _triangular(pair: Pair) -> Pair:
    """Factors of a product of the same norm, without its size and without the cancellation of Gram matrices."""
    left, right = (torch.linalg.qr(matrix, mode="r").R for matrix in (pair[0], pair[1].T))
    return left, right.T
