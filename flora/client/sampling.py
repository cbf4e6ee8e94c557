"""Which of its examples a client sees at each of its steps, and how much each of them counts."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flora.client.self_training import PseudoLabels
from flora.core.registry import Component, option, register
from flora.core.rng import Rng
from flora.data.batching import BatchSizes, client_batches


@dataclass(frozen=True, eq=False)
class LocalExamples:
    """A client's N training examples: places among all, `(N,)`, and their classes, `(N,)`.

    `losses` `(N,)` are those of the adapter that the client starts the round from, where its sampling asks for them;
    `without_label` are its images without a label, where it learns from them.
    """

    places: np.ndarray
    labels: np.ndarray
    losses: np.ndarray | None = None
    without_label: PseudoLabels | None = None


@dataclass(frozen=True, eq=False)
class Draws:
    """What a client sees at S steps: `places` `(S, width)` among all examples, `mask` is True for those that count.

    `weights` `(S, width)` are the examples' weights in a step's mean; None: all 1.
    """

    places: np.ndarray
    mask: np.ndarray
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class LocalSampling(Component):
    """Which of its examples a client sees at each of its steps, and how much each of them counts."""

    needs_losses: ClassVar[bool] = False
    """Whether it asks for the loss of each example before the round."""
    weighs: ClassVar[bool] = False
    """Whether examples count differently: for objectives that are means over examples."""

    @abstractmethod
    def draw(self, examples: LocalExamples, sizes: BatchSizes, rng: Rng) -> Draws:
        """Return what a client of these examples sees at each step; all chance is `rng`'s, the client's own."""


@register("shuffled")
@dataclass(frozen=True)
class Shuffled(LocalSampling):
    """Each epoch sees every example once, in a new random order (the default)."""

    def draw(self, examples: LocalExamples, sizes: BatchSizes, rng: Rng) -> Draws:
        return Draws(*client_batches(examples.places, rng, sizes))


@dataclass(frozen=True)
class Poisson(LocalSampling):
    """Each step sees each example by itself with probability batch_size / N, so a batch may be larger, or empty.

    For private gradients (`local.privacy`), so it is registered under no name. Batches have room for the largest.
    """

    def draw(self, examples: LocalExamples, sizes: BatchSizes, rng: Rng) -> Draws:
        number, generator = len(examples.places), rng.child("poisson").numpy()
        drawn = [examples.places[generator.random(number) < sizes.batch_size / number] for _ in range(sizes.num_steps)]
        counts = np.array([len(sample) for sample in drawn])
        mask = np.arange(max(int(counts.max()), 1)) < counts[:, None]
        places = np.full(mask.shape, examples.places[0])
        places[mask] = np.concatenate(drawn)
        return Draws(places, mask)


@register("class_balanced")
@dataclass(frozen=True)
class ClassBalanced(LocalSampling):
    """Draws with replacement: one of the client's classes, each as likely, then one of its examples of that class.

    Steps are as many and as large as for `shuffled`. Source: class-balanced sampling, as in arXiv:1910.09217; for the
    unbalanced data of DeLVM, arXiv:2402.04841, which balances tasks, by augmented copies.
    """

    def draw(self, examples: LocalExamples, sizes: BatchSizes, rng: Rng) -> Draws:
        _, own, counts = np.unique(examples.labels, return_inverse=True, return_counts=True)
        return _with_replacement(examples, 1 / (len(counts) * counts[own]), sizes, rng)


@register("effective_number")
@dataclass(frozen=True)
class EffectiveNumber(LocalSampling):
    """As `shuffled`, but an example of a class of which the client has n counts (1 - beta) / (1 - beta^n).

    These weights are scaled so that those of the client's classes add up to their number. Source: Cui et al.,
    arXiv:1901.05555. Differs from the paper: classes are counted at each client, by itself.
    """

    weighs: ClassVar[bool] = True
    beta: float = option("0: all examples count the same; near 1: all classes", 0.99, at_least=0, below=1)

    def draw(self, examples: LocalExamples, sizes: BatchSizes, rng: Rng) -> Draws:
        classes, counts = np.unique(examples.labels, return_counts=True)
        of_class = (1 - self.beta) / (1 - self.beta**counts)
        of_class *= len(classes) / of_class.sum()
        # Places are sorted, so an example is found among them again.
        weight = of_class[np.searchsorted(classes, examples.labels)]
        places, mask = client_batches(examples.places, rng, sizes)
        return Draws(places, mask, weight[np.searchsorted(examples.places, places)])


@register("by_loss")
@dataclass(frozen=True)
class ByLoss(LocalSampling):
    """Draws with replacement, with probability q = (1 - u) loss^temperature / sum + u / n, each weighted by 1 / (n q).

    The weights keep the mean gradient what it is over all n examples (importance sampling, arXiv:1401.2753); u is
    `uniform_share`, which keeps every weight below 1 / u. The losses are of a pass over the client's examples with the
    adapter that it starts the round from. Steps are as many and as large as for `shuffled`.

    Source: the data side of joint adaptive selection, arXiv:2305.19924. Differs from the paper: examples are drawn with
    weights, instead of left out.
    """

    needs_losses: ClassVar[bool] = True
    weighs: ClassVar[bool] = True
    temperature: float = option("0: all examples alike; 1: in proportion to the loss", 1.0, at_least=0)
    uniform_share: float = option("share of the draws that is spread evenly", 0.2, above=0, at_most=1)

    def draw(self, examples: LocalExamples, sizes: BatchSizes, rng: Rng) -> Draws:
        chances = self.chances(examples)
        draws = _with_replacement(examples, chances, sizes, rng)
        weight = 1 / (len(chances) * chances)
        return Draws(draws.places, draws.mask, weight[np.searchsorted(examples.places, draws.places)])

    def chances(self, examples: LocalExamples) -> np.ndarray:
        """The probability `(N,)` with which each example is drawn."""
        assert examples.losses is not None
        losses = examples.losses.astype(np.float64)
        number, top = len(losses), losses.max()
        share = np.full(number, 1 / number)
        if np.isfinite(losses).all() and top > 0:  # else the round will say what is wrong
            powers = (losses.clip(min=0) / top) ** self.temperature
            share = powers / powers.sum()
        return (1 - self.uniform_share) * share + self.uniform_share / number


def _with_replacement(examples: LocalExamples, chances: np.ndarray, sizes: BatchSizes, rng: Rng) -> Draws:
    """Draw each step's examples with these chances `(N,)`, however many others of the step are the same.

    As many numbers are drawn as the client has use for: `sizes.width` depends on its neighbours.
    """
    number, mask = len(chances), sizes.mask(len(chances))
    shape = sizes.num_steps, min(sizes.batch_size, number)
    ends = np.cumsum(chances)
    drawn = np.searchsorted(ends / ends[-1], rng.child("draws").numpy().random(shape), side="right")
    places = np.zeros(mask.shape, np.int64)
    places[:, : shape[1]] = examples.places[np.minimum(drawn, number - 1)]
    return Draws(np.where(mask, places, places[:, :1]), mask)
