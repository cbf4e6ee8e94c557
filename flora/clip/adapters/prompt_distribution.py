"""Several prompts for each class, whose features are learned as a distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flora.clip.adapters.base import AttachedAdapter
from flora.clip.adapters.prompts import AttachedContext, PromptContext, WithContext, context_places, words_of
from flora.clip.comparison import Comparison
from flora.clip.frozen import Architecture, FrozenClip
from flora.clip.loss_terms import StepView
from flora.core.registry import OptionError, option, register
from flora.core.rng import Rng
from flora.core.tree import State


@register("proda")
@dataclass(frozen=True)
class ProDa(WithContext):
    """Several contexts, whose features are a Gaussian distribution of each class's (ProDA, arXiv:2205.03340).

    Half of the prompts have the class's name at the end, a quarter each in the middle and in front. Classes are
    predicted with the mean over prompts of their unit features. The loss is an upper bound of the expected
    cross-entropy over that distribution, plus a weight times the mean |cosine| of the features of two prompts without a
    name. The contexts are what is trained and what travels; new classes have them, too. With an objective other than
    cross_entropy, what the bound adds to the cross-entropy is added to it.

    The covariance is that over prompts, of the same dimension of two classes' features: dimensions are taken as
    independent, as in FLiP's code (the authors' repository has none). Differs from the paper: a step sees all prompts,
    where there 4 of 32 are drawn for it. Differs from FLiP's code: that divides covariances by the number of prompts
    plus one, weighs the cosines by 1, has the name at the end of all prompts, and sees one prompt in a step, where both
    terms are zero.
    """

    num_prompts: int = option("contexts, P", 4, at_least=2, at_most=64)
    words: str | None = option(
        "words whose places the vectors take; the frozen model reads them. none: x's", "a photo of a"
    )
    num_tokens: int = option("vectors in a context, if there are no words", 16, at_least=1, at_most=64)
    orthogonality: float = option("weight of the cosines between prompts without a name, lambda", 0.1, at_least=0)

    @property
    def prompt_contexts(self) -> tuple[PromptContext, ...]:
        """Where each prompt's vectors stand."""
        quarter = self.num_prompts // 4
        positions = ["front"] * (self.num_prompts - 2 * quarter) + ["middle"] * quarter + ["end"] * quarter
        return tuple(PromptContext(words=self.words, num_tokens=self.num_tokens, position=each) for each in positions)

    @property
    def context(self) -> PromptContext:
        return self.prompt_contexts[0]

    def check_fits(self, architecture: Architecture) -> None:
        super().check_fits(architecture)
        if not architecture.reads_text_end:
            raise OptionError(
                "", f"proda needs a text tower that is read at a prompt's end: {architecture.name} is not"
            )

    @property
    def changes_images(self) -> bool:
        return False

    @property
    def comparison(self) -> Comparison:
        return MeanPrompts(self.num_prompts)

    def templates(self, given: Sequence[str]) -> tuple[str, ...]:
        """P with the class's name, and the same contexts without it: those are the same for all classes."""
        named = [each.templates(given)[0] for each in self.prompt_contexts]
        without = " ".join(self.context.halves).strip() + "."
        return (*named, *[without] * self.num_prompts)

    def shown_templates(self, given: Sequence[str]) -> tuple[str, ...]:
        named = [each.shown_templates(given)[0] for each in self.prompt_contexts]
        return (*named, *["[learned context]."] * self.num_prompts)

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedProDa(self, clip)


@dataclass(frozen=True)
class MeanPrompts(Comparison):
    """An image's similarity to the mean of a class's first prompts, as it is: not normalised once more."""

    num_prompts: int
    reads_prompts: ClassVar[bool] = True

    def similarities(self, images: Tensor, classes: Tensor) -> Tensor:
        return torch.bmm(images, classes[:, :, : self.num_prompts].mean(dim=2).mT)

    def means(self, classes: Tensor) -> Tensor:
        return super().means(classes[:, :, : self.num_prompts])


@dataclass(frozen=True)
class UpperBound:
    """What the bound of ProDA is above the cross-entropy of the mean prompts.

    With logits z_c = s f.mean(t_c), s the model's factor and y the image's class, the bound is the cross-entropy of
    z_c + s^2/2 sum_d f_d^2 var(t_cd - t_yd), mean and variance over prompts. That adds nothing to z_y.
    """

    num_prompts: int
    in_batch: ClassVar[bool] = False
    needs_frozen: ClassVar[bool] = False

    def loss(self, view: StepView) -> Tensor:
        """Each client's mean, `(K,)`."""
        named = view.classes[:, :, : self.num_prompts]
        centred, squares = named - named.mean(dim=2, keepdim=True), view.images.square()
        clients = torch.arange(len(named), device=named.device).unsqueeze(1)
        of_label = centred[clients, view.labels]  # (K, B, P, d)
        # var(t_c - t_y) = var(t_c) + var(t_y) - 2 cov(t_c, t_y); each as (K, B, C)
        of_classes = squares @ centred.square().mean(dim=2).mT
        of_labels = of_classes.gather(2, view.labels.unsqueeze(2))
        shared = (squares.unsqueeze(2) * of_label).flatten(2) @ centred.flatten(2).mT / self.num_prompts
        spread = of_classes + of_labels - 2 * shared
        bounded = view.logits + view.logit_scale.square() / 2 * spread
        return view.mean(bounded.logsumexp(dim=-1) - view.logits.logsumexp(dim=-1))


@dataclass(frozen=True)
class Orthogonality:
    """weight * mean |cosine| of the features of two different prompts without a name."""

    weight: float
    num_prompts: int
    in_batch: ClassVar[bool] = False
    needs_frozen: ClassVar[bool] = False

    def loss(self, view: StepView) -> Tensor:
        """Each client's term, `(K,)`."""
        features = view.classes[:, 0, self.num_prompts :]  # the same for all classes
        cosines = (features @ features.mT).abs()
        others = ~torch.eye(self.num_prompts, dtype=torch.bool, device=cosines.device)
        return self.weight * cosines[:, others].mean(dim=-1)


class AttachedProDa(AttachedContext):
    """Its state dict is `context` `(P, n, text width)`: P prompts' n vectors, from random numbers."""

    def __init__(self, options: ProDa, clip: FrozenClip) -> None:
        number = options.num_prompts
        super().__init__(options.context, clip)
        self._nums_before = [len(words_of(clip, each.halves[0])) for each in options.prompt_contexts]
        self.comparison = options.comparison
        # For the frozen model, which is compared with unit means.
        self.place_shares = (1 / number,) * number + (0.0,) * number
        self.loss_terms = (UpperBound(number), Orthogonality(options.orthogonality, number))
        self.learned_context = {"num_vectors": self._shape[0], "starts_from": None}

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        context = torch.empty(len(self._nums_before), *self._shape).normal_(0, 0.02, generator=rng.torch())
        return {"context": context.to(self.dtype)}

    def learned_places(self, ends: Tensor, length: int, num_classes: int) -> Tensor:
        number, places = self._shape[0], torch.empty(len(ends), length, dtype=torch.int64)
        nums_before = [*self._nums_before, *[number] * len(self._nums_before)]
        for place, num_before in enumerate(nums_before):
            rows = slice(place, None, len(nums_before))
            of_prompt = context_places(ends[rows], length, number, num_before)
            offset = number * (place % len(self._nums_before))
            places[rows] = torch.where(of_prompt >= 0, of_prompt + offset, of_prompt)
        return places
