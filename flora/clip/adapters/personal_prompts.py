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
from flora.clip.comparison import Comparison
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
    paper and the released code: V starts at zero, so that all begin with the context, where there both U and V are
    random. That code starts from sixteen random vectors (`words: null`, `num_tokens: 16`) and has an inner width of 4.
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
    """Two contexts whose logits are mixed: one travels, one stays (PromptFolio, arXiv:2409.19610).

    A class's logit is (1 - share) times that with the context that travels plus share times that with the client's own:
    the sum of features is not normalised, as in the released code. Both learn together; the server's model has the
    first alone. Differs from that code: there a client's context is weighed by the number of another client's images,
    contexts start from eight random vectors (`words: null`, `num_tokens: 8`), and the share is 0.4; the benchmark FLiP
    (arXiv:2503.22263) has 0.2.
    """

    has_personal = True

    share: float = option("the part of the context that stays, theta", 0.2, above=0, below=1)

    @property
    def prompts_of_class(self) -> int:
        return 2

    @property
    def comparison(self) -> Comparison:
        return MixedPrompts(self.share)

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedPromptFolio(self, clip)


@dataclass(frozen=True)
class MixedPrompts(Comparison):
    """An image's similarity to (1 - share) times a class's first prompt plus share times its second, as it is."""

    share: float
    reads_prompts: ClassVar[bool] = True

    def similarities(self, images: Tensor, classes: Tensor) -> Tensor:
        return torch.bmm(images, self._mixed(classes).mT)

    def means(self, classes: Tensor) -> Tensor:
        return F.normalize(self._mixed(classes), dim=-1)

    def _mixed(self, classes: Tensor) -> Tensor:
        return (1 - self.share) * classes[:, :, 0] + self.share * classes[:, :, 1]


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
    """Two contexts, as there, whose logits are mixed."""

    def __init__(self, options: PromptFolio, clip: FrozenClip) -> None:
        super().__init__(options, clip)
        self.comparison = options.comparison


@register("dp_fpl")
@dataclass(frozen=True)
class DpFpl(PromptContext):
    """A context that travels, and one that stays, of which a step moves a low-rank part (DP-FPL, arXiv:2501.13904).

    A client's own prompts have the sum of both. For each step its own context M is factorised anew as u v + rest, by
    one power iteration from random vectors, with orthonormal columns of u and rows of v. Of the gradient G by M what u
    and v can do is left: G v'v + u u'G - u u'G v'v. With `local.privacy` noise goes the same way, so that it reaches
    the context that travels and the low-rank part alone; `privacy` adds it at the server to what travels.

    Differs from the released code: it adds noise to the gradients by u and v, whose sizes it bounds for a batch, then
    takes G from them, a tenth as long and with the last term added; here gradients of single examples are bounded
    before their sum and its noise are cut down, which costs no more privacy. That code averages after each
    step, clients equally (`server.strategy.weighting: uniform`), and moves everyone's own context along the last
    client's gradient.
    """

    has_personal = True

    words: str | None = option("what the context that travels starts from; none: random vectors, as the other", None)
    rank: int = option("inner width of u v; as many as there are vectors, or more: the whole gradient", 8, at_least=1)

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedDpFpl(self, clip)


class AttachedDpFpl(AttachedTwoContexts):
    """Two contexts, as there, that are added."""

    def __init__(self, options: DpFpl, clip: FrozenClip) -> None:
        super().__init__(options, clip)
        self._rank = options.rank
        self.project = self._project

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        state = AttachedContext.initial_state(self, rng, class_features)
        own = torch.empty(state["context"].shape).normal_(0, 0.02, generator=rng.child("local").torch())
        return {**state, "local_context": own.to(self.dtype)}

    def models(self, stack: StateLike) -> list[StateLike]:
        return [{"context": stack["context"]}, {"context": stack["context"] + stack["local_context"]}]

    def _project(self, stack: StateLike, gradients: StateLike, generators: Sequence[torch.Generator]) -> State:
        own, gradient = stack["local_context"], gradients["local_context"]
        number, width = own.shape[-2:]
        shape = width, min(self._rank, number)
        starts = torch.stack([torch.empty(shape).normal_(generator=each) for each in generators]).to(own)
        if own.dim() == 4:  # classes have contexts of their own
            starts = starts.unsqueeze(1)
        left = torch.linalg.qr(own @ starts).Q
        right = torch.linalg.qr(own.mT @ left).Q
        by_left = gradient @ right @ right.mT
        return {**gradients, "local_context": by_left + left @ (left.mT @ (gradient - by_left))}
