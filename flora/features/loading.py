"""Compute the features of images once, and keep them: in memory, or memory-mapped in the cache on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flora.clip.towers.towers import AdaptedClip
from flora.core.memory import available_memory_bytes
from flora.core.processes import ALONE, Message, Processes
from flora.core.progress import Tell
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
    tell: Tell,
    processes: Processes = ALONE,
) -> tuple[list[StoredFeatures], list[str]]:
    """Features of each split, from the cache where it has them, and a line for each image that can't be read.

    Splits that share a source share its features, so another split of the same images finds them in the cache. Several
    processes compute them in shares. Raises `UserError` that names all unreadable images unless `skip_unreadable`, if a
    split has no readable image, or if the features fit neither into memory nor into the cache.
    """
    by_source = {id(split.source): split.source for split in splits}
    entries: dict[int, tuple[Entry, np.ndarray]] = {}
    problems: list[str] = []
    for key, source in by_source.items():
        used = np.unique(np.concatenate([split.source_indices for split in splits if split.source is source]))
        images = StemImages(source, used, model, cache.dtype)
        entry = _Source(images, cache, skip_unreadable, tell, processes).entry()
        problems += entry.problems.values()
        rows = np.full(len(source), -1, dtype=np.int64)
        rows[used[entry.readable]] = np.arange(len(entry.readable))
        entries[key] = entry, rows
    loaded = [_of_split(split, *entries[id(split.source)], problems) for split in splits]
    if cache.dtype is not None:
        loaded = [replace(each, computed_as=model.vision.stem_shape()[1]) for each in loaded]
    return loaded, problems


def _of_split(split: Split, entry: Entry, rows: np.ndarray, problems: Sequence[str]) -> StoredFeatures:
    places = rows[split.source_indices]
    readable = np.flatnonzero(places >= 0)
    check_some_are_left(len(readable), len(split), problems)
    labels = torch.from_numpy(split.labels[readable])
    return StoredFeatures(
        entry.stem, torch.from_numpy(places[readable]), labels, readable, entry.digests[places[readable]]
    )


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
        """The key of the images' features in the cache: all that these depend on, as JSON types."""
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

    def batches(self, start: int) -> list[range]:
        """The images from `start` on, in batches that go through the stem at once."""
        size = stem_batch_size(self.model)
        return [range(first, min(first + size, len(self))) for first in range(start, len(self), size)]

    def computed_parts(self, batches: Sequence[range]) -> Iterator[Part]:
        """Return what the images of `batches` come to, a batch at a time; the next one is decoded ahead."""
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

    def _part(self, batch: range, images: Sequence[tuple[Tensor, bytes] | str]) -> Part:
        good = [(number, *each) for number, each in zip(batch, images, strict=True) if not isinstance(each, str)]
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
            problems={number: each for number, each in zip(batch, images, strict=True) if isinstance(each, str)},
        )


@dataclass(frozen=True, eq=False)
class _Source:
    """Finds the stem's outputs for images, or has them computed and kept."""

    images: StemImages
    cache: CacheOptions
    skip_unreadable: bool
    tell: Tell
    processes: Processes

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows, if every image can be read."""
        shape, dtype = self.images.shape()
        return len(self.images) * int(np.prod(shape)) * dtype.itemsize

    @cached_property
    def in_memory(self) -> bool:
        """Whether the rows fit into this process's share of the memory."""
        free = available_memory_bytes(torch.device("cpu")) // (2 * self.processes.local_size)
        return self.num_bytes <= (self.cache.memory_bytes or free)

    def store(self, *, keeps: bool = True) -> FeatureCache:
        """The cache, or none: without a stem there is nothing but the images themselves to keep."""
        is_needed = (keeps and self.images.model.vision.cut > 0) or not self.in_memory
        return FeatureCache(self.cache if is_needed else CacheOptions(folder=None), self.tell.log)

    def entry(self) -> Entry:
        """The entry, the same in all processes: from the cache, else computed in shares, else as process 0 has it."""
        processes, entry = self.processes, self._found()
        have = [message.fields for message in processes.exchange(Message(entry is not None))]
        if entry is not None and all(have):
            self.tell.log(f"image features: {len(entry.readable):,} read from the cache ({_size(self.num_bytes)})")
            return entry
        if not have[0]:
            if processes.is_first:
                entry = self._computed()
            else:
                start = processes.first(Message).fields
                for _ in self._parts(start):
                    pass
        if processes.size == 1 and entry is not None:
            return entry
        processes.anybody(False)  # process 0 has it in the cache by now
        entry = self._found() if entry is None else entry
        return self._as_process_0_has_it(entry) if processes.anybody(entry is None) else _needed(entry)

    def _found(self) -> Entry | None:
        """The entry in the cache, if there is one that can be gone on with."""
        store, key = self.store(), self.images.key()
        entry = store.read(key, in_memory=self.in_memory)
        if entry is not None and not self.images.are_unreadable(entry.problems):
            self.tell.log("image features: images that could not be read can be by now: computed again")
            store.remove(key)
            return None
        if entry is not None and entry.problems and not self.skip_unreadable:
            raise refusal(list(entry.problems.values()))
        return entry

    def _computed(self) -> Entry:
        """Compute an entry, with what the other processes compute of it, and keep it."""
        images, log, in_memory = self.images, self.tell.log, self.in_memory
        shape, dtype = images.shape()
        place = "in memory" if in_memory else "memory-mapped on disk"
        rows = f"{len(images):,} of shape {tuple(shape)}, {_size(self.num_bytes)} {place}"
        log(f"image features: {rows}, to be computed once")
        create = self.store().create
        size = (len(images), *shape)
        with create(images.key(), size, dtype, in_memory=in_memory, trust=images.are_unreadable) as writer:
            if writer.next_image:
                log(
                    f"image features: going on after {writer.next_image:,} images that a run computed before it stopped"
                )
            advance = self.tell.progress("images", len(images))
            advance(writer.next_image)
            parts = self._parts(self.processes.first(lambda: Message(writer.next_image)).fields)
            while not (writer.problems and not self.skip_unreadable):
                part = next(parts, None)
                if part is None:
                    return writer.finish()
                writer.append(part)
                advance(len(part.readable) + len(part.problems))
            rest = in_threads(images.read, range(writer.next_image, len(images)), advance)
            raise refusal([*writer.problems.values(), *(each for each in rest if isinstance(each, str))])

    def _parts(self, start: int) -> Iterator[Part]:
        """Return what the images from `start` on come to, in their order; processes take turns in computing batches."""
        rank, size = self.processes.rank, self.processes.size
        batches = self.images.batches(start)
        computed = self.images.computed_parts(batches[rank::size])
        if size == 1:
            yield from computed
            return
        for _ in range(0, len(batches), size):
            part = next(computed, None)
            for message in self.processes.exchange(Message() if part is None else part.to_message()):
                if message.fields is not None:
                    yield Part.from_message(message)

    def _as_process_0_has_it(self, entry: Entry | None) -> Entry:
        """The entry that process 0 has, by a message: where there is no cache that all processes share."""
        if self.processes.is_first:
            for part in _needed(entry).parts(len(self.images)):
                self.processes.first(part.to_message)
            return _needed(entry)
        if entry is not None:
            for _ in self._received():
                pass
            return entry
        shape, dtype = self.images.shape()
        create, size = self.store(keeps=self.processes.local_rank == 0).create, (len(self.images), *shape)
        with create(self.images.key(), size, dtype, in_memory=self.in_memory, trust=lambda problems: False) as writer:
            for part in self._received():
                writer.append(part)
            return writer.finish()

    def _received(self) -> Iterator[Part]:
        """The parts of the entry that process 0 has."""
        stop = 0
        while stop < len(self.images):
            part = Part.from_message(self.processes.first(Message))
            stop = part.stop
            yield part


def _needed(entry: Entry | None) -> Entry:
    assert entry is not None
    return entry


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
