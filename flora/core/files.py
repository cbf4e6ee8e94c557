"""Files read and written: regular ones alone, since a pipe in their place would never end, and whole or not at all."""

from __future__ import annotations

import errno
import itertools
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read bytes. Raises OSError if it can't be read, or is a folder, a pipe, a socket or a device."""
    # Without O_NONBLOCK opening a pipe waits for its writer; regular files don't know it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def refuse_irregular(path: str | Path) -> None:
    """Raise OSError if `path` is there and is no regular file: writing to a pipe waits for its reader."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file. Raises OSError as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | Path) -> str:
    """The content of a regular file in UTF-8. Raises OSError as `open_regular` does, and UnicodeDecodeError."""
    return read_bytes(path).decode()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name, flush it to the disk, and rename it: under its own it is never half-written.

    Raises OSError if that can't be done; what was there before then still is.
    """
    part = path.with_name(f"{path.name}.part")
    refuse_irregular(part)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def free_name(folder: Path, name: str) -> Path:
    """The first path in `folder` that nothing has: `name`, then with -2, -3, ... before its suffix."""
    first = folder / name
    numbered = (folder / f"{first.stem}-{number}{first.suffix}" for number in itertools.count(2))
    return next(path for path in itertools.chain([first], numbered) if not os.path.lexists(path))
