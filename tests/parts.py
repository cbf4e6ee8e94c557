"""What tests of partitioners share: labels, and what every partitioner promises."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

# Ten classes of 60 examples, with gaps in the labels and in no order.
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10) * 3, 60))
EXTREMES = (1e-320, 1e-6, 1e-3, 0.1, 1.0, 100.0, 1e6, 1e308)


def label_arrays(max_classes: int = 8) -> st.SearchStrategy[np.ndarray]:
    """Up to 80 labels, of classes that may be missing or rare."""
    return st.lists(st.integers(0, max_classes - 1), min_size=1, max_size=80).map(np.array)


def check_arrays(parts: list[np.ndarray], num_clients: int, num_examples: int, *, disjoint: bool = True) -> None:
    """What every partitioner promises: sorted int64 indices, none twice; if `disjoint`, no example at two clients."""
    assert len(parts) == num_clients
    for part in parts:
        assert part.dtype == np.int64 and part.ndim == 1
        assert np.all(np.diff(part) > 0)
    dealt = np.concatenate(parts)
    assert len(np.unique(dealt)) == len(dealt) or not disjoint
    assert np.all((dealt >= 0) & (dealt < num_examples))


def class_counts(parts: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """How many examples of each class each client has, `(clients, classes)`."""
    _, index = np.unique(labels, return_inverse=True)
    return np.array([np.bincount(index[part], minlength=index.max() + 1) for part in parts])


def sizes(parts: list[np.ndarray]) -> np.ndarray:
    return np.array([len(part) for part in parts])


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
