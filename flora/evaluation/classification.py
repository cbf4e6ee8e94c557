"""Figures of merit of a classifier: confusion matrix, macro F1, top-k, AUROC, and how far to trust its confidence.

`labels` and `predicted` `(N,)` are classes, numbered from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_BINS = 15


def confusion(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """How many examples of each class are taken for each class, `(C, C)`: a row a label, a column a prediction."""
    pairs = labels.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def macro_f1(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> float | None:
    """The mean over classes of F1 = 2 TP / (2 TP + FP + FN); a class that is neither label nor prediction is left out.

    None without examples.
    """
    right = np.bincount(labels[labels == predicted], minlength=num_classes)
    sizes = np.bincount(labels, minlength=num_classes) + np.bincount(predicted, minlength=num_classes)
    known = sizes > 0
    return float((2 * right[known] / sizes[known]).mean()) if known.any() else None


def top_accuracy(label_ranks: np.ndarray, number: int, num_classes: int) -> float | None:
    """The share of examples whose label is among the `number` most probable classes.

    `label_ranks` `(N,)` says how many classes are more probable than the label. None where there are no more classes
    than `number`, or no examples.
    """
    if num_classes <= number or not len(label_ranks):
        return None
    return float((label_ranks < number).mean())


def macro_auroc(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """The area under the ROC curve of each class against the rest, mean over the classes that have examples and a rest.

    `probabilities` are `(N, C)`. A tie counts one half: it is the Mann-Whitney statistic. None without such a class.
    """
    areas = []
    for label in np.unique(labels):
        positive = labels == label
        number, others = int(positive.sum()), int((~positive).sum())
        if others:
            _, places, counts = np.unique(probabilities[:, label], return_inverse=True, return_counts=True)
            ranks = np.cumsum(counts) - (counts - 1) / 2  # of equal ones the mean
            areas.append((ranks[places[positive]].sum() - number * (number + 1) / 2) / (number * others))
    return float(np.mean(areas)) if areas else None


@dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence against accuracy in bins of equal width, `(NUM_BINS,)`; the means of an empty bin are NaN.

    Bin i holds the examples whose most probable class has a probability in (i / NUM_BINS, (i + 1) / NUM_BINS].
    """

    counts: np.ndarray
    confidences: np.ndarray
    accuracies: np.ndarray

    @property
    def error(self) -> float | None:
        """The expected calibration error: the bins' |accuracy - confidence|, weighted by examples; None without any.

        Source: Naeini et al., AAAI 2015, as in Guo et al., arXiv:1706.04599, equation 3.
        """
        if not self.counts.sum():
            return None
        gaps = np.abs(self.accuracies - self.confidences)
        return float(np.average(np.nan_to_num(gaps), weights=self.counts))


def reliability(confidences: np.ndarray, correct: np.ndarray) -> Reliability:
    """How often predictions of each confidence `(N,)` are right, by `correct` `(N,)`; NaN is none."""
    known = ~np.isnan(confidences)
    confidences, correct = confidences[known], correct[known]
    bins = np.clip(np.ceil(confidences * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(bins, weights=each, minlength=NUM_BINS) / counts for each in (confidences, correct)]
    return Reliability(counts, *means)
