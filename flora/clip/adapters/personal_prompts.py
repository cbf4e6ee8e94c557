"""Prompt contexts of which a part travels and a part stays with its client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.clip.adapters.base import AttachedAdapter
from flora.clip.adapters.prompts import AttachedContext, PromptContext
from flora.clip.frozen import FrozenClip
from flora.clip.loss_terms import StepView
from flora.core.registry import option, register
from flora.core.rng import Rng
from flora.core.tree import State, StateLike


@register("fedpgp")
@dataclass(frozen=True)
class FedPgp(PromptContext):
    """A context that travels, and at each client a low-rank change of it that stays (FedPGP, arXiv:2405.09771).

    A client's own prompts have the context plus U V. The loss is the cross-entropy of these, and a contrast that draws
    the features of the context alone towards the frozen prompts' and away from the client's own. Differs from the
    paper: V starts at zero, so that all begin with the context.
    """

    has_personal = True

    bottleneck: int = option("inner width of the change that stays", 8, at_least=1)
    contrast: float = option("weight of the contrast, mu", 1.0, at_least=0)
    temperature: float = option("what similarities are divided by in it, tau", 0.5, above=0)

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedFedPgp(self, clip)


@dataclass(frozen=True)
class ContextContrast:
    """weight * mean over classes of -log(e^(g.f/T) / (e^(g.f/T) + e^(g.p/T))).

    g are the features of the context that travels, f those of the frozen prompts, p those of the client's own.
    """

    weight: float
    temperature: float
    in_batch: ClassVar[bool] = False
    needs_frozen: ClassVar[bool] = True

    def loss(self, view: StepView) -> Tensor:
        """Each client's contrast, `(K,)`."""
        assert view.frozen_classes is not None
        ((_, shared),) = view.others
        to_frozen, to_own = ((shared * each).sum(dim=-1) for each in (view.frozen_classes, view.classes))
        return self.weight * F.softplus((to_own - to_frozen) / self.temperature).mean(dim=-1)


class AttachedFedPgp(AttachedContext):
    """Beside `context`, which travels, `local_U` `(n, bottleneck)` and `local_V` `(bottleneck, text width)`: they stay.

    Where classes have contexts of their own, these have a leading axis of classes, too.
    """

    num_models = 2
    first_loss_model = 1

    def __init__(self, options: FedPgp, clip: FrozenClip) -> None:
        super().__init__(options, clip)
        self._bottleneck = options.bottleneck
        self.loss_terms = (ContextContrast(options.contrast, options.temperature),)

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        state = super().initial_state(rng, class_features)
        *classes, number, width = state["context"].shape
        u = torch.empty(*classes, number, self._bottleneck).normal_(0, 0.02, generator=rng.child("local").torch())
        v = torch.zeros(*classes, self._bottleneck, width, dtype=self.dtype)
        return {**state, "local_U": u.to(self.dtype), "local_V": v}

    def stays(self, name: str) -> bool:
        return name.startswith("local_")

    def models(self, stack: StateLike) -> list[StateLike]:
        context = stack["context"]
        return [{"context": context}, {"context": context + stack["local_U"] @ stack["local_V"]}]


@register("promptfolio")
@dataclass(frozen=True)
class PromptFolio(PromptContext):
    """Two contexts whose class features are mixed: one travels, one stays (PromptFolio, arXiv:2409.19610).

    A class's features are (1 - share) times those with the context that travels plus share times those with the
    client's own, normalised. Both learn together; the server's model has the first alone.
    """

    has_personal = True

    share: float = option("the part of the context that stays, theta", 0.2, above=0, below=1)

    def templates(self, given: Sequence[str]) -> tuple[str, ...]:
        return super().templates(given) * 2

    def shown_templates(self, given: Sequence[str]) -> tuple[str, ...]:
        return super().shown_templates(given) * 2

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedPromptFolio(self, clip)


class AttachedTwoContexts(AttachedContext):
    """Beside `context`, which travels, `local_context` of the same shape, which stays: one for each of two prompts."""

    num_models = 2

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        own = super().initial_state(rng.child("local"), class_features)["context"]
        return {**super().initial_state(rng, class_features), "local_context": own}

    def stays(self, name: str) -> bool:
        return name == "local_context"

    def models(self, stack: StateLike) -> list[StateLike]:
        shared, own = stack["context"], stack["local_context"]
        return [{"context": torch.cat([shared, each], dim=-2)} for each in (shared, own)]

    def bind(self, stack: StateLike, generators: Sequence[torch.Generator] | None = None) -> Any:
        return super().bind(self.models(stack)[0] if "local_context" in stack else stack, generators)

    def models_of_step(self, stack: StateLike) -> list[StateLike]:
        return self.models(stack)[1:]


class AttachedPromptFolio(AttachedTwoContexts):
    """Two contexts, as there, whose class features are mixed."""

    def __init__(self, options: PromptFolio, clip: FrozenClip) -> None:
        super().__init__(options, clip)
        self.place_shares = (1 - options.share, options.share)
