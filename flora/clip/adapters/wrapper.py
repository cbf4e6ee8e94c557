"""The base class of adapters that change what another one trains, whatever it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flora.clip.adapters.base import AttachedAdapter
from flora.core.rng import Rng
from flora.core.tree import State, StateLike


class AdapterWrapper(AttachedAdapter):
    """An adapter that does all that the `inner` one does, but for what a subclass says."""

    def __init__(self, inner: AttachedAdapter) -> None:
        self.inner = inner
        # Facts don't change once an adapter is attached; `stack` does, and is asked for below.
        for name in AttachedAdapter.__annotations__.keys() - {"stack"}:
            setattr(self, name, getattr(inner, name))

    @property
    def stack(self) -> StateLike | None:  # type: ignore[override]
        return self.inner.stack

    @property
    def can_share_texts(self) -> bool:
        return self.inner.can_share_texts

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        return self.inner.initial_state(rng, class_features)

    def bind(self, stack: StateLike, generators: Sequence[torch.Generator] | None = None) -> Any:
        return self.inner.bind(stack, generators)

    def stays(self, name: str) -> bool:
        return self.inner.stays(name)

    def models(self, stack: StateLike) -> list[StateLike]:
        return self.inner.models(stack)

    def models_of_step(self, stack: StateLike) -> list[StateLike]:
        return self.inner.models_of_step(stack)

    def merged_state_dict(self, state_dict: StateLike, adapter: StateLike) -> State:
        return self.inner.merged_state_dict(state_dict, adapter)

    def adapt_patches(self, x: Tensor) -> Tensor:
        return self.inner.adapt_patches(x)

    def learned_places(self, ends: Tensor, length: int, num_classes: int) -> Tensor | None:
        return self.inner.learned_places(ends, length, num_classes)

    def adapt_tokens(self, x: Tensor, positions: Tensor, learned: Tensor | None) -> Tensor:
        return self.inner.adapt_tokens(x, positions, learned)

    def adapt_tokens_by_names(self, x: Tensor, positions: Tensor, learned: Tensor | None, names: Tensor) -> Tensor:
        return self.inner.adapt_tokens_by_names(x, positions, learned, names)

    def adapt_images(self, features: Tensor) -> Tensor:
        return self.inner.adapt_images(features)

    def adapt_classes(self, features: Tensor) -> Tensor:
        return self.inner.adapt_classes(features)

    def for_images(self, images: Tensor) -> StateLike:
        return self.inner.for_images(images)
