"""Any adapter in two copies, one that travels and one that stays, and the model between both (arXiv:2003.13461)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flora.clip.adapters.base import AttachedAdapter
from flora.clip.adapters.wrapper import AdapterWrapper
from flora.core.rng import Rng
from flora.core.tree import State, StateLike

# What the names of the copy that stays end with, and the name of its share.
OWN = ".own"
SHARE = "own_share"


class Interpolated(AdapterWrapper):
    """Two copies w and v of what another adapter trains, and as the client's own model share * v + (1 - share) * w.

    w keeps its names and is the server's; `NAME.own` is v, which begins where w does and stays with its client, as does
    `own_share`, the share of v, where it is learned. The loss is that of w plus that of the mixture, in which w gets no
    gradient: so w is trained as without, and v and the share by the gradient at the mixture.
    """

    def __init__(self, inner: AttachedAdapter, share: float, *, learns_share: bool) -> None:
        super().__init__(inner)
        self._share, self._learns_share = share, learns_share
        self.num_models, self.first_loss_model, self.is_linear = 2, 0, False
        self.after_step = self._after_step if inner.after_step is not None or learns_share else None
        self.project = None if inner.project is None else self._project

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        state = self.inner.initial_state(rng, class_features)
        own = {name + OWN: tensor.clone() for name, tensor in state.items()}
        if self._learns_share:
            own[SHARE] = torch.tensor(self._share, dtype=next(iter(state.values())).dtype)
        return {**state, **own}

    def stays(self, name: str) -> bool:
        return name.endswith(OWN) or name == SHARE

    def models(self, stack: StateLike) -> list[StateLike]:
        shared = _shared(stack)
        mixed = dict(shared)  # what a step binds beside tensors that are trained has no copy
        for name, own in _own(stack).items():
            share: float | Tensor = self._share
            if self._learns_share:  # one number, or one for each client
                share = stack[SHARE].reshape(*stack[SHARE].shape, *[1] * (own.dim() - stack[SHARE].dim()))
            mixed[name] = share * own + (1 - share) * shared[name].detach()
        return [shared, mixed]

    def models_of_step(self, stack: StateLike) -> list[StateLike]:
        return self.models(stack)

    def bind(self, stack: StateLike, generators: Sequence[torch.Generator] | None = None) -> Any:
        return self.inner.bind(_shared(stack), generators)

    def merged_state_dict(self, state_dict: StateLike, adapter: StateLike) -> State:
        return self.inner.merged_state_dict(state_dict, _shared(adapter))

    def _after_step(self, stack: StateLike, learning_rate: float | Tensor) -> None:
        """Do after each step what the other adapter does with both copies, and keep the share between 0 and 1."""
        if self.inner.after_step is not None:
            for copy in (_shared, _own):
                self.inner.after_step(copy(stack), learning_rate)
        if self._learns_share:
            stack[SHARE].clamp_(0, 1)

    def _project(self, stack: StateLike, gradients: StateLike, generators: Sequence[torch.Generator]) -> State:
        """What a step goes along: of both copies what the other adapter makes of their gradients."""
        assert self.inner.project is not None
        along = dict(gradients)
        for copy, ending in ((_shared, ""), (_own, OWN)):
            made = self.inner.project(copy(stack), copy(gradients), generators)
            along |= {name + ending: tensor for name, tensor in made.items()}
        return along


def _shared(stack: StateLike) -> State:
    """The copy that travels."""
    return {name: tensor for name, tensor in stack.items() if not name.endswith(OWN) and name != SHARE}


def _own(stack: StateLike) -> State:
    """The copy that stays, under the names of the one that travels."""
    return {name.removesuffix(OWN): tensor for name, tensor in stack.items() if name.endswith(OWN)}
