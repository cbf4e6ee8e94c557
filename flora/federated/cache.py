"""A cache of stem outputs on disk: written whole or not at all, checked when read, computed again if damaged.

An entry is a folder named after a digest of everything that its numbers depend on. It holds `stem.bin`, the numbers row
by row, and `entry.json`, which says what they are and holds their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flora.errors import UserError
from flora.registry import OptionError, Options, option

FORMAT = "flora-features-1"
ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class CacheOptions(Options):
    """Where image features are kept, so that the next run of the same images and backbone starts at once."""

    enabled: bool | None = option(
        "whether each image's features are computed once; none: wherever images are not augmented", None
    )
    folder: str | None = option("folder for features; none: they are computed anew in each run", "~/.cache/flora")
    memory_bytes: int | None = option(
        "features larger than this stay on disk, memory-mapped; none: half of the free memory", None, at_least=1
    )

    def check(self) -> None:
        if self.folder is not None and not self.folder.strip():
            raise OptionError("folder", "expected a folder, or none for no cache")


@dataclass(frozen=True, eq=False)
class Entry:
    """Stem outputs `(N, ...)`; row i belongs to image `readable[i]`; and a line for each image that can't be read."""

    stem: Tensor
    readable: np.ndarray
    problems: list[str]


@dataclass(eq=False)
class Writer:
    """An entry in the making: rows are appended in any order of images."""

    stem: Tensor
    commit: Callable[[Entry], Entry]
    readable: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def append(self, images: Sequence[int], rows: Tensor) -> None:
        """Add the stem outputs of `images`."""
        self.stem[len(self.readable) : len(self.readable) + len(images)] = rows
        self.readable += images

    def finish(self) -> Entry:
        """The entry, kept in the cache unless an image could not be read: that may be mended by the next run."""
        readable = np.asarray(self.readable, dtype=np.int64)
        entry = Entry(self.stem[: len(readable)], readable, self.problems)
        return entry if self.problems else self.commit(entry)


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
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            self._log(f"cache: {path}: damaged ({' '.join(str(error).split())}): computed again")
            shutil.rmtree(path, ignore_errors=True)
            return None

    @contextmanager
    def create(
        self, key: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, *, in_memory: bool
    ) -> Iterator[Writer]:
        """A writer for a new entry of at most `shape`; nothing is left behind if it is not finished.

        Raises `UserError` if the entry has to be on disk and can't.
        """
        if self._folder is None and not in_memory:
            raise UserError(
                f"cache.folder: features of {tuple(shape)} are larger than cache.memory_bytes (or half of the free "
                "memory) and have to be on disk; expected a folder, or a larger cache.memory_bytes"
            )
        part = None
        try:
            part = self._start(shape, dtype)
        except OSError as error:
            self._refuse(error, in_memory)
        try:
            if in_memory or part is None:
                stem = torch.empty(shape, dtype=dtype)
            else:
                stem = _map(part / "stem.bin", shape, dtype, create=True)

            def commit(entry: Entry) -> Entry:
                if part is None:
                    return entry
                try:
                    return self._commit(part, key, entry, in_memory=in_memory)
                except OSError as error:
                    self._refuse(error, in_memory)
                    return entry

            yield Writer(stem, commit)
        finally:
            if part is not None:
                shutil.rmtree(part, ignore_errors=True)

    def _start(self, shape: tuple[int, ...], dtype: torch.dtype) -> Path | None:
        """A new folder for an unfinished entry; None without a cache. Raises OSError if there is no room for it."""
        if self._folder is None:
            return None
        self._folder.mkdir(parents=True, exist_ok=True)
        for abandoned in self._folder.glob("part-*"):  # by a process that was killed
            if time.time() - abandoned.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(abandoned, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix="part-", dir=self._folder))
        try:
            with (part / "stem.bin").open("wb") as file:
                # Now rather than when the mapped file is written to, where a full disk would end the process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, max(1, int(np.prod(shape)) * dtype.itemsize))
        except OSError:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return part

    def _commit(self, part: Path, key: dict[str, Any], entry: Entry, *, in_memory: bool) -> Entry:
        """Move a finished entry to its place in one step."""
        if in_memory:
            entry.stem.flatten().view(torch.uint8).numpy().tofile(part / "stem.bin")
        else:
            os.truncate(part / "stem.bin", entry.stem.numel() * entry.stem.dtype.itemsize)
        description = {
            "format": FORMAT,
            "key": key,
            "shape": list(entry.stem.shape),
            "dtype": str(entry.stem.dtype).removeprefix("torch."),
            "sha256": _sha256(part / "stem.bin"),
            "readable": entry.readable.tolist(),
            "problems": entry.problems,
        }
        (part / "entry.json").write_text(json.dumps(description))
        for name in ("stem.bin", "entry.json"):
            with (part / name).open("rb") as file:
                os.fsync(file.fileno())
        assert self._folder is not None
        path = self._folder / _name(key)
        if path.exists():  # another process was faster
            return entry if in_memory else _read(path, key, in_memory=False)
        part.rename(path)
        return entry if in_memory else _read(path, key, in_memory=False)

    def _refuse(self, error: OSError, in_memory: bool) -> None:
        reason = error.strerror or str(error)
        if not in_memory:
            raise UserError(f"cache.folder: {self._folder}: features don't fit into memory, and not here: {reason}")
        self._log(f"cache: {self._folder}: not used: {reason}")


def _name(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([FORMAT, key], sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path, key: dict[str, Any], *, in_memory: bool) -> Entry:
    """Read and check an entry. Raises OSError, ValueError, KeyError or TypeError if anything is wrong with it."""
    description = json.loads((path / "entry.json").read_text())
    if description["format"] != FORMAT or description["key"] != key:
        raise ValueError("it belongs to something else")
    shape, dtype = tuple(description["shape"]), getattr(torch, description["dtype"])
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    if (path / "stem.bin").stat().st_size != num_bytes or len(description["readable"]) != shape[0]:
        raise ValueError("its size is wrong")
    if _sha256(path / "stem.bin") != description["sha256"]:
        raise ValueError("its numbers have changed")
    stem = _map(path / "stem.bin", shape, dtype, create=False)
    readable = np.asarray(description["readable"], dtype=np.int64)
    return Entry(stem.clone() if in_memory else stem, readable, [str(line) for line in description["problems"]])


def _map(path: Path, shape: tuple[int, ...], dtype: torch.dtype, *, create: bool) -> Tensor:
    """The file as a tensor that the system pages in and out; without `create`, writing to it leaves the file alone."""
    size = int(np.prod(shape))
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(path), shared=create, size=size, dtype=dtype).view(shape)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**22):
            digest.update(chunk)
        return digest.hexdigest()
