"""Local training: a block of K clients takes its steps together, each on its own data with its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.clip.towers import AdaptedClip
from flora.data.augmentation import Augmentation, NoAugmentation
from flora.data.batching import ClientBlock
from flora.federated.features import Features
from flora.federated.gradients import Batch, FlatStack, gradient_function
from flora.federated.objectives import CrossEntropy, Objective
from flora.federated.optimizers import AdamW, Constant, Optimizer, Schedule, clip_rows
from flora.registry import OptionError, Options, option
from flora.rng import Rng
from flora.tree import State, StateLike


@dataclass(frozen=True)
class LocalTraining(Options):
    """What every client does with its data in a round."""

    learning_rate: float = option("step size", 1e-3, above=0)
    epochs: int = option("passes over a client's examples in a round", 1, at_least=1)
    steps: int | None = option("steps in a round, the same for every client, in place of `epochs`", None, at_least=1)
    batch_size: int = option("examples in a step", 32, at_least=1)
    optimizer: Optimizer = option("how gradients become steps", AdamW())
    optimizer_state: str = option(
        "whether a client's optimiser starts fresh each round or is kept from its last one",
        "fresh",
        choices=("fresh", "kept"),
    )
    schedule: Schedule = option("the learning rate over rounds", Constant())
    clip_norm: float | None = option("largest norm of a client's gradient; none: no clipping", None, above=0)
    objective: Objective = option("what a step minimises", CrossEntropy())
    augmentation: Augmentation = option("how training images are changed at random", NoAugmentation())

    def check(self) -> None:
        if self.steps is not None and self.epochs != 1:
            raise OptionError("steps", "give either `steps` or `epochs`, not both")

    def client_state(self, adapter: StateLike) -> State:
        """What one client keeps between its rounds when it trains such an adapter: names and shapes."""
        if self.optimizer_state != "kept":
            return {}
        parameters = torch.empty(1, sum(tensor.numel() for tensor in adapter.values()))
        return {name: tensor[0] for name, tensor in self.optimizer.init(parameters).items()}


@dataclass(frozen=True, eq=False)
class BlockResult:
    """What K clients end with.

    `adapters` are `(K, ...)`, `losses` the means over steps `(K,)`; `failed_steps` `(K,)` are the first steps at which
    loss or gradient were not finite, -1 where they always were; `optimizer_states` has K state dicts where they are
    kept, else K empty ones.
    """

    adapters: State
    losses: Tensor
    failed_steps: Tensor
    optimizer_states: list[State]


def train_block(
    model: AdaptedClip,
    block: ClientBlock,
    *,
    adapters: StateLike,
    features: Features,
    local: LocalTraining,
    learning_rate: float,
    rngs: Sequence[Rng],
    optimizer_states: Sequence[StateLike | None] = (),
) -> BlockResult:
    """Train K clients from `adapters` `(K, ...)`; the order of clients is the block's.

    A step minimises the sum over clients of each one's mean loss over its real examples, so no client's gradient
    depends on another. Clients that have taken all their steps are no longer touched. Results are on the CPU.
    `rngs`, one a client, are what dropout and augmentation are drawn from. `optimizer_states`, one a client, are what
    they kept; None is a fresh start.
    """
    flat = FlatStack(adapters, model.device)
    state = local.optimizer.init(flat.matrix)
    for row, kept in enumerate(optimizer_states):
        for name, tensor in (kept or {}).items():
            state[name][row] = tensor.to(model.device)
    dropout = [rng.child("dropout").torch() for rng in rngs] if model.adapter.has_dropout else None
    gradients_of = gradient_function(model, local.objective, flat, dropout, batch_size=block.indices.shape[2])
    batches = _Batches(model, block, features, in_batch=local.objective.in_batch, rngs=rngs)
    totals = torch.zeros(len(block.clients), device=model.device)
    failed = torch.full((len(block.clients),), -1, device=model.device)
    for num_active, steps in block.segments():
        parameters = flat.matrix[:num_active]
        active_state = {name: tensor[:num_active] for name, tensor in state.items()}
        for step in steps:
            losses, gradients = gradients_of(parameters, batches.of_step(step, num_active))
            # A sum is not finite if one of its terms isn't: one pass over the gradients, and no wait for the device.
            broke = ~torch.isfinite(losses + gradients.sum(dim=1)) & (failed[:num_active] < 0)
            failed[:num_active].masked_fill_(broke, step)
            if local.clip_norm is not None:
                gradients = clip_rows(gradients, local.clip_norm)
            local.optimizer.step(parameters, gradients, active_state, learning_rate)
            totals[:num_active] += losses
    keep = local.optimizer_state == "kept"
    return BlockResult(
        adapters=flat.state(flat.matrix.cpu()),
        losses=totals.cpu() / torch.tensor(block.num_steps),
        failed_steps=failed.cpu(),
        # Copies, so that no client keeps its whole block in memory.
        optimizer_states=[
            {name: tensor[row].cpu().clone() for name, tensor in state.items()} if keep else {}
            for row in range(len(block.clients))
        ],
    )


class _Batches:
    """The steps of a block, moved to the device at once where they can be."""

    def __init__(
        self, model: AdaptedClip, block: ClientBlock, features: Features, *, in_batch: bool, rngs: Sequence[Rng]
    ) -> None:
        self._model, self._features, self._in_batch, self._rngs = model, features, in_batch, rngs
        self._indices = block.indices.to(features.device)
        self._mask = block.example_mask.to(model.device)
        self._labels = features.labels[block.indices]
        self._labels_on_device = self._labels.to(model.device)

    def of_step(self, step: int, num_active: int) -> Batch:
        streams = (rng.child("augmentation", step) for rng in self._rngs[:num_active])
        stem = self._features.take(self._indices[step, :num_active].flatten(), self._model.device, streams)
        mask = self._mask[step, :num_active]
        selected = self._model.select_classes(self._labels[step, :num_active]) if self._in_batch else None
        if selected is None:
            return Batch(stem, self._labels_on_device[step, :num_active], mask)
        return Batch(stem, selected[1].to(self._model.device), mask, selected[0])
