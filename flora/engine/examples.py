"""Gradients of which each example's part is bounded, and their noise: DP-SGD for K clients (arXiv:1607.00133).

An example is a client of one example here that has its client's adapter, so one pass through the model gives each
example a gradient of its own. What depends on the adapter alone, the text tower's forward pass, is the client's. Heads
and feature adapters need none of that: gradients of linear layers are outer products, whose norms are known without
them (arXiv:1510.01799).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flora.clip.loss_terms import LogitsView
from flora.clip.towers.towers import AdaptedClip
from flora.core.tree import StateLike
from flora.engine.batch import Batch, Compute
from flora.engine.blocks import Block
from flora.engine.capacity import examples_at_once
from flora.engine.gradients import FlatStack, Loss, SharedTexts, rows_of, step_views
from flora.privacy.examples import ExamplePrivacy


def bounded_gradient_function(
    model: AdaptedClip, loss: Loss, flat: FlatStack, privacy: ExamplePrivacy, residual: StateLike
) -> Compute:
    """Build what computes each client's mean loss, and the sum of its examples' gradients, each of a bounded norm.

    As many examples go through the model at once as memory and caches are good for. `residual` are tensors `(1, ...)`
    that are bound with every client's own.
    """
    if model.adapter.is_linear and loss.from_logits:
        return _closed_form(model, loss, flat, privacy)
    at_once = examples_at_once(model, num_trained=flat.num_trained)
    shares_texts = model.text.trains_blocks and model.adapter.num_models == 1 and model.adapter.can_share_texts

    def compute(parameters: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed losses `(K,)` and bounded gradients `(K, P)` of clients that go in at once, or of one in parts."""
        number, size = batch.tensors["labels"].shape
        texts = SharedTexts(model, flat.leaves(parameters), residual, batch.drawn) if shares_texts else None
        examples = batch.as_clients()
        losses = torch.zeros(number, device=model.device, dtype=parameters.dtype)
        sums = parameters.new_zeros(number, flat.num_trained)
        for place in _places(number * size, at_once):
            per_client = (place.stop - place.start) // number
            state, leaves = flat.leaves(parameters.repeat_interleave(per_client, dim=0))
            part = examples.of_clients(place.start, place.stop)
            rows = torch.arange(number * per_client)
            leaf = None if texts is None else texts.leaf((rows // per_client).tolist(), (rows % per_client).tolist())
            part_losses = loss.total(step_views(model, loss, {**state, **residual}, part, None, leaf))
            gradients = rows_of(part_losses, leaves) if texts is None else texts.rows(part_losses, leaves)
            mask = batch.tensors["example_mask"].flatten()[place].view(number, -1)
            losses += torch.where(mask, part_losses.detach().view(number, -1), 0.0).sum(dim=1)
            sums += privacy.clipped_sums(gradients.view(number, -1, flat.num_trained), mask)
        return losses, sums

    return _in_parts(compute, at_once)


def _closed_form(model: AdaptedClip, loss: Loss, flat: FlatStack, privacy: ExamplePrivacy) -> Compute:
    """As `bounded_gradient_function` for an adapter that is linear layers on features, and a loss of logits alone.

    All examples of a client go through its layers together. The square of a gradient's norm is the sum over layers of
    |g|^2 |x|^2, with a bias |g|^2 (|x|^2 + 1), for the gradient g by what came out and what went in, x.
    """

    def compute(parameters: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        mask = batch.tensors["example_mask"]
        state = {name: tensor.detach() for name, tensor in flat.state(parameters).items()}
        with model.adapter.bind(state):
            logits, uses = model.traced_logits(batch.tensors["stem"], len(mask), batch.drawn)
        view = LogitsView.of(logits.flatten(0, 1).unsqueeze(1), model.logit_scale(), batch.as_clients().tensors)
        losses = loss.total([view])
        by_outputs = torch.autograd.grad(losses.sum(), [use.outputs for use in uses])
        by_outputs = tuple(each.masked_fill(~mask.unsqueeze(-1), 0.0) for each in by_outputs)
        squares = torch.zeros(mask.shape, device=mask.device, dtype=parameters.dtype)
        for use, gradient in zip(uses, by_outputs, strict=True):
            inputs = use.inputs.square().sum(dim=-1) * (f"{use.layer}.weight" in flat.trained)
            squares += gradient.square().sum(dim=-1) * (inputs + (f"{use.layer}.bias" in flat.trained))
        factors = privacy.factors(squares.sqrt()).unsqueeze(-1)
        sums = {}
        for use, gradient in zip(uses, by_outputs, strict=True):
            bounded = factors * gradient
            sums[f"{use.layer}.weight"] = torch.bmm(bounded.mT, use.inputs).flatten(1)
            sums[f"{use.layer}.bias"] = bounded.sum(dim=1)
        summed = torch.where(mask, losses.detach().view_as(mask), 0.0).sum(dim=1)
        return summed, torch.cat([sums[name] for name in flat.trained], dim=1)

    return _in_parts(compute, examples_at_once(model, num_trained=0))


def _in_parts(compute: Compute, at_once: int) -> Compute:
    """Let clients into `compute` of whom about `at_once` examples are seen together; it sums losses, this has means."""

    def compute_in_parts(parameters: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        mask = batch.tensors["example_mask"]
        parts = [
            compute(parameters[place], batch.of_clients(place.start, place.stop))
            for place in _places(len(parameters), max(at_once // mask.shape[1], 1))
        ]
        losses, sums = (torch.cat(rows) for rows in zip(*parts, strict=True))
        return losses / mask.sum(dim=1).clamp(min=1), sums

    return compute_in_parts


def _places(number: int, at_once: int) -> Iterator[slice]:
    """`number` places in parts of at most `at_once`."""
    return (slice(start, min(start + at_once, number)) for start in range(0, number, at_once))


class Noise:
    """What makes private gradients of sums of bounded ones: noise from a stream of each client's step, and the mean."""

    def __init__(self, block: Block, dtype: torch.dtype, device: torch.device) -> None:
        self._streams = [task.rng.child("privacy") for task in block.tasks]
        self._privacy = [task.setup.local.privacy for task in block.tasks]
        sizes = [min(task.setup.local.batch_size, len(task.examples)) for task in block.tasks]
        self._sizes = torch.tensor(sizes, dtype=dtype, device=device).unsqueeze(1)

    def add(self, sums: Tensor, step: int) -> Tensor:
        """Return the gradients `(k, P)` of the first k clients at a step: noise added, by the expected batch size."""
        noise = [
            privacy.noise(row, stream.child(step))
            for privacy, stream, row in zip(self._privacy, self._streams, sums, strict=False)
            if privacy is not None
        ]
        return (sums + torch.stack(noise)) / self._sizes[: len(sums)]
