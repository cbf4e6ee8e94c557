"""The frozen stem's output for every image, computed once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flora.data.datasets import Split
from flora.errors import UserError

# What Pillow raises for a file that it can't decode, or that would be absurdly large once decoded.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class Features:
    """Stem outputs and labels of a split's readable examples.

    Example i of the N has row `rows[i]` of `stem`, label `labels[i]`, and is example `positions[i]` of the split.
    """

    stem: Tensor
    rows: Tensor
    labels: Tensor
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Stem outputs and labels of the examples at `indices`, on `device`."""
        return self.stem[self.rows[indices]].to(device), self.labels[indices].to(device)

    def subset(self, indices: np.ndarray) -> Features:
        """The examples at `indices`, in that order; the stem outputs are shared."""
        chosen = torch.from_numpy(indices)
        return Features(self.stem, self.rows[chosen], self.labels[chosen], self.positions[indices])


def compute_features(
    split: Split,
    *,
    preprocess: Callable[[Image.Image], Tensor],
    stem: Callable[[Tensor], Tensor],
    device: torch.device,
    skip_unreadable: bool,
    advance: Callable[[int], object],
    batch_size: int = 256,
) -> tuple[Features, list[str]]:
    """Run every image of a split through `preprocess` and `stem`; images are decoded in parallel.

    Returns the features of all examples that could be read, and a line for each that could not.
    Raises `UserError` for the first of those unless `skip_unreadable`. `advance` is told how many images are done.
    """
    output: Tensor | None = None
    readable: list[int] = []
    problems: list[str] = []
    for indices, pixels, failed in _decoded_batches(split, preprocess, batch_size):
        if failed and not skip_unreadable:
            raise UserError(f"{failed[0]}; set data.unreadable=skip to leave such images out")
        problems += failed
        if indices:
            batch = stem(torch.stack(pixels).to(device)).cpu()
            if output is None:
                output = torch.empty((len(split), *batch.shape[1:]), dtype=batch.dtype)
            output[len(readable) : len(readable) + len(indices)] = batch
            readable += indices
        advance(len(indices) + len(failed))
    if output is None:
        raise UserError(
            f"data: none of the {len(split)} images can be read; the first: {(problems or ['no images'])[0]}"
        )
    kept = np.asarray(readable, dtype=np.int64)
    labels = torch.from_numpy(split.labels[kept])
    return Features(output[: len(kept)], torch.arange(len(kept)), labels, kept), problems


def _decoded_batches(
    split: Split, preprocess: Callable[[Image.Image], Tensor], batch_size: int
) -> Iterator[tuple[list[int], list[Tensor], list[str]]]:
    """Batches of (indices, pixels, what could not be read), one decoded ahead of the one being used."""

    def decode(index: int) -> Tensor | str:
        try:
            return preprocess(split.open(index))
        except UNREADABLE as error:
            return f"{split.name(index)}: can't be read as an image: {' '.join(str(error).split())}"

    starts = range(0, len(split), batch_size)
    batches = [range(start, min(start + batch_size, len(split))) for start in starts]
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16)) as pool:
        ahead = [pool.submit(decode, index) for index in batches[0]] if batches else []
        for number, batch in enumerate(batches):
            current = [future.result() for future in ahead]
            following = batches[number + 1] if number + 1 < len(batches) else range(0)
            ahead = [pool.submit(decode, index) for index in following]
            decoded = [(index, item) for index, item in zip(batch, current, strict=True) if isinstance(item, Tensor)]
            failed = [item for item in current if isinstance(item, str)]
            yield [index for index, _ in decoded], [pixels for _, pixels in decoded], failed
