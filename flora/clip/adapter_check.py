"""Check an adapter of a user: clients must not mix, and all that it trains must change what the model computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora.clip.adapters.base import HELD_CLASSES, Adapter
from flora.clip.towers.towers import AdaptedClip
from flora.core.contracts import called, refuse
from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.core.tree import State, StateLike

# Other numbers than one another, so that axes that are mistaken for each other don't fit.
NUM_CLIENTS, NUM_IMAGES, NUM_CLASSES = 2, 3, 4
# The difference that rounding may make, as a part of the largest logit. In bf16 it would hide what is looked for.
TOLERANCES = {"fp64": 1e-8, "fp32": 1e-3}


def check_adapter(options: Adapter, model: AdaptedClip) -> None:
    """Compute logits of two clients together and of each alone, and gradients; raise `UserError` naming what is wrong.

    The clients have different tensors. They must have the logits that each has alone, and each tensor must have a
    gradient, unless the adapter adds terms to the loss, by which it may get one. Images are noise. With
    `backbone.precision: bf16` clients are not compared.
    """
    rng = Rng(0)
    stacks = [_moved_away(_start(options, model), rng.child("client", k)) for k in range(NUM_CLIENTS)]
    size = NUM_IMAGES, 3, *model.clip.architecture.image_size
    with torch.no_grad():
        stem = model.vision.stem(torch.randn(size, generator=rng.torch()).to(model.clip.dtype).to(model.device))
    try:
        if model.adapter.max_clients_per_block is None and model.clip.precision in TOLERANCES:
            _check_clients(options, model, stacks, stem)
        _check_gradients(options, model, stacks[0], stem)
    except (RuntimeError, IndexError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(
            f"adapter: {called(options)} fails with tensors of {NUM_CLIENTS} clients and {NUM_IMAGES} images: {what}"
        ) from error


def _start(options: Adapter, model: AdaptedClip) -> State:
    start = model.initial_adapter(Rng(0))
    if not isinstance(start, dict) or not start:
        refuse("adapter", options, "no tensors by name as `initial_state`")
    for name, tensor in start.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != model.clip.dtype:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            refuse("adapter", options, f"{name!r} as {kind} in `initial_state`, expected {model.clip.dtype}")
    return start


def _moved_away(start: State, rng: Rng) -> State:
    """Tensors `(1, ...)`, each other than where the server starts: by about a third of its size, 0.03 at least."""
    moved = {}
    for name, tensor in start.items():
        step = 0.3 * max(float(tensor.double().square().mean().sqrt()), 0.1)
        noise = torch.randn(tensor.shape, generator=rng.child(name).torch(), dtype=torch.float64)
        moved[name] = (tensor.double() + step * noise).to(tensor.dtype).unsqueeze(0)
    return moved


def _check_clients(options: Adapter, model: AdaptedClip, stacks: Sequence[State], stem: Tensor) -> None:
    with torch.no_grad():
        together = _logits(model, {name: torch.cat([stack[name] for stack in stacks]) for name in stacks[0]}, stem)
        alone = [_logits(model, stack, stem) for stack in stacks]
    tolerance = TOLERANCES[model.clip.precision] * float(together.abs().max())
    for k, expected in enumerate(alone):
        if not torch.allclose(together[:, k], expected[:, 0], rtol=0, atol=tolerance):
            raise UserError(
                f"adapter: {called(options)} mixes clients: two that compute together get other logits than each "
                "alone; tensors have a leading axis of clients, (K, ...), and features too, (K, B, embed_dim)"
            )


def _check_gradients(options: Adapter, model: AdaptedClip, stack: State, stem: Tensor) -> None:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in stack.items()}
    logits = _logits(model, leaves, stem)
    weights = torch.randn(logits.shape, generator=Rng(0).torch()).to(logits)
    if not logits.requires_grad:
        raise UserError(f"adapter: {called(options)} changes no logit: nothing of it would be trained{_HINT}")
    gradients = torch.autograd.grad((logits * weights).sum(), list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is None and not model.adapter.loss_terms:
            raise UserError(f"adapter: {called(options)}: {name!r} changes no logit: it would not be trained{_HINT}")


_HINT = "; does `trained_from` name the first stage of each tower that the adapter changes?"


def _logits(model: AdaptedClip, stack: StateLike, stem: Tensor) -> Tensor:
    """The logits `(M, K, B, C)` by each of the M models that a step computes, of all classes or of a few."""
    adapter, logits = model.adapter, []
    bound = {name: tensor.to(model.device) for name, tensor in stack.items()}
    number, num_classes = len(next(iter(bound.values()))), model.prompts.num_classes
    few = torch.arange(min(NUM_CLASSES, num_classes)).expand(number, -1)
    chosen = few if model.text.trains_blocks and not adapter.comparison.by_image else None
    if adapter.reads_held_classes:
        bound[HELD_CLASSES] = torch.ones(number, num_classes, dtype=torch.bool, device=model.device)
    for tensors in adapter.models_of_step(bound):
        with adapter.bind(tensors):
            classes = model.class_features(number, chosen)
            logits.append(model.logits(stem.repeat(number, *[1] * (stem.dim() - 1)), classes))
    return torch.stack(logits)
