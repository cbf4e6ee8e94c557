"""The frozen stem's output for every image: what training and evaluation read in place of images."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flora.clip.backbone import to_rgb
from flora.clip.towers import AdaptedClip
from flora.data.augmentation import Augmentation
from flora.data.datasets import ImageSource, Progress, Split
from flora.data.value_range import UNREADABLE
from flora.errors import UserError
from flora.federated.cache import CacheOptions, Entry, FeatureCache
from flora.federated.memory import available_memory_bytes
from flora.rng import Rng

# Images through the stem at once; fewer where their activations would take more than this.
STEM_BATCH_SIZE, STEM_BATCH_BYTES = 256, 2**28


class Features(ABC):
    """Stem outputs and labels of a split's readable examples, whether they were computed before or are computed now.

    Example i of the N has label `labels[i]` (on the CPU) and is example `positions[i]` of the split.
    """

    labels: Tensor
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where indices have to be."""

    @abstractmethod
    def take(self, indices: Tensor, device: torch.device, rngs: Iterable[Rng] | None = None) -> Tensor:
        """Stem outputs `(n, ...)` of the examples at `indices` `(n,)`, on `device`.

        `rngs`, one a client and step, say that this is for training: where images are augmented, that is drawn from
        them, and `indices` are client-major.
        """

    @abstractmethod
    def subset(self, indices: np.ndarray) -> Features:
        """The examples at `indices`, in that order; what is large is shared."""


@dataclass(frozen=True, eq=False)
class StoredFeatures(Features):
    """Features that were computed before: example i has row `rows[i]` of `stem`."""

    stem: Tensor
    rows: Tensor
    labels: Tensor
    positions: np.ndarray

    @property
    def device(self) -> torch.device:
        return self.stem.device

    def take(self, indices: Tensor, device: torch.device, rngs: Iterable[Rng] | None = None) -> Tensor:
        return self.stem[self.rows[indices]].to(device)

    def subset(self, indices: np.ndarray) -> StoredFeatures:
        chosen = torch.from_numpy(indices)
        return StoredFeatures(
            self.stem, self.rows[chosen.to(self.device)], self.labels[chosen], self.positions[indices]
        )


@dataclass(frozen=True, eq=False)
class LiveFeatures(Features):
    """Features that are computed whenever they are asked for: of images that are augmented, or for comparison."""

    split: Split
    model: AdaptedClip
    augmentation: Augmentation
    labels: Tensor
    positions: np.ndarray

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def take(self, indices: Tensor, device: torch.device, rngs: Iterable[Rng] | None = None) -> Tensor:
        """Raises `UserError` naming an image that can't be read any more."""
        places = self.positions[indices.numpy()]
        streams: list[Rng | None] = [None] * len(places)
        if rngs is not None:
            clients = list(rngs)
            streams = [rng.child("image", number) for rng in clients for number in range(len(places) // len(clients))]

        def pixels(place: int, stream: Rng | None) -> Tensor:
            try:
                image = to_rgb(self.split.open(place))
            except UNREADABLE as error:
                raise UserError(_unreadable(self.split.name(place), error)) from None
            if stream is not None:
                image = self.augmentation.apply(image, self.model.clip.architecture.image_size, stream)
            return self.model.clip.preprocess(image)

        size, stems = _stem_batch_size(self.model), []
        with _pool() as pool:
            for start in range(0, len(places), size):
                part = slice(start, start + size)
                decoded = list(pool.map(pixels, places[part].tolist(), streams[part]))
                stems.append(self.model.vision.stem(torch.stack(decoded).to(self.model.device)))
        return torch.cat(stems).to(device)

    def subset(self, indices: np.ndarray) -> LiveFeatures:
        return replace(self, labels=self.labels[torch.from_numpy(indices)], positions=self.positions[indices])


def move_if_they_fit(features: Sequence[Features], device: torch.device) -> list[Features]:
    """Stored features on `device` if they fit into half of its free memory, else where they are."""
    stems = {id(each.stem): each.stem for each in features if isinstance(each, StoredFeatures)}
    if device.type == "cpu" or sum(stem.nbytes for stem in stems.values()) > available_memory_bytes(device) // 2:
        return list(features)
    moved = {key: stem.to(device) for key, stem in stems.items()}
    return [
        replace(each, stem=moved[id(each.stem)], rows=each.rows.to(device))
        if isinstance(each, StoredFeatures)
        else each
        for each in features
    ]


def live_features(
    split: Split,
    model: AdaptedClip,
    augmentation: Augmentation,
    *,
    skip_unreadable: bool,
    progress: Progress,
) -> tuple[LiveFeatures, list[str]]:
    """Features of a split that are computed at each use, and a line for each image that can't be read.

    With `skip_unreadable` every image is decoded once, to find those. Raises `UserError` if none can be read.
    """
    kept, problems = np.arange(len(split)), []
    if skip_unreadable:
        advance = progress("checking images", len(split))

        def check(place: int) -> str | None:
            try:
                split.open(place)
            except UNREADABLE as error:
                return _unreadable(split.name(place), error)
            return None

        with _pool() as pool:
            found = []
            for line in pool.map(check, range(len(split))):
                found.append(line)
                advance(1)
        problems = [line for line in found if line is not None]
        kept = np.flatnonzero([line is None for line in found])
        _check_some_are_left(len(kept), len(split), problems)
    return LiveFeatures(split, model, augmentation, torch.from_numpy(split.labels[kept]), kept), problems


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


def _of_split(split: Split, entry: Entry, rows: np.ndarray, problems: Sequence[str]) -> StoredFeatures:
    own = rows[split.positions]
    kept = np.flatnonzero(own >= 0)
    _check_some_are_left(len(kept), len(split), problems)
    return StoredFeatures(entry.stem, torch.from_numpy(own[kept]), torch.from_numpy(split.labels[kept]), kept)


def _check_some_are_left(num_kept: int, num_images: int, problems: Sequence[str]) -> None:
    if not num_kept:
        first = problems[0] if problems else "there are none"
        raise UserError(f"data: none of the {num_images} images of a split can be read; the first: {first}")


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
            return _unreadable(source.name(index), error)

    size = _stem_batch_size(model)
    batches = [range(start, min(start + size, len(used))) for start in range(0, len(used), size)]
    with _pool() as pool:
        ahead = [pool.submit(decode, place) for place in batches[0]] if batches else []
        for number, batch in enumerate(batches):
            current = [future.result() for future in ahead]
            following = batches[number + 1] if number + 1 < len(batches) else range(0)
            ahead = [pool.submit(decode, place) for place in following]
            decoded = [(place, item) for place, item in zip(batch, current, strict=True) if isinstance(item, Tensor)]
            failed = [item for item in current if isinstance(item, str)]
            yield [place for place, _ in decoded], [pixels for _, pixels in decoded], failed


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16))


def _stem_batch_size(model: AdaptedClip) -> int:
    """How many images go through the stem at once."""
    return max(1, min(STEM_BATCH_SIZE, STEM_BATCH_BYTES // model.vision.activation_bytes()))


def _unreadable(name: str, error: BaseException) -> str:
    return " ".join(f"{name}: can't be read as an image: {error}".split())


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
