"""The losses that clients minimise: one number for each client of a block, independent of the others."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.core.registry import Component, option, register


@dataclass(frozen=True)
class Objective(Component):
    """What a local step minimises. `in_batch` says that no class matters but those of the batch."""

    in_batch: ClassVar[bool] = False

    @abstractmethod
    def loss(
        self, image_features: Tensor, class_features: Tensor, labels: Tensor, example_mask: Tensor, logit_scale: Tensor
    ) -> Tensor:
        """Each client's mean loss over its real examples, `(K,)`.

        `image_features` `(K, B, d)` and `class_features` `(K, C, d)` are unit vectors, `labels` is `(K, B)` int64,
        `example_mask` `(K, B)` is True for real examples, `logit_scale` a scalar. Each client has a real example.
        """


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean along the last axis of `values` `(K, B)` where `mask` is True, `(K,)`."""
    return torch.where(mask, values, 0.0).sum(dim=-1) / mask.sum(dim=-1)


@register("cross_entropy")
@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Each image against all class prompts (the default)."""

    label_smoothing: float = option("share of the target spread evenly over all classes", 0.0, at_least=0, below=1)

    def loss(
        self, image_features: Tensor, class_features: Tensor, labels: Tensor, example_mask: Tensor, logit_scale: Tensor
    ) -> Tensor:
        logits = logit_scale * torch.bmm(image_features, class_features.transpose(1, 2))
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=self.label_smoothing
        )
        return masked_mean(losses.view(labels.shape), example_mask)


def _in_batch_log_probabilities(
    image_features: Tensor, class_features: Tensor, labels: Tensor, example_mask: Tensor, logit_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-softmax over the texts for each image, and over the images for each text, both `(K, B, B)`.

    Row i of the first is image i, row j of the second the prompt of example j. Padding takes no probability.
    """
    # By index rather than `gather`, whose gradient adds up in any order on CUDA.
    texts = class_features[torch.arange(len(labels), device=labels.device).unsqueeze(1), labels]
    logits = logit_scale * torch.bmm(image_features, texts.transpose(1, 2))
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

    def loss(
        self, image_features: Tensor, class_features: Tensor, labels: Tensor, example_mask: Tensor, logit_scale: Tensor
    ) -> Tensor:
        both = _in_batch_log_probabilities(image_features, class_features, labels, example_mask, logit_scale)
        losses = [-log_probabilities.diagonal(dim1=1, dim2=2) for log_probabilities in both]
        return masked_mean((losses[0] + losses[1]) / 2, example_mask)


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

    def loss(
        self, image_features: Tensor, class_features: Tensor, labels: Tensor, example_mask: Tensor, logit_scale: Tensor
    ) -> Tensor:
        classes = torch.arange(class_features.shape[1], device=labels.device)
        is_own = (labels.unsqueeze(2) == classes) & example_mask.unsqueeze(2)  # (K, B, C)
        counts = is_own.sum(dim=1)
        logits = logit_scale * torch.bmm(image_features, class_features.transpose(1, 2))
        # A finite number, as above.
        lowest = torch.finfo(logits.dtype).min / 2
        to_texts = logits.masked_fill((counts == 0).unsqueeze(1), lowest).log_softmax(dim=2)
        to_images = logits.masked_fill(~example_mask.unsqueeze(2), lowest).log_softmax(dim=1)
        of_images = -torch.where(is_own, to_texts, 0.0).sum(dim=2)
        of_texts = -torch.where(is_own, to_images, 0.0).sum(dim=1) / counts.clamp(min=1)
        return (masked_mean(of_images, example_mask) + masked_mean(of_texts, counts > 0)) / 2
