"""Compute the features of images once, and keep them: in memory, or memory-mapped in the cache on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flora.clip.towers.towers import AdaptedClip
from flora.core.memory import available_memory_bytes
from flora.core.progress import Progress
from flora.data.datasets.base import ImageSource, Split
from flora.data.value_range import UNREADABLE
from flora.features.cache import CacheOptions, Entry, FeatureCache
from flora.features.features import StoredFeatures
from flora.features.reading import check_some_are_left, in_threads, reading_pool, refusal, stem_batch_size, unreadable
from flora.features.unfinished import Part


def load_features(
    splits: Sequence[Split],
    model: AdaptedClip,
    *,
    cache: CacheOptions,
    skip_unreadable: bool,
    progress: Progress,
    log: Callable[[str], object],
) -> tuple[list[StoredFeatures], list[str]]:
    """Features of each split, from the cache where it has them, and a line for each image that can't be read.

    Splits that share a source share its features, so another split of the same images finds them in the cache.
    Raises `UserError` that names all unreadable images unless `skip_unreadable`, if a split has no readable image, or
    if the features fit neither into memory nor into the cache.
    """
    by_source = {id(split.source): split.source for split in splits}
    entries: dict[int, tuple[Entry, np.ndarray]] = {}
    problems: list[str] = []
    for key, source in by_source.items():
        used = np.unique(np.concatenate([split.source_indices for split in splits if split.source is source]))
        images = StemImages(source, used, model, cache.dtype)
        entry = _entry(images, cache=cache, skip_unreadable=skip_unreadable, progress=progress, log=log)
        problems += entry.problems.values()
        rows = np.full(len(source), -1, dtype=np.int64)
        rows[used[entry.readable]] = np.arange(len(entry.readable))
        entries[key] = entry, rows
    loaded = [_of_split(split, *entries[id(split.source)], problems) for split in splits]
    if cache.dtype is not None:
        loaded = [replace(each, computed_as=model.vision.stem_shape()[1]) for each in loaded]
    return loaded, problems


def _of_split(split: Split, entry: Entry, rows: np.ndarray, problems: Sequence[str]) -> StoredFeatures:
    own = rows[split.source_indices]
    kept = np.flatnonzero(own >= 0)
    check_some_are_left(len(kept), len(split), problems)
    labels = torch.from_numpy(split.labels[kept])
    return StoredFeatures(entry.stem, torch.from_numpy(own[kept]), labels, kept, entry.digests[own[kept]])


@dataclass(frozen=True, eq=False)
class StemImages:
    """The images `used` of a source, and the model whose stem they go through. They are numbered from 0.

    `storage` is the type that the stem's output is rounded to; None: it stays as it is.
    """

    source: ImageSource
    used: np.ndarray
    model: AdaptedClip
    storage: torch.dtype | None = None

    def __len__(self) -> int:
        return len(self.used)

    def key(self) -> dict[str, Any]:
        """All that their features depend on."""
        return {
            **self.model.vision.stem_key(),
            "images": self.source.fingerprint(self.used),
            "num_images": len(self.used),
            **({} if self.storage is None else {"storage": str(self.storage)}),
        }

    def shape(self) -> tuple[torch.Size, torch.dtype]:
        """Shape and type of what is kept of one image."""
        shape, computed_as = self.model.vision.stem_shape()
        return shape, self.storage or computed_as

    def read(self, number: int) -> tuple[Tensor, bytes] | str:
        """An image's pixels as they go into the stem, and its digest; a line that says why if it can't be read."""
        index = int(self.used[number])
        try:
            return self.model.clip.preprocess(self.source.open(index)), self.source.digest(index)
        except UNREADABLE as error:
            return unreadable(self.source.name(index), error)

    def are_unreadable(self, numbers: Iterable[int]) -> bool:
        """Whether none of these images can be read now."""
        return all(isinstance(self.read(number), str) for number in numbers)

    def computed_parts(self, start: int, batch_size: int | None = None) -> Iterator[Part]:
        """Return what the images from `start` on come to, a batch at a time; the next one is decoded ahead."""
        size = batch_size or stem_batch_size(self.model)
        batches = [range(first, min(first + size, len(self))) for first in range(start, len(self), size)]
        pool = reading_pool()
        try:
            ahead = [pool.submit(self.read, number) for number in batches[0]] if batches else []
            for place, batch in enumerate(batches):
                current = [future.result() for future in ahead]
                following = batches[place + 1] if place + 1 < len(batches) else range(0)
                ahead = [pool.submit(self.read, number) for number in following]
                yield self._part(batch, current)
        finally:
            pool.shutdown(cancel_futures=True)

    def _part(self, batch: range, found: Sequence[tuple[Tensor, bytes] | str]) -> Part:
        good = [(number, *each) for number, each in zip(batch, found, strict=True) if not isinstance(each, str)]
        if good:
            rows = self.model.vision.stem(torch.stack([pixels for _, pixels, _ in good]).to(self.model.device)).cpu()
            rows = rows.to(self.storage or rows.dtype)
        else:
            shape, dtype = self.shape()
            rows = torch.empty((0, *shape), dtype=dtype)
        return Part(
            stop=batch.stop,
            readable=[number for number, _, _ in good],
            rows=rows,
            digests=[digest for _, _, digest in good],
            problems={number: each for number, each in zip(batch, found, strict=True) if isinstance(each, str)},
        )


def _entry(
    images: StemImages,
    *,
    cache: CacheOptions,
    skip_unreadable: bool,
    progress: Progress,
    log: Callable[[str], object],
) -> Entry:
    """The stem's outputs for images: found, or computed and kept."""
    key = images.key()
    shape, dtype = images.shape()
    num_bytes = len(images) * int(np.prod(shape)) * dtype.itemsize
    budget = cache.memory_bytes or available_memory_bytes(torch.device("cpu")) // 2
    if images.model.vision.cut == 0 and num_bytes <= budget:
        cache = CacheOptions(folder=None)  # without a stem there is nothing but the images themselves to keep
    store = FeatureCache(cache, log)
    found = store.read(key, in_memory=num_bytes <= budget)
    if found is not None and not images.are_unreadable(found.problems):
        log("image features: images that could not be read can be by now: computed again")
        store.remove(key)
        found = None
    if found is not None:
        if found.problems and not skip_unreadable:
            raise refusal(list(found.problems.values()))
        log(f"image features: {len(found.readable):,} read from the cache ({_size(num_bytes)})")
        return found
    place = "in memory" if num_bytes <= budget else "memory-mapped on disk"
    log(f"image features: {len(images):,} of shape {tuple(shape)}, {_size(num_bytes)} {place}, to be computed once")
    in_memory = num_bytes <= budget
    with store.create(key, (len(images), *shape), dtype, in_memory=in_memory, trust=images.are_unreadable) as writer:
        if writer.next_image:
            log(f"image features: going on after {writer.next_image:,} images that a run computed before it stopped")
        advance = progress("images", len(images))
        advance(writer.next_image)
        parts = images.computed_parts(writer.next_image)
        while not (writer.problems and not skip_unreadable):
            part = next(parts, None)
            if part is None:
                return writer.finish()
            writer.append(part)
            advance(len(part.readable) + len(part.problems))
        rest = in_threads(images.read, range(writer.next_image, len(images)), advance)
        raise refusal([*writer.problems.values(), *(each for each in rest if isinstance(each, str))])


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
