"""The losses and gradients of one local step of K clients; on CUDA as a graph that is recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flora.client.local_training import LocalTraining
from flora.client.self_training import SelfTrainingTerm
from flora.clip.adapters.base import AttachedAdapter
from flora.clip.loss_terms import ImagesAndClasses, LossTerm, StepView
from flora.clip.towers.towers import AdaptedClip
from flora.core.contracts import checked_tensor
from flora.core.memory import available_memory_bytes
from flora.core.tree import State, StateLike
from flora.engine.capacity import clients_at_once

# Steps of one shape that run as they are before one is recorded: a recording costs about as much as ten of them.
STEPS_BEFORE_RECORDING = 3
# Recorded steps of a model, the share of the memory that is free at first that they may take, and shapes counted.
MAX_RECORDINGS, MAX_RECORDED_FRACTION, MAX_COUNTED = 32, 0.25, 256
# What the names of a batch's stem outputs begin with that are not those of its labelled images.
OTHER_STEM = "stem of "


@dataclass(frozen=True, eq=False)
class Batch:
    """What K clients see in one step, on the device: tensors by name, each client-major.

    `stem` `(K * B, ...)` are stem outputs, `labels` and `example_mask` are `(K, B)`; `OTHER_STEM` + NAME `(K * U, ...)`
    are stem outputs of other images. With `classes` `(K, C)`, on the CPU, only those are encoded, and labels are places
    among them; with `drawn` `(K, C)`, on the CPU, only the prompt in that place of each class.
    """

    tensors: Mapping[str, Tensor]
    classes: Tensor | None = None
    drawn: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether all prompts of all classes are encoded."""
        return self.classes is None and self.drawn is None

    def of_clients(self, start: int, stop: int) -> Batch:
        """Return what the clients from `start` to `stop` see."""
        number = len(self.tensors["labels"])
        rows = {name: len(tensor) // number for name, tensor in self.tensors.items()}
        return Batch(
            {name: tensor[start * rows[name] : stop * rows[name]] for name, tensor in self.tensors.items()},
            None if self.classes is None else self.classes[start:stop],
            None if self.drawn is None else self.drawn[start:stop],
        )


@dataclass(frozen=True)
class Loss:
    """What a step minimises: the sum of terms, each with the setting that it comes from."""

    terms: tuple[tuple[str, LossTerm], ...]

    @classmethod
    def of(cls, local: LocalTraining, adapter: AttachedAdapter) -> Loss:
        """The objective, the penalty unless it is idle, self-training if it is on, and the adapter's own terms."""
        terms: list[tuple[str, LossTerm]] = [("local.objective", local.objective)]
        if not local.penalty.is_idle:
            terms.append(("local.penalty", local.penalty))
        if local.active_self_training is not None:
            terms.append(("local.self_training", SelfTrainingTerm(local.active_self_training)))
        return cls((*terms, *(("adapter", term) for term in adapter.loss_terms)))

    @property
    def in_batch(self) -> bool:
        """Whether no class matters but those of the batch."""
        return all(term.in_batch for _, term in self.terms)

    @property
    def needs_frozen(self) -> bool:
        """Whether a term compares with the frozen model's features."""
        return any(term.needs_frozen for _, term in self.terms)

    def total(self, views: Sequence[StepView]) -> Tensor:
        """Each client's loss `(K,)`: the sum of all terms over the models that its adapter stands for."""
        labels = views[0].labels
        losses = torch.zeros(len(labels), device=labels.device)
        for setting, term in self.terms:
            for view in views:
                losses = losses + checked_tensor(setting, term, term.loss(view), losses.shape)
        return losses


class FlatStack:
    """K adapters as one matrix `(K, P)`, so that an optimiser's step is a few operations however many layers there are.

    The tensors called `trained` have the first `num_trained` columns. The matrix is a copy; `state` and `leaves` are
    views into it, or into another of its kind.
    """

    def __init__(self, stack: StateLike, device: torch.device, trained: Collection[str] | None = None) -> None:
        self._trained = list(stack) if trained is None else [name for name in stack if name in trained]
        self._shapes = {name: stack[name].shape[1:] for name in self._trained}
        self.num_trained = sum(shape.numel() for shape in self._shapes.values())
        self._shapes |= {name: tensor.shape[1:] for name, tensor in stack.items()}
        size = len(next(iter(stack.values())))
        # Where all clients start from one adapter, as `tree.expand` gives it, that is copied to the device once.
        is_one = all(tensor.stride(0) == 0 for tensor in stack.values())
        rows = [stack[name][:1] if is_one else stack[name] for name in self._shapes]
        matrix = torch.cat([tensor.reshape(len(tensor), -1) for tensor in rows], dim=1).to(device)
        self.matrix = matrix.expand(size, -1).clone() if is_one else matrix

    def state(self, matrix: Tensor) -> State:
        """The rows of a matrix `(K, P)` as a state dict of tensors `(K, ...)`."""
        parts = matrix.split([shape.numel() for shape in self._shapes.values()], dim=1)
        return {
            name: part.unflatten(1, shape) if shape else part.squeeze(1)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def trained_part(self, matrix: Tensor) -> State:
        """The rows of a matrix `(K, P)` as a state dict of the trained tensors alone, `(K, ...)`."""
        return {name: tensor for name, tensor in self.state(matrix).items() if name in self._trained}

    @property
    def layout(self) -> tuple[int, tuple[str, ...]]:
        """What the columns mean: how many tensors are trained, and the names of all in their order."""
        return len(self._trained), tuple(self._shapes)

    def leaves(self, matrix: Tensor) -> tuple[State, list[Tensor]]:
        """The rows of a matrix `(K, P)` as detached tensors; also those that are trained, as leaves for autograd."""
        state = {name: tensor.detach() for name, tensor in self.state(matrix).items()}
        return state, [state[name].requires_grad_() for name in self._trained]


Compute = Callable[[Tensor, Batch], tuple[Tensor, Tensor]]
"""From adapters `(K, P)` and a batch to losses `(K,)` and the gradients of what is trained, `(K, num_trained)`."""


def gradient_function(
    model: AdaptedClip,
    loss: Loss,
    flat: FlatStack,
    dropout: Sequence[torch.Generator] | None,
    *,
    batch_size: int,
    shared_residual: StateLike | None = None,
) -> Compute:
    """Build what computes each client's loss, and its gradient with respect to all that it trains.

    Clients don't depend on each other, so as many go through the model at once as is fastest. `shared_residual` are
    tensors `(1, ...)` that are bound with every client's own.
    """

    at_once = clients_at_once(model, batch_size=batch_size)
    known: dict[
        tuple[int, int], tuple[State, list[Tensor]]
    ] = {}  # they share the parameters' memory, so a block's are made once

    def compute(parameters: Tensor, batch: Batch, residual: StateLike, first: int = 0) -> tuple[Tensor, Tensor]:
        number = len(parameters)
        place = parameters.data_ptr(), number
        state, leaves = known[place] if place in known else known.setdefault(place, flat.leaves(parameters))
        generators = None if dropout is None else dropout[first : first + number]
        losses = loss.total(_step_views(model, loss, {**state, **residual}, batch, generators))
        return losses.detach(), _rows(losses, leaves)

    def compute_in_parts(parameters: Tensor, batch: Batch, residual: StateLike) -> tuple[Tensor, Tensor]:
        number = len(parameters)
        if number <= at_once:
            return compute(parameters, batch, residual)
        parts = [
            compute(parameters[start : start + at_once], batch.of_clients(start, start + at_once), residual, start)
            for start in range(0, number, at_once)
        ]
        losses, gradients = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(gradients)

    residual = shared_residual or {}
    if _is_recorded(model, dropout):
        return _Recorder.of(model).wrap(compute_in_parts, (loss, flat.layout), padded_residual(residual))
    return lambda parameters, batch: compute_in_parts(parameters, batch, residual)


def padded_residual(residual: StateLike) -> State:
    """The residual with zeros added, which change nothing, up to the next power of two of its rank.

    Its rank changes from round to round, and steps are recorded for one shape: so there are few of them.
    """
    padded = {}
    for name, tensor in residual.items():
        axis = 1 if name.endswith("residual_A") else 2  # (1, R, d_in) and (1, d_out, R)
        rank = tensor.shape[axis]
        zeros = list(tensor.shape)
        zeros[axis] = (1 << (rank - 1).bit_length()) - rank if rank else 0
        padded[name] = torch.cat([tensor, tensor.new_zeros(zeros)], dim=axis)
    return padded


def _step_views(
    model: AdaptedClip,
    loss: Loss,
    stack: StateLike,
    batch: Batch,
    generators: Sequence[torch.Generator] | None,
) -> list[StepView]:
    """Return what the loss sees of each of the models that K adapters `(K, ...)` stand for."""
    number = len(batch.tensors["labels"])
    frozen: dict[str, Tensor] = {}
    frozen_classes: Tensor | None = None
    if loss.needs_frozen:
        with torch.no_grad():
            frozen, frozen_classes = _images(model, batch, number), model.frozen_class_features(batch.drawn)
    features: list[ImagesAndClasses] = []
    more: list[dict[str, Tensor]] = []
    for bound in model.adapter.models(stack):
        with model.adapter.bind(bound, generators):
            images = _images(model, batch, number)
            if batch.drawn is not None:
                classes = model.drawn_class_features(batch.drawn)
            else:
                classes = model.class_features(number, batch.classes)
            features.append((images.pop(""), classes))
            more.append(images)
            scale = model.logit_scale()
    return [
        StepView(
            images,
            classes,
            scale,
            batch.tensors,
            frozen.get(""),
            frozen_classes,
            others=(*features[:place], *features[place + 1 :]),
            more=more[place],
            frozen_more=frozen,
        )
        for place, (images, classes) in enumerate(features)
    ]


def _images(model: AdaptedClip, batch: Batch, number: int) -> dict[str, Tensor]:
    """The image features of all stem outputs of a batch, `(K, B, embed_dim)` by name; the labelled ones' name is ""."""
    stems = {"": batch.tensors["stem"]}
    for name, tensor in batch.tensors.items():
        if name.startswith(OTHER_STEM):
            stems[name.removeprefix(OTHER_STEM)] = tensor
    return {name: model.image_features(stem, number) for name, stem in stems.items()}


def _is_recorded(model: AdaptedClip, dropout: object) -> bool:
    """Whether steps are recorded: not with dropout, whose numbers a graph would not draw anew."""
    can_be = dropout is None and not model.adapter.is_large
    return model.device.type == "cuda" and model.speed.cuda_graphs and can_be


def _rows(losses: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """The gradient of the summed losses with respect to all leaves, as rows; zero for those that the loss ignores."""
    gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.reshape(len(losses), -1) for gradient in gradients], dim=1)


Step = Callable[[Tensor, Batch, StateLike], tuple[Tensor, Tensor]]
"""As `Compute`, with the residual that a block's clients share, which is empty where they have none."""


@dataclass(eq=False)
class _Recording:
    """A recorded step: what it reads, what it writes, and how to run it.

    `residual` are copies of a block's tensors, `block` says of which. `num_bytes` is the memory that recording it took.
    """

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    residual: State
    outputs: tuple[Tensor, Tensor]
    num_bytes: int
    block: object = None

    def replay(self, inputs: Sequence[Tensor], residual: StateLike, block: object) -> tuple[Tensor, Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        if self.block is not block:
            for name, tensor in residual.items():
                self.residual[name].copy_(tensor)
            self.block = block
        self.graph.replay()
        return self.outputs


@dataclass(eq=False)
class _Recorder:
    """The recorded steps of one model, by shape, the one used last behind the others.

    What can't be recorded runs as it is. Beyond a number of recordings the one that was not used for longest is
    dropped; beyond `max_bytes` all are, because they share a pool, whose memory comes back with the last of them.
    """

    max_bytes: int
    recordings: dict[object, _Recording] = field(default_factory=dict)
    counts: dict[object, int] = field(default_factory=dict)
    pool: object = None
    works: bool = True

    @staticmethod
    def of(model: AdaptedClip) -> _Recorder:
        if model not in _RECORDERS:
            _RECORDERS[model] = _Recorder(int(MAX_RECORDED_FRACTION * available_memory_bytes(model.device)))
        return _RECORDERS[model]

    def wrap(self, compute: Step, kind: object, residual: StateLike) -> Compute:
        """`compute` with a block's residual, replayed where a step of the same kind and shapes is recorded."""
        block = object()

        def recorded(parameters: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            if not batch.is_plain or not self.works:
                return compute(parameters, batch, residual)
            inputs = (parameters, *batch.tensors.values())
            names = tuple(batch.tensors), tuple(residual)
            key = (kind, names, *((each.shape, each.dtype) for each in (*inputs, *residual.values())))
            if key in self.recordings:
                self.recordings[key] = recording = self.recordings.pop(key)
                return recording.replay(inputs, residual, block)
            if self._is_frequent(key):
                self._record(key, compute, inputs, tuple(batch.tensors), residual)
            return compute(parameters, batch, residual)

        return recorded

    def _is_frequent(self, key: object) -> bool:
        """Count a step of this shape; return whether it is worth a recording."""
        self.counts[key] = self.counts.pop(key, 0) + 1
        while len(self.counts) > MAX_COUNTED:
            del self.counts[next(iter(self.counts))]
        return self.counts[key] > STEPS_BEFORE_RECORDING

    def _record(
        self, key: object, compute: Step, inputs: Sequence[Tensor], names: Sequence[str], residual: StateLike
    ) -> None:
        try:
            recording = self._capture(compute, inputs, names, residual)
        except RuntimeError:  # an operation that can't be recorded, or no memory for it
            self.works = False
            self._forget()
            return
        self.counts.pop(key, None)  # should it be dropped, it has to be frequent again
        self.works = recording.num_bytes <= self.max_bytes
        if recording.num_bytes + sum(each.num_bytes for each in self.recordings.values()) > self.max_bytes:
            self._forget()
            return
        self.recordings[key] = recording
        if len(self.recordings) > MAX_RECORDINGS:
            _wait()
            del self.recordings[next(iter(self.recordings))]

    def _capture(
        self, compute: Step, inputs: Sequence[Tensor], names: Sequence[str], residual: StateLike
    ) -> _Recording:
        """Record a step that reads copies of these tensors. Raises RuntimeError if that can't be."""
        before = torch.cuda.memory_reserved()
        own = tuple(each.clone() for each in inputs)
        own_residual = {name: tensor.clone() for name, tensor in residual.items()}
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool):  # type: ignore[arg-type]
            outputs = compute(own[0], Batch(dict(zip(names, own[1:], strict=True))), own_residual)
        copied = sum(each.nbytes for each in (*own, *own_residual.values(), *outputs))
        num_bytes = max(copied, torch.cuda.memory_reserved() - before)
        return _Recording(graph, own, own_residual, outputs, num_bytes)

    def _forget(self) -> None:
        """Drop all recordings, and the memory that they share."""
        _wait()
        self.recordings.clear()
        self.pool = None


def _wait() -> None:
    """Wait for the device: a graph that it still runs must not be dropped."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


_RECORDERS: WeakKeyDictionary[AdaptedClip, _Recorder] = WeakKeyDictionary()
