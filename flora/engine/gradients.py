"""The losses and gradients of one local step of K clients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.client.local_training import LocalTraining
from flora.client.penalties import Guide
from flora.client.self_training import SelfTrainingTerm
from flora.clip.adapters.base import HELD_CLASSES, AttachedAdapter
from flora.clip.loss_terms import ImagesAndClasses, LossTerm, StepView
from flora.clip.towers.towers import AdaptedClip
from flora.core.contracts import checked_tensor
from flora.core.tree import FlatState, Layout, State, StateLike
from flora.engine.batch import FROZEN_IMAGES, OTHER_STEM, Batch, Compute
from flora.engine.capacity import clients_at_once
from flora.engine.recording import Recorder, is_recorded


@dataclass(frozen=True)
class Loss:
    """What a step minimises: the sum of terms, each with the setting that it comes from.

    It is of the models of a step from `first_model` on. The gradient of a `guide`, if there is one, is not added to
    that of the terms but changes it. `from_logits` says that nothing of it looks at features.
    """

    terms: tuple[tuple[str, LossTerm], ...]
    first_model: int = 0
    guide: Guide | None = None
    from_logits: bool = False

    @classmethod
    def of(cls, local: LocalTraining, adapter: AttachedAdapter) -> Loss:
        """The objective, the penalty unless it is idle, self-training if it is on, and the adapter's own terms."""
        terms: list[tuple[str, LossTerm]] = [("local.objective", local.objective)]
        guide = local.penalty if isinstance(local.penalty, Guide) else None
        if guide is None and not local.penalty.is_idle:
            terms.append(("local.penalty", local.penalty))
        if local.active_self_training is not None:
            terms.append(("local.self_training", SelfTrainingTerm(local.active_self_training)))
        terms += (("adapter", term) for term in adapter.loss_terms)
        from_logits = len(terms) == 1 and guide is None and local.objective.from_logits
        return cls(tuple(terms), adapter.first_loss_model, guide, from_logits)

    @property
    def in_batch(self) -> bool:
        """Whether no class matters but those of the batch."""
        return all(term.in_batch for _, term in (*self.terms, *self._guides))

    @property
    def needs_frozen(self) -> bool:
        """Whether a term compares with the frozen model's features."""
        return any(term.needs_frozen for _, term in (*self.terms, *self._guides))

    @property
    def _guides(self) -> tuple[tuple[str, LossTerm], ...]:
        return () if self.guide is None else (("local.penalty", self.guide),)

    def total(self, views: Sequence[StepView]) -> Tensor:
        """Each client's loss `(K,)`: the sum of all terms over the models, of a step's `views`, that it is of."""
        return self._sum(self.terms, views)

    def gradients(self, views: Sequence[StepView], rows: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """Return each client's loss `(K,)`, detached, and the gradient `(K, P)` that a step goes along.

        `rows(losses)` are the gradients of losses `(K,)`; with `keep_graph=True` it can be called once more.
        """
        losses = self.total(views)
        if self.guide is None:
            return losses.detach(), rows(losses)
        own = rows(self._sum(self._guides, views), keep_graph=True)
        gradients = self.guide.guided(rows(losses), own)
        return losses.detach(), checked_tensor("local.penalty", self.guide, gradients, own.shape)

    def _sum(self, terms: Sequence[tuple[str, LossTerm]], views: Sequence[StepView]) -> Tensor:
        labels = views[0].labels
        losses = torch.zeros(len(labels), device=labels.device)
        for setting, term in terms:
            for view in views[self.first_model :]:
                losses = losses + checked_tensor(setting, term, term.loss(view), losses.shape)
        return losses


class FlatStack:
    """K adapters as one matrix `(K, P)`, so that an optimiser's step is a few operations however many layers there are.

    Those called `trained`, in this order, have the first `num_trained` columns. The matrix is a copy; `state` and
    `leaves` are views into it, or into another of its kind.
    """

    def __init__(self, stack: StateLike, device: torch.device, trained: Collection[str] | None = None) -> None:
        self.trained = [name for name in stack if trained is None or name in trained]
        shapes = {name: stack[name].shape[1:] for name in (*self.trained, *stack)}
        self._all, self._trained = Layout(tuple(shapes.items())), Layout(tuple(shapes.items())[: len(self.trained)])
        self.num_trained = self._trained.size
        size = len(next(iter(stack.values())))
        # Where all clients start from one adapter, as `tree.expand` gives it, that is copied to the device once.
        is_one = all(tensor.stride(0) == 0 for tensor in stack.values())
        rows = [stack[name][:1] if is_one else stack[name] for name in shapes]
        matrix = torch.cat([tensor.reshape(len(tensor), -1) for tensor in rows], dim=1).to(device)
        self.matrix = matrix.expand(size, -1).clone() if is_one else matrix

    def state(self, matrix: Tensor) -> State:
        """The rows of a matrix `(K, P)` as a state dict of tensors `(K, ...)`."""
        return self._all.split(matrix)

    def gradients(self, matrix: Tensor) -> State:
        """The rows of gradients `(K, num_trained)` as a state dict of the trained tensors alone, `(K, ...)`."""
        return self._trained.split(matrix)

    def trained_rows(self, matrix: Tensor) -> list[FlatState]:
        """The trained tensors of each row of a matrix `(K, P)`: views into it."""
        return self._trained.rows(matrix[:, : self.num_trained])

    @property
    def layout(self) -> tuple[int, tuple[str, ...]]:
        """The order of the columns: how many of the tensors are trained, and the names of all of them."""
        return len(self.trained), tuple(self._all.places)

    def leaves(self, matrix: Tensor) -> tuple[State, list[Tensor]]:
        """The rows of a matrix `(K, P)` as detached tensors; also those that are trained, as leaves for autograd."""
        state = {name: tensor.detach() for name, tensor in self.state(matrix).items()}
        return state, [state[name].requires_grad_() for name in self.trained]


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
    # They share the parameters' memory, so a block's are made once.
    known: dict[tuple[int, int], tuple[State, list[Tensor]]] = {}
    is_first = dropout is None and _can_share_texts(model, flat)

    def compute(
        parameters: Tensor, batch: Batch, residual: StateLike, first: int, shares: bool
    ) -> tuple[Tensor, Tensor]:
        number = len(parameters)
        place = parameters.data_ptr(), number
        state, leaves = known[place] if place in known else known.setdefault(place, flat.leaves(parameters))
        generators = None if dropout is None else dropout[first : first + number]
        alike = _Alike.of(parameters) if shares else None
        texts = None if alike is None else SharedTexts(model, flat.leaves(parameters[alike.first]), residual)
        leaf = None if texts is None or alike is None else texts.leaf(alike.which, alike.turn)
        views = step_views(model, loss, {**state, **residual}, batch, generators, leaf)
        rows = functools.partial(rows_of if texts is None else texts.rows, leaves=leaves)
        return loss.gradients(views, rows)

    def compute_in_parts(parameters: Tensor, batch: Batch, residual: StateLike) -> tuple[Tensor, Tensor]:
        nonlocal is_first
        number = len(parameters)
        shares, is_first = is_first and batch.is_plain, False
        if number <= at_once:
            return compute(parameters, batch, residual, 0, shares)
        parts = [
            compute(parameters[place], batch.of_clients(place.start, place.stop), residual, place.start, shares)
            for place in (slice(start, start + at_once) for start in range(0, number, at_once))
        ]
        losses, gradients = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(gradients)

    residual = shared_residual or {}
    if is_recorded(model, dropout):
        return Recorder.of(model).wrap(compute_in_parts, (loss, flat.layout), residual)
    return lambda parameters, batch: compute_in_parts(parameters, batch, residual)


def _can_share_texts(model: AdaptedClip, flat: FlatStack) -> bool:
    """Whether clients that start from one adapter may encode the classes once. On CUDA steps are recorded instead."""
    if model.device.type != "cpu" or not model.speed.share_first_step or not model.text.trains_blocks:
        return False
    return model.adapter.can_share_texts and len(model.adapter.models(flat.state(flat.matrix[:1]))) == 1


@dataclass(frozen=True, eq=False)
class _Alike:
    """Which of K adapters are the same, number by number: there are U different ones, of at most M clients each.

    `first` (U,) are rows with the different ones. Client k has the one in place `which[k]` of them, and is number
    `turn[k]` of the clients that have it.
    """

    first: list[int]
    which: list[int]
    turn: list[int]

    @classmethod
    def of(cls, parameters: Tensor) -> _Alike | None:
        """Compare the rows of `(K, P)`; return None where it would not pay to compute anything once for those alike."""
        first: list[int] = []
        which: list[int] = []
        turn: list[int] = []
        for row, numbers in enumerate(parameters):
            same = (place for place, other in enumerate(first) if torch.equal(parameters[other], numbers))
            place = next(same, len(first))
            if place == len(first):
                first.append(row)
            turn.append(which.count(place))
            which.append(place)
        # U forward passes instead of K; but the backward pass, which takes as long, is one of U x M, not of K.
        saves = 2 * len(which) > len(first) + len(first) * (max(turn) + 1)
        return cls(first, which, turn) if saves else None


class SharedTexts:
    """The class features of U adapters, computed once for all rows of a step that have the same one.

    `leaf` stands for them in the loss. What the loss's gradient by it comes to by the adapters' tensors is one backward
    pass for all rows with one adapter, because that is linear.
    """

    def __init__(
        self, model: AdaptedClip, adapters: tuple[State, list[Tensor]], residual: StateLike, drawn: Tensor | None = None
    ) -> None:
        state, self._leaves = adapters
        with model.adapter.bind({**state, **residual}):
            if drawn is None:
                self._features = model.class_features(len(self._leaves[0]))
            else:
                self._features = model.drawn_class_features(drawn)

    def leaf(self, which: Sequence[int], turn: Sequence[int]) -> Tensor:
        """The features of K rows, `(K, C, embed_dim)`, to differentiate by.

        Row k has the adapter in place `which[k]`, and is number `turn[k]` of the rows that have it.
        """
        self._places = turn, which
        self._leaf = self._features.detach()[which].requires_grad_()
        return self._leaf

    def rows(self, losses: Tensor, leaves: Sequence[Tensor], *, keep_graph: bool = False) -> Tensor:
        """The gradients of losses `(K,)` by the rows' `leaves`, as `rows_of`: by the last `leaf`, and directly."""
        *direct, by_leaf = torch.autograd.grad(
            losses.sum(), [*leaves, self._leaf], allow_unused=True, materialize_grads=True, retain_graph=keep_graph
        )
        # (M, U, C, embed_dim): each of the M passes is for one row of each adapter, or for none.
        places = self._places
        if len(self._features) == 1:
            by_features = by_leaf.unsqueeze(1)
        else:
            by_features = by_leaf.new_zeros((max(places[0]) + 1, *self._features.shape))
            by_features[places] = by_leaf
        through = torch.autograd.grad(
            self._features, self._leaves, by_features, is_grads_batched=True, allow_unused=True, retain_graph=True
        )
        number = len(losses)
        return torch.cat(
            [
                each.reshape(number, -1) if other is None else (each + other[places]).reshape(number, -1)
                for each, other in zip(direct, through, strict=True)
            ],
            dim=1,
        )


def step_views(
    model: AdaptedClip,
    loss: Loss,
    stack: StateLike,
    batch: Batch,
    generators: Sequence[torch.Generator] | None,
    texts: Tensor | None = None,
) -> list[StepView]:
    """Return what the loss sees of each of the models that K adapters `(K, ...)` stand for.

    `texts` `(K, C, embed_dim)` are the class features of the only one, if they are known.
    """
    number = len(batch.tensors["labels"])
    frozen: dict[str, Tensor] = {}
    frozen_classes: Tensor | None = None
    if loss.needs_frozen:
        with torch.no_grad():
            frozen = _images(model, batch, number, batch.tensors.get(FROZEN_IMAGES))
            frozen_classes = model.frozen_class_features(batch.drawn)
    if model.adapter.reads_held_classes:
        stack = {**stack, HELD_CLASSES: batch.tensors[HELD_CLASSES]}
    features: list[ImagesAndClasses] = []
    more: list[dict[str, Tensor]] = []
    for bound in model.adapter.models_of_step(stack):
        with model.adapter.bind(bound, generators):
            images = _images(model, batch, number)
            if model.comparison.by_image:
                classes = model.classes_by_image(images[""], batch.classes)
            else:
                classes = _class_features(model, batch, number) if texts is None else texts
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
            comparison=model.adapter.comparison,
        )
        for place, (images, classes) in enumerate(features)
    ]


def _class_features(model: AdaptedClip, batch: Batch, number: int) -> Tensor:
    """The features of the classes, or of the prompts, that a batch says, `(K, C, embed_dim)`."""
    if batch.drawn is not None:
        return model.drawn_class_features(batch.drawn)
    return model.class_features(number, batch.classes)


def _images(model: AdaptedClip, batch: Batch, number: int, known: Tensor | None = None) -> dict[str, Tensor]:
    """The image features of all stem outputs of a batch, `(K, B, embed_dim)` by name.

    The labelled images' name is ""; their features may be `known`.
    """
    features = {"": model.image_features(batch.tensors["stem"], number) if known is None else known}
    for name, tensor in batch.tensors.items():
        if name.startswith(OTHER_STEM):
            features[name.removeprefix(OTHER_STEM)] = model.image_features(tensor, number)
    return features


def rows_of(losses: Tensor, leaves: Sequence[Tensor], *, keep_graph: bool = False) -> Tensor:
    """The gradient of the summed losses with respect to all leaves, as rows; zero for those that the loss ignores."""
    gradients = torch.autograd.grad(
        losses.sum(), leaves, allow_unused=True, materialize_grads=True, retain_graph=keep_graph
    )
    number = len(losses)
    return torch.cat([gradient.reshape(number, -1) for gradient in gradients], dim=1)
