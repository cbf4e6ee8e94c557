"""Any adapter in two copies, one that travels and one that stays, and the model between both (arXiv:2003.13461)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from flora.clip.adapters.base import AttachedAdapter
from flora.core.rng import Rng
from flora.core.tree import State, StateLike

# What the names of the copy that stays end with, and the name of its share.
OWN = ".own"
SHARE = "own_share"
# What it has as the adapter of which it has two copies.
AS_THE_OTHER = (
    "trained_from", "max_clients_per_block", "has_dropout", "is_large", "mergeable", "adapt_block", "adapt_text_block",
    "after_block", "place_shares", "reads_names", "reads_held_classes", "frozen_templates", "loss_terms",
    "learned_context", "comparison",
)  # fmt: skip


class Interpolated(AttachedAdapter):
    """Two copies w and v of what another adapter trains, and as the client's own model share * v + (1 - share) * w.

    w keeps its names and is the server's; `NAME.own` is v, which begins where w does and stays with its client, as does
    `own_share`, the share of v, where it is learned. The loss is that of w plus that of the mixture, in which w gets no
    gradient: so w is trained as without, and v and the share by the gradient at the mixture.
    """

    num_models = 2

    def __init__(self, inner: AttachedAdapter, share: float, *, learns_share: bool) -> None:
        self._inner, self._share, self._learns_share = inner, share, learns_share
        for name in AS_THE_OTHER:
            setattr(self, name, getattr(inner, name))
        self.after_step = self._after_step if inner.after_step is not None or learns_share else None

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        state = self._inner.initial_state(rng, class_features)
        own = {name + OWN: tensor.clone() for name, tensor in state.items()}
        if self._learns_share:
            own[SHARE] = torch.tensor(self._share, dtype=next(iter(state.values())).dtype)
        return {**state, **own}

    def stays(self, name: str) -> bool:
        return name.endswith(OWN) or name == SHARE

    def models(self, stack: StateLike) -> list[StateLike]:
        shared, mixed = _shared(stack), {}
        for name, tensor in shared.items():
            if name + OWN not in stack:  # what a step binds beside the copies is no tensor of theirs
                mixed[name] = tensor
                continue
            own = stack[name + OWN]
            share: float | Tensor = self._share
            if self._learns_share:  # one number, or one for each client
                share = stack[SHARE].reshape(*stack[SHARE].shape, *[1] * (own.dim() - stack[SHARE].dim()))
            mixed[name] = share * own + (1 - share) * tensor.detach()
        return [shared, mixed]

    @contextmanager
    def bind(self, stack: StateLike, generators: Sequence[torch.Generator] | None = None) -> Iterator[None]:
        before, self.stack = self.stack, _shared(stack)
        try:
            with self._inner.bind(self.stack, generators):
                yield
        finally:
            self.stack = before

    def merged_state_dict(self, state_dict: StateLike, adapter: StateLike) -> State:
        return self._inner.merged_state_dict(state_dict, _shared(adapter))

    def _after_step(self, stack: StateLike, learning_rate: float | Tensor) -> None:
        """Do after each step what the other adapter does with both copies, and keep the share between 0 and 1."""
        if self._inner.after_step is not None:
            for copy in (_shared(stack), {name: stack[name + OWN] for name in _shared(stack)}):
                self._inner.after_step(copy, learning_rate)
        if self._learns_share:
            stack[SHARE].clamp_(0, 1)

    def adapt_patches(self, x: Tensor) -> Tensor:
        return self._inner.adapt_patches(x)

    def learned_places(self, ends: Tensor, length: int, num_classes: int) -> Tensor | None:
        return self._inner.learned_places(ends, length, num_classes)

    def adapt_tokens(self, x: Tensor, positions: Tensor, learned: Tensor | None) -> Tensor:
        return self._inner.adapt_tokens(x, positions, learned)

    def adapt_tokens_by_names(self, x: Tensor, positions: Tensor, learned: Tensor | None, names: Tensor) -> Tensor:
        return self._inner.adapt_tokens_by_names(x, positions, learned, names)

    def for_images(self, images: Tensor) -> StateLike:
        return self._inner.for_images(images)

    def adapt_images(self, features: Tensor) -> Tensor:
        return self._inner.adapt_images(features)

    def adapt_classes(self, features: Tensor) -> Tensor:
        return self._inner.adapt_classes(features)


def _shared(stack: StateLike) -> State:
    """The copy that travels."""
    return {name: tensor for name, tensor in stack.items() if not name.endswith(OWN) and name != SHARE}
