"""Train one block of K clients together, each on its own data with its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.client.corrections import Correction, NoCorrection
from flora.client.gradients import Batch, FlatStack, Loss, gradient_function
from flora.client.objectives import CrossEntropy, Objective
from flora.client.optimizers import AdamW, Constant, Optimizer, Schedule, clip_rows
from flora.client.penalties import NoPenalty, Penalty
from flora.clip.towers.towers import AdaptedClip
from flora.core import tree
from flora.core.contracts import checked_state, checked_tensor
from flora.core.registry import OptionError, Options, option
from flora.core.rng import Rng
from flora.core.tree import State, StateLike
from flora.data.augmentation import Augmentation, NoAugmentation
from flora.data.batching import ClientBlock, count_steps
from flora.features.features import Features

# What precedes the names of what a correction remembers, among all that a client or the server keeps.
CORRECTION = "correction."


@dataclass(frozen=True)
class LocalTraining(Options):
    """What every client does with its data in a round."""

    learning_rate: float = option("step size", 1e-3, above=0)
    epochs: int = option("passes over a client's examples in a round", 1, at_least=1, at_most=1_000_000)
    steps: int | None = option(
        "steps in a round, the same for every client, in place of `epochs`", None, at_least=1, at_most=10_000_000
    )
    batch_size: int = option("examples in a step", 32, at_least=1, at_most=1_000_000)
    optimizer: Optimizer = option("how gradients become steps", AdamW())
    optimizer_state: str = option(
        "whether a client's optimiser starts fresh each round or is kept from its last one",
        "fresh",
        choices=("fresh", "kept"),
    )
    schedule: Schedule = option("the learning rate over rounds", Constant())
    clip_norm: float | None = option("largest norm of a client's gradient; none: no clipping", None, above=0)
    objective: Objective = option("what a step minimises", CrossEntropy())
    penalty: Penalty = option("what is added to the loss against forgetting the frozen model", NoPenalty())
    correction: Correction = option("what is added to the gradient against drifting apart", NoCorrection())
    augmentation: Augmentation = option("how training images are changed at random", NoAugmentation())

    def check(self) -> None:
        if self.steps is not None and self.epochs != 1:
            raise OptionError("steps", "give either `steps` or `epochs`, not both")

    def num_steps(self, num_examples: int) -> int:
        """How many steps a client of so many examples takes in a round."""
        return count_steps(num_examples, batch_size=self.batch_size, epochs=self.epochs, steps=self.steps)

    def client_state(self, trained: StateLike) -> State:
        """What one client keeps between its rounds when it trains such tensors: names and shapes."""
        vector, state = tree.vector_like(trained), {}
        if self.optimizer_state == "kept":
            state = {name: tensor[0] for name, tensor in self.optimizer.init(vector.unsqueeze(0)).items()}
        return state | tree.add_prefix(CORRECTION, self.correction.memory(vector))


@dataclass(frozen=True, eq=False)
class BlockResult:
    """What K clients end with.

    `adapters` are `(K, ...)`, of the trained tensors alone, `losses` the means over steps `(K,)`; `failed_steps` `(K,)`
    are the first steps at which loss or gradient were not finite, -1 where they always were; `kept` has what each of
    the K clients carries to its next round, `sent` what it sends beside its adapter.
    """

    adapters: State
    losses: Tensor
    failed_steps: Tensor
    kept: list[State]
    sent: list[State]


def train_block(
    model: AdaptedClip,
    block: ClientBlock,
    *,
    adapters: StateLike,
    features: Features,
    local: LocalTraining,
    learning_rate: float,
    rngs: Sequence[Rng],
    kept: Sequence[StateLike | None] = (),
    trained: Collection[str] | None = None,
    server_memory: StateLike | None = None,
    beside: StateLike | None = None,
    anchor: StateLike | None = None,
    advance: Callable[[int], object] = lambda number: None,
) -> BlockResult:
    """Train K clients from `adapters` `(K, ...)`; the order of clients is the block's.

    A step minimises the sum over clients of each one's mean loss over its real examples, so no client's gradient
    depends on another. Clients that have taken all their steps are no longer touched. Results are on the CPU.
    `rngs`, one a client, are what dropout and augmentation are drawn from. `kept`, one a client, is what they carry
    from their last round; None is a fresh start. `trained` are the names of the tensors to train; None: all.
    `server_memory` is what the correction remembers at the server. `beside` are tensors `(1, ...)` that all clients
    share and nobody trains. `anchor` `(K, ...)` is what the correction measures distances from, in place of `adapters`.
    `advance` is told after each step how many clients took it.
    """
    flat = FlatStack(adapters, model.device, trained)
    is_trained = slice(0, flat.num_trained)
    state = local.optimizer.init(flat.matrix[:, is_trained])
    for row, own in enumerate(kept):
        for name in state.keys() & (own or {}).keys():
            state[name][row] = own[name].to(model.device)  # type: ignore[index]
    beside = {name: tensor.to(model.device) for name, tensor in (beside or {}).items()}
    origin = flat if anchor is None else FlatStack(anchor, model.device, trained)
    drift = _CorrectionState(local.correction, origin.matrix[:, is_trained], kept, server_memory or {})
    gates = flat.columns(model.adapter.gates)
    dropout = [rng.child("dropout").torch() for rng in rngs] if model.adapter.has_dropout else None
    loss = Loss(local.objective, local.penalty, model.adapter.mutual)
    gradients_of = gradient_function(model, loss, flat, dropout, batch_size=block.indices.shape[2], beside=beside)
    batches = _Batches(model, block, features, in_batch=loss.in_batch, rngs=rngs)
    totals = torch.zeros(len(block.clients), device=model.device, dtype=flat.matrix.dtype)
    failed = torch.full((len(block.clients),), -1, device=model.device)
    for num_active, steps in block.segments():
        parameters = flat.matrix[:num_active]
        active_state = {name: tensor[:num_active] for name, tensor in state.items()}
        for step in steps:
            losses, gradients = gradients_of(parameters, batches.of_step(step, num_active))
            # A sum is not finite if one of its terms isn't: one pass over the gradients, and no wait for the device.
            broke = ~torch.isfinite(losses + gradients.sum(dim=1)) & (failed[:num_active] < 0)
            failed[:num_active].masked_fill_(broke, step)
            gradients = drift.correct(gradients, parameters[:, is_trained])
            if local.clip_norm is not None:
                gradients = clip_rows(gradients, local.clip_norm)
            local.optimizer.step(parameters[:, is_trained], gradients, active_state, learning_rate)
            if len(gates):
                parameters[:, gates] = F.softshrink(parameters[:, gates], learning_rate * model.adapter.threshold)
            totals[:num_active] += losses
            advance(num_active)
    remembered, sent = drift.finish(flat.matrix[:, is_trained], block.num_steps, learning_rate)
    keep = local.optimizer_state == "kept"
    return BlockResult(
        adapters=flat.trained_part(flat.matrix.cpu()),
        losses=totals.cpu() / torch.tensor(block.num_steps),
        failed_steps=failed.cpu(),
        # Copies, so that no client keeps its whole block in memory.
        kept=[
            {name: tensor[row].cpu().clone() for name, tensor in state.items() if keep} | remembered[row]
            for row in range(len(block.clients))
        ],
        sent=sent,
    )


class _CorrectionState:
    """A correction at work on a block: what K clients got from the server, and what they and the server remember."""

    def __init__(
        self, correction: Correction, start: Tensor, kept: Sequence[StateLike | None], server_memory: StateLike
    ) -> None:
        self._correction, self._is_idle = correction, isinstance(correction, NoCorrection)
        self._start = start if self._is_idle else start.clone()
        self._server = {name: tensor.to(start.device).unsqueeze(0) for name, tensor in server_memory.items()}
        fresh = correction.memory(torch.empty(start.shape[1], dtype=start.dtype))
        found = [tree.strip_prefix(CORRECTION, own or {}) or fresh for own in kept] or [fresh] * len(start)
        self._own = {name: torch.stack([own[name] for own in found]).to(start.device) for name in fresh}

    def correct(self, gradients: Tensor, parameters: Tensor) -> Tensor:
        """The corrected gradients `(k, P)` of the first k clients."""
        if self._is_idle:
            return gradients
        own = {name: tensor[: len(gradients)] for name, tensor in self._own.items()}
        found = self._correction.correct(gradients, parameters, self._start[: len(gradients)], own, self._server)
        return checked_tensor("local.correction", self._correction, found, gradients.shape)

    def finish(self, end: Tensor, num_steps: Sequence[int], learning_rate: float) -> tuple[list[State], list[State]]:
        """What each client remembers from now on, under names for keeping, and what it sends."""
        if not self._own:
            return [{} for _ in num_steps], [{} for _ in num_steps]
        counts = torch.tensor(num_steps, device=end.device, dtype=end.dtype).unsqueeze(1)
        after = self._correction.remember(end - self._start, self._own, self._server, counts, learning_rate)
        after = checked_state("local.correction", self._correction, after, self._own)
        # Copies, so that no client keeps its whole block in memory.
        old, new = (
            [{name: tensor[row].cpu().clone() for name, tensor in each.items()} for row in range(len(num_steps))]
            for each in (self._own, after)
        )
        sent = [self._correction.sent(before, now) for before, now in zip(old, new, strict=True)]
        return [tree.add_prefix(CORRECTION, now) for now in new], sent


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
