"""Features that a run was computing when it stopped: kept in parts, each with a digest, for the next run to go on.

`unfinished-NAME/` holds `stem.bin`, rows in the order in which they were computed, and `parts.jsonl`, a line for each
batch of images: how many images are done with it, which of them could be read, and the digests of rows and line.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from flora.core.files import read_bytes
from flora.core.processes import Message
from flora.data.datasets.base import DIGEST_BYTES

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ABANDONED_SECONDS = 7 * 24 * 3600


@dataclass(frozen=True, eq=False)
class Part:
    """What a batch of images came to: images up to `stop` are done with it.

    `rows` `(n, ...)` are the stem outputs of the images `readable`, which have `digests`; `problems` has a line for
    each of the others.
    """

    stop: int
    readable: list[int]
    rows: Tensor
    digests: list[bytes]
    problems: dict[int, str]

    def to_message(self) -> Message:
        """The part as other processes get it."""
        fields = [self.stop, self.readable, b"".join(self.digests).hex(), list(self.problems.items())]
        return Message(fields, {"rows": self.rows})

    @classmethod
    def from_message(cls, message: Message) -> Part:
        """The inverse of `to_message`."""
        stop, readable, digests, problems = message.fields
        return cls(stop, readable, message.tensors["rows"], _split_digests(bytes.fromhex(digests)), dict(problems))


class Unfinished:
    """The folder of an entry in the making, locked against other processes until it is closed."""

    def __init__(self, folder: Path, lock: IO[bytes] | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.folder, self._lock, self._row_shape, self.dtype = folder, lock, shape[1:], dtype
        self._is_gone = False
        self.stem_path, self._parts_path = folder / "stem.bin", folder / "parts.jsonl"
        self._num_rows, self._parts_bytes = 0, 0
        self.stem_path.touch()
        self._stem = self.stem_path.open("r+b")
        try:
            # Now rather than after hours of computing.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._stem.fileno(), 0, max(1, shape[0] * self._row_bytes))
        except OSError:
            self.remove()
            raise

    @classmethod
    def open(cls, parent: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Unfinished:
        """The unfinished entry called `name`, or a new one, also where another process is computing the same.

        Raises OSError if there is no room for it.
        """
        folder = parent / f"unfinished-{name}"
        lock = _lock(folder)
        if lock is None:  # nobody will go on with this one
            folder = Path(tempfile.mkdtemp(prefix="unfinished-", dir=parent))
        return cls(folder, lock, shape, dtype)

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self._row_shape)) * self.dtype.itemsize

    def parts(self) -> Iterator[Part]:
        """Return what is there already, up to the first part that is damaged.

        A part after which no other is asked for counts as not there. What is appended takes the place of the rest.
        """
        with suppress(OSError):
            for line in read_bytes(self._parts_path).splitlines(keepends=True):
                part = self._part(line)
                if part is None:
                    break
                yield part
                self._num_rows += len(part.readable)
                self._parts_bytes += len(line)

    def append(self, part: Part) -> None:
        """Keep a part. Raises OSError if it can't be written."""
        rows = part.rows.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        described = {
            "stop": part.stop,
            "readable": part.readable,
            "digests": b"".join(part.digests).hex(),
            "problems": list(part.problems.items()),
            "rows_sha256": hashlib.sha256(rows).hexdigest(),
        }
        self._stem.seek(self._num_rows * self._row_bytes)
        self._stem.write(rows)
        self._stem.flush()
        line = json.dumps({"part": described, "sha256": _digest(described)}).encode() + b"\n"
        self._parts_path.touch()
        with self._parts_path.open("r+b") as file:
            file.seek(self._parts_bytes)
            file.truncate()
            file.write(line)
        self._num_rows += len(part.readable)
        self._parts_bytes += len(line)

    def finish(self) -> Path:
        """Leave nothing of the parts but the rows; return the folder, which is to be moved next."""
        self._stem.truncate(self._num_rows * self._row_bytes)
        self._parts_path.unlink(missing_ok=True)
        return self.folder

    def move(self, path: Path) -> None:
        """Rename the folder to `path`, or take it away if another process was faster."""
        if path.exists():
            self.remove()
            return
        # The lock goes with it: another process that waits for it would else take the folder for its own.
        self.folder.rename(path)
        self._is_gone = True
        (path / "lock").unlink(missing_ok=True)

    def close(self) -> None:
        """Let others go on here; take the folder away if they can't, or if it has no part yet."""
        if self._lock is None or not self._parts_bytes or not self._parts_path.exists():
            self.remove()
        self._stem.close()
        if self._lock is not None:
            self._lock.close()

    def remove(self) -> None:
        """Take the folder away, unless it is another's by now."""
        if not self._is_gone:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._is_gone = True

    def _part(self, line: bytes) -> Part | None:
        """The part that a line describes; None if it, or its rows, are not as they were written."""
        try:
            content = json.loads(line)
            part: dict[str, Any] = content["part"]
            if _digest(part) != content["sha256"]:
                return None
            readable, digests = part["readable"], bytes.fromhex(part["digests"])
            self._stem.seek(self._num_rows * self._row_bytes)
            rows = self._stem.read(len(readable) * self._row_bytes)
            if hashlib.sha256(rows).hexdigest() != part["rows_sha256"]:
                return None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return Part(
            stop=part["stop"],
            readable=readable,
            rows=torch.frombuffer(bytearray(rows) or bytearray(8), dtype=self.dtype)[
                : len(rows) // self.dtype.itemsize
            ].view(len(readable), *self._row_shape),
            digests=_split_digests(digests),
            problems={int(image): str(line) for image, line in part["problems"]},
        )


def _split_digests(digests: bytes) -> list[bytes]:
    return [digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)]


def remove_abandoned(parent: Path) -> None:
    """Take away unfinished entries that nobody has gone on with for a week."""
    for folder in parent.glob("unfinished-*"):
        with suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> IO[bytes] | None:
    """The open lock file of a folder, which is made; None if another process has it, or there are no locks here."""
    if fcntl is None:
        return None
    folder.mkdir(exist_ok=True)
    path = folder / "lock"
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it may have moved the folder away between our opening and locking it.
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except OSError:
        pass
    file.close()
    return None


def _digest(part: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()
