"""The output of the frozen stem for every image, computed once and stored, or computed at each use."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from flora.clip.towers.towers import AdaptedClip
from flora.core.errors import UserError
from flora.core.memory import available_memory_bytes
from flora.core.progress import Progress
from flora.core.rng import Rng
from flora.data.augmentation import Augmentation
from flora.data.datasets.base import DIGEST_BYTES, ImageSource, Split
from flora.data.rgb import to_rgb
from flora.data.value_range import UNREADABLE
from flora.features.cache import CacheOptions, Entry, FeatureCache
from flora.features.unfinished import Part

# Images through the stem at once; fewer where their activations would take more than this.
STEM_BATCH_SIZE, STEM_BATCH_BYTES = 256, 2**28
# Unreadable images that an error names.
MAX_NAMED = 100

T = TypeVar("T")


class Features(ABC):
    """Stem outputs and labels of a split's readable examples, whether they were computed before or are computed now.

    Example i of the N has label `labels[i]` (on the CPU) and is example `split_indices[i]` of the split. `digests`
    `(N, 16)` uint8 are those of the images as they are stored, if they are known. `views` are features of the same
    examples that are changed at random in other ways, by name, for images without labels. `targets` are tensors
    `(N, ...)`, on the CPU, that a step's batch has under the same names, for the examples that it sees.
    """

    labels: Tensor
    split_indices: np.ndarray
    digests: np.ndarray | None
    views: Mapping[str, Features] = MappingProxyType({})
    targets: Mapping[str, Tensor] = MappingProxyType({})

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def runs_stem(self) -> bool:
        """Whether images go through the stem at each use, of these features or of a view of theirs."""
        return any(view.runs_stem for view in self.views.values())

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
    split_indices: np.ndarray
    digests: np.ndarray | None = None
    views: Mapping[str, Features] = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.stem.device

    def take(self, indices: Tensor, device: torch.device, rngs: Iterable[Rng] | None = None) -> Tensor:
        return self.stem[self.rows[indices]].to(device)

    def subset(self, indices: np.ndarray) -> StoredFeatures:
        chosen = torch.from_numpy(indices)
        return StoredFeatures(
            self.stem,
            self.rows[chosen.to(self.device)],
            self.labels[chosen],
            self.split_indices[indices],
            _chosen(self.digests, indices),
        )


@dataclass(frozen=True, eq=False)
class LiveFeatures(Features):
    """Features that are computed whenever they are asked for: of images that are augmented, or for comparison."""

    split: Split
    model: AdaptedClip
    augmentation: Augmentation
    labels: Tensor
    split_indices: np.ndarray
    digests: np.ndarray | None = None
    views: Mapping[str, Features] = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def runs_stem(self) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def take(self, indices: Tensor, device: torch.device, rngs: Iterable[Rng] | None = None) -> Tensor:
        """Raises `UserError` naming an image that can't be read any more."""
        places = self.split_indices[indices.numpy()]
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
        labels, digests = self.labels[torch.from_numpy(indices)], _chosen(self.digests, indices)
        return replace(self, labels=labels, split_indices=self.split_indices[indices], digests=digests, views={})


def _chosen(digests: np.ndarray | None, indices: np.ndarray) -> np.ndarray | None:
    return None if digests is None else digests[indices]


def images_digest(features: Sequence[Features]) -> str:
    """A SHA-256 of the images that the features are of, of which split they are, and in which order."""
    digest = hashlib.sha256()
    for each in features:
        assert each.digests is not None
        digest.update(repr(len(each)).encode() + each.split_indices.tobytes() + each.digests.tobytes())
    return digest.hexdigest()


def live_features(
    split: Split,
    model: AdaptedClip,
    augmentation: Augmentation,
    *,
    skip_unreadable: bool,
    progress: Progress,
) -> tuple[LiveFeatures, list[str]]:
    """Features of a split that are computed at each use, and a line for each image that can't be read.

    All images are read once, for their digests, and with `skip_unreadable` decoded, to find what to leave out. Raises
    `UserError` if one can't be read otherwise, or none can.
    """

    def look(place: int) -> bytes | str:
        try:
            if skip_unreadable:
                to_rgb(split.open(place))
            return split.source.digest(int(split.source_indices[place]))
        except UNREADABLE as error:
            return _unreadable(split.name(place), error)

    found = _in_threads(look, range(len(split)), progress("checking images", len(split)))
    problems = [each for each in found if isinstance(each, str)]
    if problems and not skip_unreadable:
        raise _refusal(problems)
    kept = np.flatnonzero([isinstance(each, bytes) for each in found])
    _check_some_are_left(len(kept), len(split), problems)
    digests = _as_rows([each for each in found if isinstance(each, bytes)])
    labels = torch.from_numpy(split.labels[kept])
    return LiveFeatures(split, model, augmentation, labels, kept, digests), problems


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
        images = _Images(source, used, model)
        entry = _entry(images, cache=cache, skip_unreadable=skip_unreadable, progress=progress, log=log)
        problems += entry.problems.values()
        rows = np.full(len(source), -1, dtype=np.int64)
        rows[used[entry.readable]] = np.arange(len(entry.readable))
        entries[key] = entry, rows
    return [_of_split(split, *entries[id(split.source)], problems) for split in splits], problems


def _of_split(split: Split, entry: Entry, rows: np.ndarray, problems: Sequence[str]) -> StoredFeatures:
    own = rows[split.source_indices]
    kept = np.flatnonzero(own >= 0)
    _check_some_are_left(len(kept), len(split), problems)
    labels = torch.from_numpy(split.labels[kept])
    return StoredFeatures(entry.stem, torch.from_numpy(own[kept]), labels, kept, entry.digests[own[kept]])


def _check_some_are_left(num_kept: int, num_images: int, problems: Sequence[str]) -> None:
    if not num_kept:
        first = problems[0] if problems else "there are none"
        raise UserError(f"data: none of the {num_images} images of a split can be read; the first: {first}")


@dataclass(frozen=True, eq=False)
class _Images:
    """The images `used` of a source, and the model whose stem they go through. They are numbered from 0."""

    source: ImageSource
    used: np.ndarray
    model: AdaptedClip

    def __len__(self) -> int:
        return len(self.used)

    def key(self) -> dict[str, Any]:
        """All that their features depend on."""
        return {
            **self.model.vision.stem_key(),
            "images": self.source.fingerprint(self.used),
            "num_images": len(self.used),
        }

    def read(self, number: int) -> tuple[Tensor, bytes] | str:
        """An image's pixels as they go into the stem, and its digest; a line that says why if it can't be read."""
        index = int(self.used[number])
        try:
            return self.model.clip.preprocess(self.source.open(index)), self.source.digest(index)
        except UNREADABLE as error:
            return _unreadable(self.source.name(index), error)

    def are_unreadable(self, numbers: Iterable[int]) -> bool:
        """Whether none of these images can be read now."""
        return all(isinstance(self.read(number), str) for number in numbers)

    def computed_parts(self, start: int) -> Iterator[Part]:
        """Return what the images from `start` on come to, a batch at a time; the next one is decoded ahead."""
        size = _stem_batch_size(self.model)
        batches = [range(first, min(first + size, len(self))) for first in range(start, len(self), size)]
        pool = _pool()
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
        else:
            shape, dtype = self.model.vision.stem_shape()
            rows = torch.empty((0, *shape), dtype=dtype)
        return Part(
            stop=batch.stop,
            readable=[number for number, _, _ in good],
            rows=rows,
            digests=[digest for _, _, digest in good],
            problems={number: each for number, each in zip(batch, found, strict=True) if isinstance(each, str)},
        )


def _entry(
    images: _Images,
    *,
    cache: CacheOptions,
    skip_unreadable: bool,
    progress: Progress,
    log: Callable[[str], object],
) -> Entry:
    """The stem's outputs for images: found, or computed and kept."""
    key = images.key()
    shape, dtype = images.model.vision.stem_shape()
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
            raise _refusal(list(found.problems.values()))
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
        rest = _in_threads(images.read, range(writer.next_image, len(images)), advance)
        raise _refusal([*writer.problems.values(), *(each for each in rest if isinstance(each, str))])


def _in_threads(read: Callable[[int], T], numbers: range, advance: Callable[[int], object]) -> list[T]:
    found = []
    with _pool() as pool:
        for each in pool.map(read, numbers):
            found.append(each)
            advance(1)
    return found


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16))


def _stem_batch_size(model: AdaptedClip) -> int:
    """Return how many images go through the stem at once."""
    return max(1, min(STEM_BATCH_SIZE, STEM_BATCH_BYTES // model.vision.activation_bytes()))


def _as_rows(digests: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES)


def _unreadable(name: str, error: BaseException) -> str:
    return " ".join(f"{name}: can't be read as an image: {error}".split())


def _refusal(problems: Sequence[str]) -> UserError:
    """The error that names all images that can't be read, or very many of them."""
    named = "; ".join(problems[:MAX_NAMED]) + (
        f"; and {len(problems) - MAX_NAMED:,} more" * (len(problems) > MAX_NAMED)
    )
    number = f"{len(problems):,} images can't be read: " if len(problems) > 1 else ""
    return UserError(f"{number}{named}; set data.unreadable=skip to leave such images out")


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
