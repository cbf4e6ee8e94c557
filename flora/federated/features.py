"""The frozen stem's output for every image, computed once: what training and evaluation read in place of images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flora.clip.towers import AdaptedClip
from flora.data.datasets import ImageSource, Split
from flora.errors import UserError
from flora.federated.cache import CacheOptions, Entry, FeatureCache
from flora.federated.memory import available_memory_bytes

# What Pillow raises for a file that it can't decode, or that would be absurdly large once decoded.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
# Images through the stem at once; fewer where their activations would take more than this.
STEM_BATCH_SIZE, STEM_BATCH_BYTES = 256, 2**28

Progress = Callable[[str, int], Callable[[int], object]]
"""`progress(title, total)` starts a bar and returns the function that advances it."""


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

    @property
    def device(self) -> torch.device:
        """Where the features are, and where indices into them have to be."""
        return self.stem.device

    def take(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Stem outputs and labels of the examples at `indices`, on `device`."""
        return self.stem[self.rows[indices]].to(device), self.labels[indices].to(device)

    def subset(self, indices: np.ndarray) -> Features:
        """The examples at `indices`, in that order; the stem outputs are shared."""
        chosen = torch.from_numpy(indices).to(self.device)
        return Features(self.stem, self.rows[chosen], self.labels[chosen], self.positions[indices])


def move_if_they_fit(features: Sequence[Features], device: torch.device) -> list[Features]:
    """The features on `device` if they fit into half of its free memory, else where they are."""
    stems = {id(each.stem): each.stem for each in features}
    if device.type == "cpu" or sum(stem.nbytes for stem in stems.values()) > available_memory_bytes(device) // 2:
        return list(features)
    moved = {key: stem.to(device) for key, stem in stems.items()}
    return [
        Features(moved[id(each.stem)], each.rows.to(device), each.labels.to(device), each.positions)
        for each in features
    ]


def load_features(
    splits: Sequence[Split],
    model: AdaptedClip,
    *,
    cache: CacheOptions,
    skip_unreadable: bool,
    progress: Progress,
    log: Callable[[str], object],
) -> tuple[list[Features], list[str]]:
    """Features of each split, from the cache where it has them, and a line for each image that can't be read.

    Splits that share a source share its features, so another split of the same images finds them in the cache.
    Raises `UserError` for the first unreadable image unless `skip_unreadable`, if a split has no readable image, or if
    the features fit neither into memory nor into the cache.
    """
    by_source = {id(split.source): split.source for split in splits}
    entries: dict[int, tuple[Entry, np.ndarray]] = {}
    problems: list[str] = []
    for key, source in by_source.items():
        used = np.unique(np.concatenate([split.positions for split in splits if split.source is source]))
        entry = _entry(source, used, model, cache=cache, skip_unreadable=skip_unreadable, progress=progress, log=log)
        problems += entry.problems
        rows = np.full(len(source), -1, dtype=np.int64)
        rows[used[entry.readable]] = np.arange(len(entry.readable))
        entries[key] = entry, rows
    return [_of_split(split, *entries[id(split.source)], problems) for split in splits], problems


def _of_split(split: Split, entry: Entry, rows: np.ndarray, problems: Sequence[str]) -> Features:
    own = rows[split.positions]
    kept = np.flatnonzero(own >= 0)
    if not len(kept):
        first = problems[0] if problems else "there are none"
        raise UserError(f"data: none of the {len(split)} images of a split can be read; the first: {first}")
    return Features(entry.stem, torch.from_numpy(own[kept]), torch.from_numpy(split.labels[kept]), kept)


def _entry(
    source: ImageSource,
    used: np.ndarray,
    model: AdaptedClip,
    *,
    cache: CacheOptions,
    skip_unreadable: bool,
    progress: Progress,
    log: Callable[[str], object],
) -> Entry:
    """The stem's outputs for the images `used` of a source: found, or computed and kept."""
    key = {**model.vision.stem_key(), "images": source.fingerprint(used), "num_images": len(used)}
    shape, dtype = model.vision.stem_shape()
    num_bytes = len(used) * int(np.prod(shape)) * dtype.itemsize
    budget = cache.memory_bytes or available_memory_bytes(torch.device("cpu")) // 2
    if model.vision.cut == 0 and num_bytes <= budget:
        cache = CacheOptions(folder=None)  # without a stem there is nothing but the images themselves to keep
    store = FeatureCache(cache, log)
    found = store.read(key, in_memory=num_bytes <= budget)
    if found is not None:
        log(f"image features: {len(found.readable):,} read from the cache ({_size(num_bytes)})")
        return found
    place = "in memory" if num_bytes <= budget else "memory-mapped on disk"
    log(f"image features: {len(used):,} of shape {tuple(shape)}, {_size(num_bytes)} {place}, to be computed once")
    with store.create(key, (len(used), *shape), dtype, in_memory=num_bytes <= budget) as writer:
        advance = progress("images", len(used))
        for indices, pixels, failed in _decoded_batches(source, used, model):
            if indices:
                writer.append(indices, model.vision.stem(torch.stack(pixels).to(model.device)).cpu())
            if failed and not skip_unreadable:
                raise UserError(f"{failed[0]}; set data.unreadable=skip to leave such images out")
            writer.problems += failed
            advance(len(indices) + len(failed))
        return writer.finish()


def _decoded_batches(
    source: ImageSource, used: np.ndarray, model: AdaptedClip
) -> Iterator[tuple[list[int], list[Tensor], list[str]]]:
    """Batches of (places in `used`, pixels, what could not be read), one decoded ahead of the one being used."""

    def decode(place: int) -> Tensor | str:
        index = int(used[place])
        try:
            return model.clip.preprocess(source.open(index))
        except UNREADABLE as error:
            return " ".join(f"{source.name(index)}: can't be read as an image: {error}".split())

    size = max(1, min(STEM_BATCH_SIZE, STEM_BATCH_BYTES // model.vision.activation_bytes()))
    batches = [range(start, min(start + size, len(used))) for start in range(0, len(used), size)]
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16)) as pool:
        ahead = [pool.submit(decode, place) for place in batches[0]] if batches else []
        for number, batch in enumerate(batches):
            current = [future.result() for future in ahead]
            following = batches[number + 1] if number + 1 < len(batches) else range(0)
            ahead = [pool.submit(decode, place) for place in following]
            decoded = [(place, item) for place, item in zip(batch, current, strict=True) if isinstance(item, Tensor)]
            failed = [item for item in current if isinstance(item, str)]
            yield [place for place, _ in decoded], [pixels for _, pixels in decoded], failed


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
