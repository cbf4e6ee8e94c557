"""Read images in threads, and say in a line which of them can't be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import UnidentifiedImageError

from flora.clip.towers.towers import AdaptedClip
from flora.core.errors import UserError
from flora.data.datasets.base import DIGEST_BYTES

# Images through the stem at once; fewer where their activations would take more than this.
STEM_BATCH_SIZE, STEM_BATCH_BYTES = 256, 2**28
# Unreadable images that an error names.
MAX_NAMED = 100

T = TypeVar("T")


def in_threads(read: Callable[[int], T], numbers: range, advance: Callable[[int], object]) -> list[T]:
    """Return what `read` gives for each of the numbers, in their order; `advance` is told of each."""
    results = []
    with reading_pool() as pool:
        for each in pool.map(read, numbers):
            results.append(each)
            advance(1)
    return results


def reading_pool() -> ThreadPoolExecutor:
    """Threads that read and decode images side by side."""
    return ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16))


def stem_batch_size(model: AdaptedClip) -> int:
    """Return how many images go through the stem at once."""
    return max(1, min(STEM_BATCH_SIZE, STEM_BATCH_BYTES // model.vision.activation_bytes()))


def as_rows(digests: Sequence[bytes]) -> np.ndarray:
    """Digests as one array `(N, 16)` uint8."""
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES)


def unreadable(name: str, error: BaseException) -> str:
    """The line about an image that can't be read."""
    reason = "of no format that is known here" if isinstance(error, UnidentifiedImageError) else error
    return " ".join(f"{name}: can't be read as an image: {reason}".split())


def refusal(problems: Sequence[str]) -> UserError:
    """The error that names all images that can't be read, or very many of them."""
    named = "; ".join(problems[:MAX_NAMED]) + (
        f"; and {len(problems) - MAX_NAMED:,} more" * (len(problems) > MAX_NAMED)
    )
    number = f"{len(problems):,} images can't be read: " if len(problems) > 1 else ""
    return UserError(f"{number}{named}; set data.unreadable=skip to leave such images out")


def check_some_are_left(num_kept: int, num_images: int, problems: Sequence[str]) -> None:
    """Raise `UserError` if no image of a split can be read."""
    if not num_kept:
        first = problems[0] if problems else "there are none"
        raise UserError(f"data: none of the {num_images} images of a split can be read; the first: {first}")
