"""Train one block of K clients together, each on its own data with its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flora.client.optimizers import Rate, clip_rows
from flora.clip.adapters.base import HELD_CLASSES
from flora.clip.towers.towers import AdaptedClip
from flora.core import tree
from flora.core.contracts import checked_state, checked_tensor
from flora.core.low_rank import is_residual
from flora.core.states import ClientState
from flora.core.tree import State, StateLike
from flora.engine.batch import FROZEN_IMAGES, OTHER_STEM, Batch, Compute
from flora.engine.blocks import Block
from flora.engine.examples import Noise, bounded_gradient_function
from flora.engine.frozen import BlockImages, FrozenImages
from flora.engine.gradients import FlatStack, Loss, gradient_function
from flora.engine.tasks import ClientResult, TrainingSetup
from flora.features.features import Features


def train_block(
    model: AdaptedClip,
    features: Features,
    block: Block,
    frozen_images: FrozenImages,
    advance: Callable[[int], object] = lambda number: None,
) -> list[ClientResult]:
    """Train K clients together and return their results, in the order of the block.

    A step minimises the sum over clients of each one's mean loss over its real examples, so no client's gradient
    depends on another. Clients that have taken all their steps are no longer touched. `frozen_images` are those of
    `features`. `advance` is told after each step how many clients took it.
    """
    local, rates = block.setup.local, _learning_rates(block, model.device)
    flat = FlatStack(_stacked([task.adapter for task in block.tasks]), model.device, block.setup.trained)
    trained = flat.matrix[:, : flat.num_trained]
    state = _optimizer_state(block, trained)
    correction = _Corrections(block, _anchors(block, flat, model.device))
    loss = Loss.of(local, model.adapter)
    gradients_of = _gradient_function(model, loss, flat, block)
    noise = None if local.privacy is None else Noise(block, flat.matrix.dtype, model.device)
    frozen = frozen_images.of_block(block) if loss.needs_frozen else None
    batches = _Batches(model, features, block, frozen, in_batch=loss.in_batch)
    totals = torch.zeros(len(block.tasks), device=model.device, dtype=flat.matrix.dtype)
    failed = torch.full((len(block.tasks),), -1, device=model.device)
    for num_active, steps in block.segments():
        parameters = flat.matrix[:num_active]
        stack = {} if model.adapter.after_step is None else flat.state(parameters)
        active_state = {name: tensor[:num_active] for name, tensor in state.items()}
        learning_rate = rates[:num_active] if isinstance(rates, Tensor) else rates
        for step in steps:
            losses, gradients = gradients_of(parameters, batches.of_step(step, num_active))
            if noise is not None:
                gradients = noise.add(gradients, step)
            gradients = _projected(model, flat, block, gradients, step)
            # A sum is not finite if one of its terms isn't: one pass over the gradients, and no wait for the device.
            broke = ~torch.isfinite(losses + gradients.sum(dim=1)) & (failed[:num_active] < 0)
            failed[:num_active].masked_fill_(broke, step)
            gradients = correction.correct(gradients, trained[:num_active])
            if local.clip_norm is not None:
                gradients = clip_rows(gradients, local.clip_norm)
            local.optimizer.step(trained[:num_active], gradients, active_state, learning_rate)
            if model.adapter.after_step is not None:
                model.adapter.after_step(stack, learning_rate)
            totals[:num_active].add_(losses)
            advance(num_active)
    remembered, sent = correction.finish(trained)
    return _results(block, flat, totals, failed, _client_states(block, state, remembered), sent)


def _stacked(adapters: Sequence[StateLike]) -> StateLike:
    """The adapters `(K, ...)` without their residuals, and without a copy where all clients start from one."""
    is_one = all(adapter is adapters[0] for adapter in adapters)
    parts = [
        {name: tensor for name, tensor in adapter.items() if not is_residual(name)}
        for adapter in (adapters[:1] if is_one else adapters)
    ]
    return tree.expand(parts[0], len(adapters)) if is_one else tree.stack(parts)


def _learning_rates(block: Block, device: torch.device) -> Rate:
    """The clients' learning rate: a number if they have the same, else `(K, 1)` in double precision."""
    rates = [task.setup.learning_rate for task in block.tasks]
    if len(set(rates)) == 1:
        return rates[0]
    return torch.tensor(rates, dtype=torch.float64, device=device).unsqueeze(1)


def _anchors(block: Block, flat: FlatStack, device: torch.device) -> Tensor:
    """Return what the correction measures distances from, `(K, P)`: the tasks' anchors, if any, else their starts."""
    if all(task.anchor is None for task in block.tasks):
        return flat.matrix[:, : flat.num_trained]
    anchors = [task.adapter if task.anchor is None else task.anchor for task in block.tasks]
    origin = FlatStack(_stacked(anchors), device, block.setup.trained)
    return origin.matrix[:, : flat.num_trained]


def _optimizer_state(block: Block, trained: Tensor) -> State:
    """The optimiser's state for `trained` `(K, P)`: what clients carry from their last round, else fresh."""
    state = block.setup.local.optimizer.init(trained)
    for row, task in enumerate(block.tasks):
        for name in state.keys() & task.state.optimizer.keys():
            state[name][row] = task.state.optimizer[name].to(trained.device)
    return state


def _projected(model: AdaptedClip, flat: FlatStack, block: Block, gradients: Tensor, step: int) -> Tensor:
    """Return what the first k clients go along at a step, `(k, P)`: what the adapter makes of their gradients."""
    if model.adapter.project is None:
        return gradients
    number, named = len(gradients), flat.gradients(gradients)
    generators = [task.rng.child("projection", step).torch() for task in block.tasks[:number]]
    projected = model.adapter.project(flat.state(flat.matrix[:number]), named, generators)
    return torch.cat([projected[name].flatten(1) for name in named], dim=1)


def _gradient_function(model: AdaptedClip, loss: Loss, flat: FlatStack, block: Block) -> Compute:
    """Build what computes the losses and gradients of a block's steps, with the residual that its clients share."""
    first = block.tasks[0].adapter
    residual = {name: tensor.unsqueeze(0).to(model.device) for name, tensor in first.items() if is_residual(name)}
    if block.setup.local.privacy is not None:
        return bounded_gradient_function(model, loss, flat, block.setup.local.privacy, residual)
    dropout = None
    if model.adapter.has_dropout:
        dropout = [task.rng.child("dropout").torch() for task in block.tasks]
    images = block.setup.local.images_per_step - block.setup.local.batch_size + block.indices.shape[2]
    return gradient_function(model, loss, flat, dropout, batch_size=images, shared_residual=residual)


def _client_states(block: Block, optimizer: State, remembered: Sequence[State]) -> list[ClientState]:
    """Return what each client carries to its next round; copies, so that none keeps its whole block in memory."""
    keep = block.setup.local.optimizer_state == "kept"
    return [
        ClientState(
            optimizer={name: tensor[row].cpu().clone() for name, tensor in optimizer.items() if keep},
            correction=remembered[row],
        )
        for row in range(len(block.tasks))
    ]


def _results(
    block: Block, flat: FlatStack, totals: Tensor, failed: Tensor, states: Sequence[ClientState], sent: Sequence[State]
) -> list[ClientResult]:
    """A result for each client, from the block's parameters, summed losses `(K,)` and first failed steps `(K,)`."""
    adapters = flat.trained_rows(flat.matrix.cpu())
    losses = (totals.cpu() / torch.tensor(block.num_steps)).tolist()
    return [
        ClientResult(
            client=task.client,
            adapter=adapters[row],
            loss=losses[row],
            num_steps=block.num_steps[row],
            failed_step=None if failed_step < 0 else failed_step,
            state=states[row],
            sent_correction=sent[row],
            report=block.reports[row] if block.reports else {},
        )
        for row, (task, failed_step) in enumerate(zip(block.tasks, failed.tolist(), strict=True))
    ]


class _Corrections:
    """The corrections at work on a block: each run's on the rows of its clients."""

    def __init__(self, block: Block, start: Tensor) -> None:
        self._num_rows = len(block.tasks)
        self._parts = [_CorrectionState(block, setup, rows, start) for setup, rows in block.by_setup()]

    def correct(self, gradients: Tensor, parameters: Tensor) -> Tensor:
        """The corrected gradients `(k, P)` of the first k clients."""
        if len(self._parts) == 1:
            return self._parts[0].correct(gradients, parameters)
        if all(part.is_idle for part in self._parts):
            return gradients
        corrected = torch.empty_like(gradients)
        for part in self._parts:
            rows = part.first_rows(len(gradients))
            if rows:
                corrected[rows] = part.correct(gradients[rows], parameters[rows])
        return corrected

    def finish(self, end: Tensor) -> tuple[list[State], list[State]]:
        """Return what each client remembers from now on, and what it sends."""
        remembered: list[State] = [{} for _ in range(self._num_rows)]
        sent: list[State] = [{} for _ in range(self._num_rows)]
        for part in self._parts:
            rows = part.first_rows(self._num_rows)
            for row, *values in zip(rows, *part.finish(end), strict=True):
                remembered[row], sent[row] = values
        return remembered, sent


class _CorrectionState:
    """One run's correction at work: what its clients got from the server, and what they and the server remember."""

    def __init__(self, block: Block, setup: TrainingSetup, rows: Sequence[int], start: Tensor) -> None:
        self._setup, self._rows = setup, rows
        self._num_steps = [block.num_steps[row] for row in rows]
        self._correction = setup.local.correction
        self.is_idle = self._correction.is_idle
        self._start = start if self.is_idle else start[rows]
        self._server = {name: tensor.to(start.device).unsqueeze(0) for name, tensor in setup.server_correction.items()}
        fresh = self._correction.memory(torch.empty(start.shape[1], dtype=start.dtype))
        memories = [block.tasks[row].state.correction or fresh for row in rows]
        self._remembered = {name: torch.stack([each[name] for each in memories]).to(start.device) for name in fresh}

    def first_rows(self, number: int) -> list[int]:
        """The block's rows of this run's clients, of the first `number` rows."""
        return [row for row in self._rows if row < number]

    def correct(self, gradients: Tensor, parameters: Tensor) -> Tensor:
        """The corrected gradients `(k, P)` of the first k of the run's clients."""
        if self.is_idle:
            return gradients
        state = {name: tensor[: len(gradients)] for name, tensor in self._remembered.items()}
        corrected = self._correction.correct(gradients, parameters, self._start[: len(gradients)], state, self._server)
        return checked_tensor("local.correction", self._correction, corrected, gradients.shape)

    def finish(self, end: Tensor) -> tuple[list[State], list[State]]:
        """Return what each of the run's clients remembers from now on, and sends, when they are at `end` `(K, P)`."""
        if not self._remembered:
            return [{} for _ in self._num_steps], [{} for _ in self._num_steps]
        counts = torch.tensor(self._num_steps, device=end.device, dtype=end.dtype).unsqueeze(1)
        moved = end[self._rows] - self._start
        after = self._correction.remember(moved, self._remembered, self._server, counts, self._setup.learning_rate)
        after = checked_state("local.correction", self._correction, after, self._remembered)
        # Copies, so that no client keeps its whole block in memory.
        old, new = (
            [{name: tensor[row].cpu().clone() for name, tensor in each.items()} for row in range(len(self._num_steps))]
            for each in (self._remembered, after)
        )
        return new, [self._correction.sent(before, now) for before, now in zip(old, new, strict=True)]


class _Batches:
    """The steps of a block, moved to the device at once where they can be."""

    def __init__(
        self, model: AdaptedClip, features: Features, block: Block, frozen: BlockImages | None, *, in_batch: bool
    ) -> None:
        self._model, self._features, self._frozen, self._in_batch = model, features, frozen, in_batch
        self._rngs = [task.rng for task in block.tasks]
        self._draws = block.setup.local.prompts == "random"
        self._places, self._indices = block.indices, block.indices.to(features.device)
        self._mask = block.example_mask.to(model.device)
        # Private gradients cost as much for padding as for an example.
        self._counts = None if block.setup.local.privacy is None else block.example_mask.sum(dim=2)
        self._labels = features.labels[block.indices]
        self._labels_on_device = self._labels.to(model.device)
        self._held = _held_classes(model, features, block) if model.adapter.reads_held_classes else None
        self._self_training = block.setup.local.active_self_training
        self._unlabelled = block.extra.get("unlabelled")
        self._extra = {
            name: tensor.to(model.device, model.clip.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in block.extra.items()
            if name != "unlabelled"
        }

    def of_step(self, step: int, num_active: int) -> Batch:
        """Return what the first `num_active` clients see at a step."""
        streams = (rng.child("augmentation", step) for rng in self._rngs[:num_active])
        width = None if self._counts is None else max(int(self._counts[step, :num_active].max()), 1)
        stem = self._features.take(self._indices[step, :num_active, :width].flatten(), self._model.device, streams)
        labels, classes, drawn = self._labels_on_device[step, :num_active, :width], None, None
        if self._draws:
            drawn = self._model.draw_places(rng.child("prompts", step) for rng in self._rngs[:num_active])
        selects = self._in_batch and drawn is None
        selected = self._model.select_classes(self._labels[step, :num_active]) if selects else None
        if selected is not None:
            classes, labels = selected[0], selected[1].to(self._model.device)
        tensors = {"stem": stem, "labels": labels, "example_mask": self._mask[step, :num_active, :width]}
        extra = {name: tensor[step, :num_active] for name, tensor in self._extra.items()}
        if self._held is not None:
            extra[HELD_CLASSES] = self._held[:num_active]
        if self._frozen is not None:
            extra[FROZEN_IMAGES] = self._frozen.of_step(step, num_active, width)
        for name, target in self._features.targets.items():
            extra[name] = target[self._places[step, :num_active, :width]].to(self._model.device)
        return Batch({**tensors, **extra, **self._other_stems(step, num_active)}, classes, drawn)

    def _other_stems(self, step: int, num_active: int) -> dict[str, Tensor]:
        """The views of images without labels that a step sees, `(k * U, ...)`, by their names in its batch."""
        if self._self_training is None or self._unlabelled is None:
            return {}
        indices, stems = self._unlabelled[step, :num_active].flatten(), {}
        for name in self._self_training.preference.views:
            images, streams = self._features, None
            if name != "clean":
                images = self._features.views[name]
                streams = [rng.child("unlabelled views", step) for rng in self._rngs[:num_active]]
            stems[OTHER_STEM + name] = images.take(indices.to(images.device), self._model.device, streams)
        return stems


def _held_classes(model: AdaptedClip, features: Features, block: Block) -> Tensor:
    """Which classes each client has examples of, `(K, C)`, on the device."""
    held = torch.zeros(len(block.tasks), len(model.class_names), dtype=torch.bool)
    for row, task in zip(held, block.tasks, strict=True):
        row[features.labels[task.examples]] = True
    return held.to(model.device)
