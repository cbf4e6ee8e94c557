"""Adapters that learn vectors in place of a prompt's words, and tokens of images, in several blocks of both towers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flora.clip.adapters.base import AttachedAdapter, check_depth
from flora.clip.adapters.outside import uniform
from flora.clip.adapters.prompts import AttachedContext, PromptContext, WithContext, put_vectors
from flora.clip.adapters.visual_prompts import check_reads_class_token, put_tokens
from flora.clip.frozen import Architecture, FrozenClip
from flora.clip.loss_terms import StepView, divergence
from flora.core.registry import OptionError, option, register
from flora.core.rng import Rng
from flora.core.tree import State


@dataclass(frozen=True)
class DeepPrompts(WithContext):
    """Learned vectors before the class name, and tokens behind those of an image, in the first blocks of both towers.

    The data set's own prompts are not used: prompts are the context, the class name and a full stop.
    """

    words: str | None = option(
        "the words before the class name, of which the first are learned; none: random vectors", "a photo of a"
    )
    num_tokens: int = option("learned vectors in a block of the text tower", 4, at_least=1, at_most=64)
    depth: int | None = option(
        "blocks of each tower that have learned vectors of their own; none: three quarters of the shallower tower's, "
        "as 9 of 12",
        None,
        at_least=1,
    )

    @property
    def context(self) -> PromptContext:
        return PromptContext(words=self.words, num_tokens=self.num_tokens)

    def check(self) -> None:
        if self.words is not None and self.num_tokens > len(self.words.split()) > 0:
            limit = f"at most {len(self.words.split())}, the words of {self.words!r}"
            raise OptionError("num_tokens", f"expected {limit}, got {self.num_tokens}")
        super().check()

    def check_fits(self, architecture: Architecture) -> None:
        check_reads_class_token(self, architecture)
        super().check_fits(architecture)
        check_depth(self.depth, architecture)

    def depth_in(self, architecture: Architecture) -> int:
        """How many blocks of each tower have learned vectors."""
        return self.depth or -(-3 * architecture.common_layers // 4)

    @property
    def adds_image_tokens(self) -> bool:
        return True

    def shown_templates(self, given: Sequence[str]) -> tuple[str, ...]:
        rest = () if self.words is None else self.words.split()[self.num_tokens :]
        return (" ".join(["[learned context]", *rest, "{}."]),)


class AttachedDeepPrompts(AttachedContext):
    """Its state dict has `context` `(n, text width)`, and `deep_context` `(depth - 1, n, text width)` where depth > 1.

    The first block's context stands in the place of words and has their positions; the vectors of a deeper block stand
    in the same slots, in place of what the block before it gave for them.
    """

    def __init__(self, options: DeepPrompts, clip: FrozenClip) -> None:
        super().__init__(options.context, clip, num_learned=options.num_tokens)
        self.trained_from["vision"] = 1
        self._depth, self._norm = options.depth_in(clip.architecture), clip.visual.ln_pre
        self._widths = clip.architecture.text.width, clip.architecture.vision.width
        self.adapt_block, self.adapt_text_block = self._with_image_tokens, self._with_deep_context

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        state = super().initial_state(rng, class_features)
        if self._depth > 1:
            shape = self._depth - 1, *self._shape
            state["deep_context"] = _normal(rng.child("deep_context"), shape).to(self.dtype)
        return state

    @abstractmethod
    def image_tokens(self, number: int) -> Tensor:
        """The learned tokens of images that block `number` gets, counted from 1, `(K, P, vision width)`."""

    def _with_image_tokens(self, number: int, x: Tensor) -> Tensor:
        """What block `number` of the vision tower gets: the image's tokens and behind them those learned for it."""
        if self.stack is None or number > self._depth:
            return x
        return put_tokens(number, x, self.image_tokens(number), self._norm)

    def _with_deep_context(self, learned: Tensor | None, number: int, x: Tensor) -> Tensor:
        """What block `number` of the text tower gets; what the first one gets has its context."""
        if self.stack is None or not 1 < number <= self._depth:
            return x
        assert learned is not None
        return put_vectors(x, self.stack["deep_context"][:, number - 2], learned)


def _normal(rng: Rng, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape).normal_(0, 0.02, generator=rng.torch())


@register("maple")
@dataclass(frozen=True)
class Maple(DeepPrompts):
    """Vectors in the text tower's first blocks, of which the vision tower's are made (MaPLe, arXiv:2210.03117).

    A block's tokens of images are W P + b for each of its context's vectors P; context, W and b are learned and travel,
    and the loss is the cross-entropy. As in the authors' code the first `num_tokens` of the words are learned, the
    others stay, and deeper vectors start from normal numbers of standard deviation 0.02. Differs from it: there the W
    of all deeper blocks start from the same numbers, here each from its own; there 9 blocks, whatever the model.
    """

    num_tokens: int = option("learned vectors in a block of either tower", 2, at_least=1, at_most=64)

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedMaple(self, clip)


class AttachedMaple(AttachedDeepPrompts):
    """Beside the contexts the couplings' `coupling.weight` `(depth, vision width, text width)` and `coupling.bias`."""

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        text, vision = self._widths
        coupling = rng.child("coupling")
        return {
            **super().initial_state(rng, class_features),
            "coupling.weight": uniform(coupling.child("weight"), (self._depth, vision, text), text).to(self.dtype),
            "coupling.bias": uniform(coupling.child("bias"), (self._depth, vision), text).to(self.dtype),
        }

    def image_tokens(self, number: int) -> Tensor:
        assert self.stack is not None
        context = self.stack["context"] if number == 1 else self.stack["deep_context"][:, number - 2]
        weight, bias = self.stack["coupling.weight"][:, number - 1], self.stack["coupling.bias"][:, number - 1]
        return torch.baddbmm(bias.unsqueeze(1), context, weight.transpose(1, 2))


@register("prompt_src")
@dataclass(frozen=True)
class PromptSrc(DeepPrompts):
    """Vectors of the text and of the vision tower, held near the frozen model (PromptSRC, arXiv:2307.06948).

    All are learned and travel. The loss is the cross-entropy, and text_weight times the mean of |t - t0| over classes
    and numbers of their unit features t, image_weight times the same of the images, and logit_weight times the mean
    over images and classes of the terms of KL(frozen probabilities || own ones): section 3.2.1, weights and means as in
    the authors' code. The frozen t0 are means over `frozen_templates`. With `server.optimizer: gaussian_average` the
    result is a mean over rounds, in place of their epochs. Differs from the authors' code: t0 is a mean of unit
    features, not of those of any length, and of 8 templates, not 60; one `depth` for both towers.
    """

    num_image_tokens: int = option(
        "learned tokens of images in a block of the vision tower", 4, at_least=1, at_most=1024
    )
    text_weight: float = option("weight of the distance from the frozen texts", 25.0, at_least=0)
    image_weight: float = option("weight of the distance from the frozen images", 10.0, at_least=0)
    logit_weight: float = option("weight of the divergence from the frozen model's probabilities", 1.0, at_least=0)
    frozen_templates: tuple[str, ...] = option(
        "the templates of the frozen texts; {} stands for the class name",
        (
            "a photo of a {}.",
            "itap of a {}.",
            "a bad photo of the {}.",
            "a origami {}.",
            "a photo of the large {}.",
            "a {} in a video game.",
            "art of the {}.",
            "a photo of the small {}.",
        ),
    )

    def check(self) -> None:
        super().check()
        wrong = [each for each in self.frozen_templates if each.count("{}") != 1 or each.count("{") != 1]
        if wrong or not self.frozen_templates:
            shown = repr(wrong[0]) if wrong else "none"
            raise OptionError("frozen_templates", f"expected templates with one {{}} for the class name, got {shown}")

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedPromptSrc(self, clip)


@dataclass(frozen=True)
class SelfRegulation:
    """What holds features and logits near those of the frozen model: section 3.2.1 of arXiv:2307.06948."""

    text_weight: float
    image_weight: float
    logit_weight: float
    in_batch: ClassVar[bool] = False
    needs_frozen: ClassVar[bool] = True

    def loss(self, view: StepView) -> Tensor:
        """Each client's sum of the three terms, `(K,)`."""
        assert view.frozen_images is not None and view.frozen_classes is not None
        texts = (view.classes - view.frozen_classes).abs().mean(dim=(1, 2))
        images = view.mean((view.images - view.frozen_images).abs().mean(dim=-1))
        frozen_logits = view.logit_scale * view.frozen_images @ view.frozen_classes.mT
        logits = view.mean(divergence(view.logits, frozen_logits, 1.0)) / view.logits.shape[-1]
        return self.text_weight * texts + self.image_weight * images + self.logit_weight * logits


class AttachedPromptSrc(AttachedDeepPrompts):
    """Beside the contexts `visual.prompt` `(depth, number of image tokens, vision width)`."""

    def __init__(self, options: PromptSrc, clip: FrozenClip) -> None:
        super().__init__(options, clip)
        self._num_image_tokens = options.num_image_tokens
        self.frozen_templates = options.frozen_templates
        self.loss_terms = (SelfRegulation(options.text_weight, options.image_weight, options.logit_weight),)

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        shape = self._depth, self._num_image_tokens, self._widths[1]
        tokens = _normal(rng.child("visual.prompt"), shape).to(self.dtype)
        return {**super().initial_state(rng, class_features), "visual.prompt": tokens}

    def image_tokens(self, number: int) -> Tensor:
        assert self.stack is not None
        return self.stack["visual.prompt"][:, number - 1]
