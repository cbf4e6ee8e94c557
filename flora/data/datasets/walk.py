"""Images anywhere below folders: every folder on the disk is read once, however many links lead to it."""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
# Images that are not read, and that nobody should miss without knowing.
OTHER_SUFFIXES = frozenset(
    {".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".raw", ".psd", ".svg"}
)
# What systems and archivers put beside data. Hidden files and folders are left out, too.
NOT_DATA = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"})


def subfolders(folder: Path) -> list[Path]:
    """The folders in `folder`, sorted by name, without hidden ones and those of systems and archivers."""
    return sorted((path for path in folder.iterdir() if path.is_dir() and _is_data(path.name)), key=str)


def image_paths(folder: Path) -> list[Path]:
    """All images anywhere below `folder`, as `Walk` finds them."""
    return Walk().images([folder])[0]


class Walk:
    """Finds images, and keeps what it left out: links to folders that are read elsewhere, and files of other types."""

    def __init__(self) -> None:
        self.repeated: list[Path] = []
        self.irregular: list[Path] = []
        self.other_types: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._above: set[str] = set()

    def images(self, folders: Sequence[Path]) -> list[list[Path]]:
        """The images anywhere below each of the folders, sorted by path.

        Links are followed, but not to a folder that has a place of its own below one of `folders`, or holds one of
        them. Raises OSError where a folder can't be read.
        """
        by_folder: list[list[Path]] = [[] for _ in folders]
        links: deque[tuple[int, Path]] = deque()
        for folder in folders:
            self._above.update(map(str, Path(os.path.realpath(folder)).parents))
        # Folders in their own place come before links to them.
        for number in sorted(range(len(folders)), key=lambda number: folders[number].is_symlink()):
            links.append((number, folders[number]))
        while links:
            number, folder = links.popleft()
            real = os.path.realpath(folder)
            if real in self._seen or real in self._above:
                self.repeated.append(folder)
            else:
                links.extend((number, link) for link in self._walk(folder, real, by_folder[number]))
        return [sorted(paths, key=Path.as_posix) for paths in by_folder]

    def remarks(self) -> list[str]:
        """Return what was left out, a line each."""
        lines = []
        if self.repeated:
            lines.append(f"{len(self.repeated):,} links to folders that are read elsewhere{_first(self.repeated)}")
        if self.irregular:
            lines.append(f"{len(self.irregular):,} pipes or devices{_first(self.irregular)}")
        if self.other_types:
            types = ", ".join(f"{number:,} {suffix}" for suffix, number in sorted(self.other_types.items()))
            lines.append(f"images of types that are not read: {types}; convert them to JPEG or PNG")
        return [f"left out: {line}" for line in lines]

    def _walk(self, folder: Path, real: str, images: list[Path]) -> list[Path]:
        """Add the images below `folder`, whose real path is `real`; return the links to folders, sorted."""
        links, stack = [], [(folder, real)]
        while stack:
            place, real = stack.pop()
            if real in self._seen:
                continue
            self._seen.add(real)
            with os.scandir(place) as entries:
                for entry in entries:
                    if not _is_data(entry.name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        stack.append((place / entry.name, os.path.join(real, entry.name)))
                    elif _is_dir(entry):
                        links.append(place / entry.name)
                    else:
                        self._add(entry, place, images)
        return sorted(links, key=Path.as_posix)

    def _add(self, entry: os.DirEntry[str], place: Path, images: list[Path]) -> None:
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in OTHER_SUFFIXES:
            self.other_types[suffix] += 1
        elif suffix in SUFFIXES:
            (images if _may_be_regular(entry) else self.irregular).append(place / entry.name)


def _is_data(name: str) -> bool:
    return not name.startswith(".") and name.casefold() not in NOT_DATA


def _is_dir(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def _may_be_regular(entry: os.DirEntry[str]) -> bool:
    """Whether this is a regular file or a link to one. A link to nothing is: whoever opens it will say so."""
    if not entry.is_symlink():
        return entry.is_file(follow_symlinks=False)
    with suppress(OSError):
        return stat.S_ISREG(entry.stat().st_mode)
    return True


def _first(paths: Sequence[Path]) -> str:
    return f" (the first is {min(paths, key=Path.as_posix)})"
