"""The losses that clients minimise: one number for each client of a block, independent of the others."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.clip.loss_terms import StepView, divergence, masked_mean
from flora.core.registry import Component, option, register


@dataclass(frozen=True)
class Objective(Component):
    """What a local step minimises: the first term of the loss. `in_batch`: no class matters but the batch's."""

    in_batch: ClassVar[bool] = False
    needs_frozen: ClassVar[bool] = False
    weighs_examples: ClassVar[bool] = False
    """Whether it is a mean over examples in which each counts as much as it weighs (`StepView.mean`)."""
    from_logits: ClassVar[bool] = False
    """Whether it looks at logits alone, in whatever way these come about, and at no features."""

    @abstractmethod
    def loss(self, view: StepView) -> Tensor:
        """Each client's mean loss over its real examples, `(K,)`."""


@register("cross_entropy")
@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Each image against all class prompts (the default)."""

    weighs_examples: ClassVar[bool] = True
    from_logits: ClassVar[bool] = True
    label_smoothing: float = option("share of the target spread evenly over all classes", 0.0, at_least=0, below=1)

    def loss(self, view: StepView) -> Tensor:
        labels = view.labels
        losses = F.cross_entropy(
            view.logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=self.label_smoothing
        )
        return view.mean(losses.view(labels.shape))


def _in_batch_log_probabilities(view: StepView) -> tuple[Tensor, Tensor]:
    """Log-softmax over the texts for each image, and over the images for each text, both `(K, B, B)`.

    Row i of the first is image i, row j of the second the prompt of example j. Padding takes no probability.
    """
    labels, example_mask = view.labels, view.example_mask
    # By index rather than `gather`, whose gradient adds up in any order on CUDA.
    texts = view.classes[torch.arange(len(labels), device=labels.device).unsqueeze(1), labels]
    logits = view.logit_scale * torch.bmm(view.images, texts.transpose(1, 2))
    # A finite number: a padded row would otherwise be all -inf, and its gradient NaN.
    lowest = torch.finfo(logits.dtype).min / 2
    to_texts = logits.masked_fill(~example_mask.unsqueeze(1), lowest)
    to_images = logits.transpose(1, 2).masked_fill(~example_mask.unsqueeze(1), lowest)
    return to_texts.log_softmax(dim=-1), to_images.log_softmax(dim=-1)


@register("contrastive")
@dataclass(frozen=True)
class Contrastive(Objective):
    """CLIP's symmetric loss over the batch, as in FLoRA's code: another image of the same class is a negative."""

    in_batch: ClassVar[bool] = True

    def loss(self, view: StepView) -> Tensor:
        losses = [-each.diagonal(dim1=1, dim2=2) for each in _in_batch_log_probabilities(view)]
        return masked_mean((losses[0] + losses[1]) / 2, view.example_mask)


@register("multi_positive")
@dataclass(frozen=True)
class MultiPositive(Objective):
    """The symmetric loss between the batch's images and its classes' texts, each text once (UniCL, arXiv:2204.03610).

    An image's one positive is its class's text, among those of the batch's classes; a text's positives are all images
    of its class, over which -log p is averaged; then each direction is averaged over its rows. Differs from the paper,
    which has a text for each image: of classes with one text each its loss is `contrastive`'s, since the same text in
    two places adds to the denominators alone.
    """

    in_batch: ClassVar[bool] = True
    from_logits: ClassVar[bool] = True

    def loss(self, view: StepView) -> Tensor:
        labels, example_mask, logits = view.labels, view.example_mask, view.logits
        classes = torch.arange(logits.shape[2], device=labels.device)
        is_own = (labels.unsqueeze(2) == classes) & example_mask.unsqueeze(2)  # (K, B, C)
        counts = is_own.sum(dim=1)
        # A finite number, as above.
        lowest = torch.finfo(logits.dtype).min / 2
        to_texts = logits.masked_fill((counts == 0).unsqueeze(1), lowest).log_softmax(dim=2)
        to_images = logits.masked_fill(~example_mask.unsqueeze(2), lowest).log_softmax(dim=1)
        of_images = -torch.where(is_own, to_texts, 0.0).sum(dim=2)
        of_texts = -torch.where(is_own, to_images, 0.0).sum(dim=1) / counts.clamp(min=1)
        return (masked_mean(of_images, example_mask) + masked_mean(of_texts, counts > 0)) / 2


@dataclass(frozen=True)
class MatchTeacher(Objective):
    """T^2 KL(teacher's probabilities || adapted model's) for each image, of the batch's `teacher_logits` `(K, B, C)`.

    Not for clients: the server distils with it (arXiv:2006.07242), so it is registered under no name.
    """

    temperature: float = option("what logits are divided by: higher looks at all classes", 1.0, above=0)

    def loss(self, view: StepView) -> Tensor:
        return view.mean(divergence(view.logits, view.batch["teacher_logits"], self.temperature))
