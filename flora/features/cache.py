"""A cache of stem outputs on disk: an entry is whole or not there, verified when read, computed again if damaged.

An entry is a folder named after a digest of everything that its numbers depend on. It holds `stem.bin`, the numbers row
by row, `images.bin`, a digest of each row's image, and `entry.json`, which says what they are, with a SHA-256 of each
file and of itself. What is not finished lies in a folder of its own, where the next run goes on (`unfinished.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flora.core.errors import UserError
from flora.core.files import open_regular, read_bytes
from flora.core.registry import OptionError, Options, option
from flora.data.datasets.base import DIGEST_BYTES
from flora.features.unfinished import Part, Unfinished, remove_abandoned

FORMAT = "flora-features-2"
FILES = ("stem.bin", "images.bin")
PART_BYTES = 2**26
DAMAGES = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError, OverflowError)


@dataclass(frozen=True)
class CacheOptions(Options):
    """Where image features are kept, so that the next run of the same images and backbone starts at once."""

    enabled: bool | None = option(
        "whether each image's features are computed once; none: wherever images are not augmented", None
    )
    folder: str | None = option("folder for features; none: they are computed anew in each run", "~/.cache/flora")
    views: int | None = option(
        "where training images are changed at random: random views of each that are kept; none: computed at each use",
        None,
        at_least=1,
        at_most=10_000,
    )
    storage: str = option(
        "numbers in which features are kept: as they are computed, or rounded to 16 bits, which take half the room",
        "computed",
        choices=("computed", "float16", "bfloat16"),
    )
    memory_bytes: int | None = option(
        "features larger than this stay on disk, memory-mapped; so much is kept, too, of what the frozen model makes "
        "of images that losses compare with; none: half of the free memory",
        None,
        at_least=1,
    )

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that features are rounded to; None: they stay as they are computed."""
        return {"computed": None, "float16": torch.float16, "bfloat16": torch.bfloat16}[self.storage]

    def check(self) -> None:
        if self.folder is not None and not self.folder.strip():
            raise OptionError("folder", "expected a folder, or none for no cache")


@dataclass(frozen=True, eq=False)
class Entry:
    """Stem outputs `(N, ...)`; row i belongs to image `readable[i]`, which has digest `digests[i]` (`(N, 16)` uint8).

    `problems` has a line for each image that can't be read.
    """

    stem: Tensor
    readable: np.ndarray
    digests: np.ndarray
    problems: dict[int, str]

    def parts(self, num_images: int) -> Iterator[Part]:
        """The entry of `num_images` images in parts of about `PART_BYTES`, the last of which has all problems."""
        row_bytes = max(1, int(np.prod(self.stem.shape[1:])) * self.stem.dtype.itemsize)
        size, number = max(1, PART_BYTES // row_bytes), len(self.readable)
        for start in range(0, max(number, 1), size):
            stop, is_last = start + size, start + size >= number
            yield Part(
                stop=num_images if is_last else int(self.readable[stop]),
                readable=self.readable[start:stop].tolist(),
                rows=self.stem[start:stop],
                digests=[digest.tobytes() for digest in self.digests[start:stop]],
                problems=self.problems if is_last else {},
            )


@dataclass(eq=False)
class Writer:
    """An entry in the making. Parts are appended in the order of the images; those before `next_image` are in it."""

    shape: tuple[int, ...]
    stem: Tensor | None
    """The rows, unless they are on the disk alone."""
    unfinished: Unfinished | None
    commit: Callable[[Entry], Entry]
    give_up: Callable[[OSError], object]
    next_image: int = 0
    readable: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)

    def append(self, part: Part) -> None:
        """Add what has been computed, and keep it for the next run. Raises `UserError` if it fits nowhere."""
        if self.unfinished is not None:
            try:
                self.unfinished.append(part)
            except OSError as error:
                self.give_up(error)
                self.unfinished.remove()
                self.unfinished.close()
                self.unfinished = None
        self.take(part)

    def take(self, part: Part) -> None:
        """Add a part that is on the disk, or need not be."""
        if self.stem is not None:
            self.stem[len(self.readable) : len(self.readable) + len(part.readable)] = part.rows
        self.next_image = part.stop
        self.readable += part.readable
        self.digests += part.digests
        self.problems |= part.problems

    def finish(self) -> Entry:
        """The entry, kept in the cache if there is one."""
        readable = np.asarray(self.readable, dtype=np.int64)
        digests = np.frombuffer(b"".join(self.digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
        if self.stem is not None:
            return self.commit(Entry(self.stem[: len(readable)], readable, digests, self.problems))
        assert self.unfinished is not None
        stem = _map(self.unfinished.stem_path, (len(readable), *self.shape[1:]), self.unfinished.dtype)
        return self.commit(Entry(stem, readable, digests, self.problems))


class FeatureCache:
    """The cache's folder. Trouble with it costs time, never a run, unless the features don't fit into memory."""

    def __init__(self, options: CacheOptions, log: Callable[[str], object]) -> None:
        self._log = log
        self._folder = None if options.folder is None else Path(os.path.expanduser(options.folder)) / "features"

    def read(self, key: dict[str, Any], *, in_memory: bool) -> Entry | None:
        """The entry of `key`, or None if there is none that is whole; a damaged one is taken away."""
        if self._folder is None:
            return None
        path = self._folder / _name(key)
        if not path.is_dir():
            return None
        try:
            return _read(path, key, in_memory=in_memory)
        except DAMAGES as error:
            self._log(f"cache: {path}: damaged ({' '.join(str(error).split())}): computed again")
            shutil.rmtree(path, ignore_errors=True)
            return None

    def remove(self, key: dict[str, Any]) -> None:
        """Take the entry of `key` away."""
        if self._folder is not None:
            shutil.rmtree(self._folder / _name(key), ignore_errors=True)

    @contextmanager
    def create(
        self,
        key: dict[str, Any],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        in_memory: bool,
        trust: Callable[[Iterable[int]], bool],
    ) -> Iterator[Writer]:
        """A writer for a new entry of at most `shape`, with what an earlier run that was stopped has computed of it.

        `trust` is asked whether the images that could not be read then still can't be. What is not finished this time
        stays for the next run. Raises `UserError` if the entry has to be on disk and
        can't.
        """
        if self._folder is None and not in_memory:
            raise UserError(
                f"cache.folder: features of {tuple(shape)} are larger than cache.memory_bytes (or half of the free "
                "memory) and have to be on disk; expected a folder, or a larger cache.memory_bytes"
            )

        def give_up(error: OSError) -> None:
            self._refuse(error, in_memory)

        unfinished = self._unfinished(key, shape, dtype, give_up)

        def commit(entry: Entry) -> Entry:
            if writer.unfinished is None:
                return entry
            try:
                return self._commit(writer.unfinished, key, entry, in_memory=in_memory)
            except OSError as error:
                give_up(error)
                return entry

        writer = Writer(shape, torch.empty(shape, dtype=dtype) if in_memory else None, unfinished, commit, give_up)
        try:
            for part in unfinished.parts() if unfinished is not None else ():
                if not trust(part.problems):
                    break
                writer.take(part)
            yield writer
        finally:
            if writer.unfinished is not None:
                writer.unfinished.close()

    def _unfinished(
        self, key: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, give_up: Callable[[OSError], None]
    ) -> Unfinished | None:
        """Open what an earlier run has computed of an entry, or a new one; None without a folder or after `give_up`."""
        if self._folder is None:
            return None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self._folder)
            return Unfinished.open(self._folder, _name(key), shape, dtype)
        except OSError as error:
            give_up(error)
            return None

    def _commit(self, unfinished: Unfinished, key: dict[str, Any], entry: Entry, *, in_memory: bool) -> Entry:
        """Move a finished entry to its place in one step."""
        folder = unfinished.finish()
        (folder / "images.bin").write_bytes(entry.digests.tobytes())
        description = {
            "format": FORMAT,
            "key": key,
            "shape": list(entry.stem.shape),
            "dtype": str(entry.stem.dtype).removeprefix("torch."),
            "sha256": {name: _sha256(folder / name) for name in FILES},
            "readable": entry.readable.tolist(),
            "problems": list(entry.problems.items()),
        }
        (folder / "entry.json").write_text(json.dumps({"entry": description, "sha256": _digest(description)}))
        for name in (*FILES, "entry.json"):
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        assert self._folder is not None
        path = self._folder / _name(key)
        unfinished.move(path)
        return entry if in_memory else _read(path, key, in_memory=False)

    def _refuse(self, error: OSError, in_memory: bool) -> None:
        reason = error.strerror or str(error)
        if not in_memory:
            raise UserError(f"cache.folder: {self._folder}: features don't fit into memory, and not here: {reason}")
        self._log(f"cache: {self._folder}: not used: {reason}")


def _name(key: dict[str, Any]) -> str:
    return _digest([FORMAT, key])[:32]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: dict[str, Any], *, in_memory: bool) -> Entry:
    """Read and verify an entry. Raises one of `DAMAGES` if anything is wrong with it."""
    content = json.loads(read_bytes(path / "entry.json"))
    description = content["entry"]
    if _digest(description) != content["sha256"]:
        raise ValueError("its description has changed")
    if description["format"] != FORMAT or description["key"] != key:
        raise ValueError("it belongs to something else")
    shape, dtype = tuple(description["shape"]), getattr(torch, description["dtype"])
    sizes = (int(np.prod(shape)) * dtype.itemsize, shape[0] * DIGEST_BYTES)
    if len(description["readable"]) != shape[0]:
        raise ValueError("it has not a row for each image")
    for name, size in zip(FILES, sizes, strict=True):
        if (path / name).stat().st_size != size:
            raise ValueError(f"the size of {name} is wrong")
        if _sha256(path / name) != description["sha256"][name]:
            raise ValueError(f"{name} has changed")
    stem = _map(path / "stem.bin", shape, dtype)
    digests = np.frombuffer(read_bytes(path / "images.bin"), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
    problems = {int(image): str(line) for image, line in description["problems"]}
    readable = np.asarray(description["readable"], dtype=np.int64)
    return Entry(stem.clone() if in_memory else stem, readable, digests, problems)


def _map(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The file as a tensor that the system pages in and out; writing to it leaves the file alone."""
    size = int(np.prod(shape))
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(shape)


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**22):
            digest.update(chunk)
        return digest.hexdigest()
