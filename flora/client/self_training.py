"""Learn from images without labels: the received model labels them, the client learns that on changed views."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flora.clip.loss_terms import StepView
from flora.core.registry import Component, Options, option, register
from flora.core.rng import Rng
from flora.data.augmentation import Augmentation, Corrupt, CropFlip
from flora.data.batching import BatchSizes, client_batches


@dataclass(frozen=True)
class Preference(Component):
    """What a client learns of an image that the received model is sure of."""

    views: ClassVar[tuple[str, ...]] = ("strong",)
    """The views of an image that it looks at: "strong", and "clean", the image as it is."""
    needs_frozen: ClassVar[bool] = False

    @abstractmethod
    def losses(self, view: StepView) -> Tensor:
        """The loss of each image without a label, `(K, U)`, with its label `view.batch["pseudo_labels"]` `(K, U)`."""


@register("none")
@dataclass(frozen=True)
class Likelihood(Preference):
    """-log p(label | strongly changed view), as in FixMatch (arXiv:2001.07685, equation 4)."""

    def losses(self, view: StepView) -> Tensor:
        return -_of_label(view.logits_of("strong").log_softmax(dim=-1), view)


@register("dpo")
@dataclass(frozen=True)
class Dpo(Preference):
    """The clean image is preferred to the corrupted one: -log sigma(beta [d(x) - d(x~)]) - lambda log p(label | x).

    d(x) = s(x, label) - s0(x, label) is what the logit of the label has gained over the frozen model's, x the image and
    x~ its strongly changed view. Source: STIC, arXiv:2405.19716, with the loss of DPO (arXiv:2305.18290).
    Differs from the paper: there the answers are texts of a language model, two for one image; here a class, for an
    image and a corrupted one.
    """

    views: ClassVar[tuple[str, ...]] = ("clean", "strong")
    needs_frozen: ClassVar[bool] = True
    beta: float = option("how sharply the clean image is preferred", 0.1, above=0)
    likelihood: float = option("lambda, the weight of -log p(label | image) beside it", 1.0, at_least=0)

    def losses(self, view: StepView) -> Tensor:
        gains = {name: _of_label(view.logits_of(name) - view.frozen_logits_of(name), view) for name in self.views}
        preferred = -F.logsigmoid(self.beta * (gains["clean"] - gains["strong"]))
        return preferred - self.likelihood * _of_label(view.logits_of("clean").log_softmax(dim=-1), view)


def _of_label(values: Tensor, view: StepView) -> Tensor:
    """The numbers `(K, U)` of the images' labels among those of all classes, `(K, U, C)`."""
    # By a mask rather than `gather`, whose gradient adds up in any order on CUDA.
    is_label = view.batch["pseudo_labels"].unsqueeze(-1) == torch.arange(values.shape[-1], device=values.device)
    return torch.where(is_label, values, 0.0).sum(dim=-1)


@dataclass(frozen=True)
class SelfTraining(Options):
    """A term of the loss for a client's images without a label: weight * a mean over those that a step sees.

    At the beginning of a round the received adapter labels a weakly changed view of each. Where it gives its first
    class at least `threshold`, the client learns that label on other views; other images count as 0 in the mean.
    Source: FixMatch, arXiv:2001.07685. Differs from the paper: labels are those of the adapter that the round starts
    from, once a round, not of the one in training, at each step.
    """

    weight: float = option("weight beside the objective; 0: as if there were no such images", 1.0, at_least=0)
    threshold: float = option("probability that a label needs", 0.8, at_least=0, at_most=1)
    batch_size: int | None = option(
        "images without a label in a step; none: as many as with one, or as the client with the most has",
        None,
        at_least=1,
        at_most=1_000_000,
    )
    weak: Augmentation = option("how an image is changed that is to be labelled", CropFlip(min_area=0.8))
    strong: Augmentation = option("how an image is changed that is learned from", Corrupt(first=CropFlip(min_area=0.4)))
    preference: Preference = option("what is learned of it", Likelihood())
    labels: str = option(
        "whose labels are learned: the received model's, or `random` ones, as a control",
        "received",
        choices=("received", "random"),
    )

    def width(self, batch_size: int, most: int) -> int:
        """Return how many images without a label a step has room for, where a client has `most` of them."""
        return min(self.batch_size or batch_size, most)

    def label(self, places: np.ndarray, truth: np.ndarray, logits: Tensor, rng: Rng) -> PseudoLabels:
        """Label a client's U images by the received model's `logits` `(U, C)` of their weakly changed views."""
        confidences, labels = logits.double().softmax(dim=-1).max(dim=-1)
        chosen = labels.numpy()
        if self.labels == "random":
            chosen = rng.child("random labels").numpy().integers(logits.shape[-1], size=len(labels))
        return PseudoLabels(places, chosen, confidences.numpy() >= self.threshold, truth)


@dataclass(frozen=True, eq=False)
class PseudoLabels:
    """A client's U images without a label: their places among all examples, and the labels that they were given.

    All are `(U,)`; `is_sure` says which labels are learned, `truth` what the images' classes are, for measuring.
    """

    places: np.ndarray
    labels: np.ndarray
    is_sure: np.ndarray
    truth: np.ndarray

    @property
    def report(self) -> dict[str, int]:
        """Count the images, those whose label is sure, and those of them whose label is right."""
        right = self.is_sure & (self.labels == self.truth)
        return {"num_unlabelled": len(self.labels), "num_sure": int(self.is_sure.sum()), "num_right": int(right.sum())}

    def draw(self, sizes: BatchSizes, rng: Rng) -> dict[str, np.ndarray]:
        """Return which of the images each step sees, and with which labels.

        Arrays `(num_steps, width)` by their names in a step's batch. A client without such images gets masks that are
        False everywhere.
        """
        places = self.places
        if not len(places):
            empty = np.zeros((sizes.num_steps, sizes.width), np.int64)
            return {"unlabelled": empty, "pseudo_labels": empty, "pseudo_mask": empty > 0, "unlabelled_mask": empty > 0}
        drawn, mask = client_batches(np.arange(len(places)), rng.child("unlabelled"), sizes)
        return {
            "unlabelled": places[drawn],
            "pseudo_labels": self.labels[drawn],
            "pseudo_mask": self.is_sure[drawn] & mask,
            "unlabelled_mask": mask,
        }


@dataclass(frozen=True)
class SelfTrainingTerm:
    """Self-training as a term of the loss."""

    options: SelfTraining
    in_batch: ClassVar[bool] = False

    @property
    def needs_frozen(self) -> bool:
        return self.options.preference.needs_frozen

    def loss(self, view: StepView) -> Tensor:
        """Each client's loss `(K,)`: of its sure images, divided by how many it looks at in this step."""
        losses = torch.where(view.batch["pseudo_mask"], self.options.preference.losses(view), 0.0)
        return self.options.weight * losses.sum(dim=-1) / view.batch["unlabelled_mask"].sum(dim=-1).clamp(min=1)
