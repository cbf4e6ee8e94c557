"""Full fine-tuning as an adapter: a state dict of all weights that stands in for the frozen ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flora.clip.adapters.base import TOWERS, Adapter, AttachedAdapter
from flora.clip.frozen import Architecture, FrozenClip
from flora.core.registry import register
from flora.core.rng import Rng
from flora.core.tree import State, StateLike


@register("full")
@dataclass(frozen=True)
class FullFineTuning(Adapter):
    """Every weight is trained and travels: the baseline that the paper compares with (FedFFT).

    Weight decay, if there is any, applies to all of them, norms and `logit_scale` included.
    """

    is_large = True

    def check_fits(self, architecture: Architecture) -> None:
        """It fits every model."""

    def attach(self, clip: FrozenClip) -> AttachedFull:
        return AttachedFull(clip)


class AttachedFull(AttachedAdapter):
    """A state dict of the whole model, `(K, ...)` with K = 1, that stands in for the frozen weights while bound.

    Or of what is `below` a name in it.
    """

    max_clients_per_block = 1
    is_large = True

    def __init__(self, clip: FrozenClip, below: str = "") -> None:
        self.trained_from = dict.fromkeys(TOWERS, 0)
        self._dtype = clip.dtype
        self._frozen = {name: each for name, each in clip.model.named_parameters() if name.startswith(below)}
        self._places: list[tuple[nn.Module, str, str]] = [
            (module, leaf, f"{prefix}.{leaf}" if prefix else leaf)
            for prefix, module in clip.model.named_modules()
            for leaf, _ in module.named_parameters(recurse=False)
            if f"{prefix}.{leaf}".startswith(below) or not below
        ]

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        return {name: parameter.detach().to(self._dtype).cpu().clone() for name, parameter in self._frozen.items()}

    @contextmanager
    def bind(self, stack: StateLike, generators: Sequence[torch.Generator] | None = None) -> Iterator[None]:
        try:
            for module, leaf, name in self._places:
                module._parameters[leaf] = stack[name][0]  # type: ignore[assignment]
            yield
        finally:
            for module, leaf, name in self._places:
                module._parameters[leaf] = self._frozen[name]

    def merged_state_dict(self, state_dict: StateLike, adapter: StateLike) -> State:
        return {
            name: adapter[name].to(tensor.dtype) if name in adapter else tensor for name, tensor in state_dict.items()
        }
