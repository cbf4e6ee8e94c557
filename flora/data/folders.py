"""Your own images: folders of them, or a CSV file that lists them."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flora.data.datasets import Dataset, ImageData, ImageFiles, Split, stratified_split
from flora.errors import UserError
from flora.registry import option, register, suggest
from flora.rng import Rng

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True)
class Example:
    """One image, its class and, where the data name one, its client."""

    path: Path
    label: str
    client: str | None = None


def subfolders(folder: Path) -> list[Path]:
    """The folders in `folder` that are not hidden, sorted by name."""
    return sorted((path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")), key=str)


def image_paths(folder: Path) -> list[Path]:
    """All images anywhere below `folder`, sorted by path, without hidden files and folders.

    Links are followed. Raises OSError where a folder can't be read.
    """

    def stop(error: OSError) -> None:
        raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(Path(parent, name))]
        paths = (Path(parent, name) for name in files if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in SUFFIXES]
    return sorted(found, key=Path.as_posix)


def _leads_back(path: Path) -> bool:
    """Whether this is a link to a folder that it lies in itself: following it would never end."""
    return path.is_symlink() and path.resolve() in path.parent.resolve().joinpath("-").parents


def to_split(examples: Sequence[Example], class_names: Sequence[str]) -> Split:
    """The examples in their order; it has `groups` if every example has a client."""
    index = {name: label for label, name in enumerate(class_names)}
    labels = np.array([index[example.label] for example in examples], dtype=np.int64)
    clients = [example.client for example in examples if example.client is not None]
    groups = np.array(clients) if clients and len(clients) == len(examples) else None
    return Split(ImageFiles([example.path for example in examples]), np.arange(len(examples)), labels, groups)


def split_at_random(whole: Split, test_fraction: float, rng: Rng) -> tuple[Split, Split]:
    """A train and a test part of `whole`, stratified by class.

    Raises `UserError` if one of them would be empty.
    """
    train, test = stratified_split(whole.labels, test_fraction, rng)
    for part, indices in (("train", train), ("test", test)):
        if not len(indices):
            raise UserError(f"data.test_fraction: {test_fraction} of {len(whole)} images leaves the {part} split empty")
    return whole.subset(train), whole.subset(test)


@register("image_folder")
@dataclass(frozen=True)
class ImageFolder(Dataset):
    """Images in one folder for each class: `root/CLASS/.../image`; the folders' names are the class names.

    If `root` holds a folder `train` and a folder `test`, these have the class folders and are the splits. Without
    `test`, `val` or `valid` takes its place (beside a `test` they are not read). Otherwise the split is drawn at
    random, each class in the same proportion. With `groups: folder` the class folders of one client lie in one folder,
    named after the client: `root/CLIENT/CLASS/.../image` or `root/train/CLIENT/CLASS/.../image`.
    """

    root: str = option("folder that holds the class folders, or train/ and test/ with class folders in each")
    test_fraction: float = option("share of the images to test on, if the data have no split", 0.2, above=0, below=1)
    groups: str = option("what names the client: nothing, or a level of folders", "none", choices=("none", "folder"))

    def load(self, rng: Rng) -> ImageData:
        """Index the images; their order is that of client, class and path.

        Raises `UserError` naming the folder that is missing, or the client or the class that has no images.
        """
        root = Path(os.path.expanduser(self.root))
        if not root.is_dir():
            raise UserError(f"data.root: {self.root}: no such folder; expected {self._layout(root)}")
        try:
            train_folder, test_folder = self._split_folders(root)
            examples = self._examples(train_folder)
            test_examples = [] if test_folder is None else self._examples(test_folder)
        except OSError as error:
            raise UserError(f"data.root: {error.filename}: {error.strerror}") from error
        class_names = tuple(sorted({example.label for example in examples}))
        unknown = sorted({example.label for example in test_examples}.difference(class_names))
        if unknown:
            raise UserError(f"data.root: {test_folder}: class {unknown[0]!r} is not in {train_folder}")
        train = to_split(examples, class_names)
        if test_folder is None:
            return ImageData(*split_at_random(train, self.test_fraction, rng), class_names)
        return ImageData(train, to_split(test_examples, class_names), class_names)

    def _layout(self, folder: Path) -> str:
        below = "CLASS/image" if self.groups == "none" else "CLIENT/CLASS/image"
        return f"{folder / below}, or {folder / 'train' / below} and {folder / 'test' / below}"

    def _split_folders(self, root: Path) -> tuple[Path, Path | None]:
        """The folder to train on and, if the data have a split, the one to test on."""
        names = [folder.name for folder in subfolders(root)]
        tests = [name for name in ("test", "val", "valid") if name in names]
        if "train" in names and tests:
            return root / "train", root / tests[0]
        if names == ["train"]:
            raise UserError(f"data.root: {root}: there is a folder train, but none called test, val or valid")
        return root, None

    def _examples(self, part: Path) -> list[Example]:
        """The images of one split, by client and class."""
        groups = [(None, part)] if self.groups == "none" else [(path.name, path) for path in subfolders(part)]
        expected = "CLASS/image" if self.groups == "none" else "CLIENT/CLASS/image"
        if not groups:
            raise UserError(f"data.root: {part}: no client folders; expected {part / expected}")
        examples: list[Example] = []
        classes: set[str] = set()
        for client, folder in groups:
            class_folders = subfolders(folder)
            if not class_folders:
                raise UserError(f"data.root: {folder}: no class folders; expected {part / expected}")
            classes.update(path.name for path in class_folders)
            found = [Example(path, place.name, client) for place in class_folders for path in image_paths(place)]
            if client is not None and not found:
                raise UserError(f"data.root: {folder}: client {client!r} has no images ({_known_suffixes()})")
            examples += found
        empty = sorted(classes.difference(example.label for example in examples))
        if empty:
            raise UserError(f"data.root: {part}: class {empty[0]!r} has no images ({_known_suffixes()})")
        return examples


def _known_suffixes() -> str:
    return "looked for " + " ".join(sorted(SUFFIXES))


@dataclass(frozen=True)
class _Row:
    """A row of a CSV file: its line number and the cells that we know."""

    line: int
    example: Example
    part: str | None


_PARTS = ("train", "test", "val", "valid")


@register("csv")
@dataclass(frozen=True)
class CsvFile(Dataset):
    """Images that a CSV file lists: a header, then one row for each image, comma-separated, in UTF-8.

    The columns `path` and `label` are required, `client` and `split` are read if they are there, others are ignored.
    `split` is `train` or `test`; rows marked `val` or `valid` are the test split if no row is marked `test`, and
    are left out otherwise. Without the column the split is drawn at random, each class in the same proportion.
    """

    path: str = option("CSV file with the columns path and label and, if you have them, client and split")
    root: str = option("folder that relative paths start from; empty: the CSV file's folder", "")
    test_fraction: float = option("share of the images to test on, if there is no column split", 0.2, above=0, below=1)

    def load(self, rng: Rng) -> ImageData:
        """Index the images, ordered by path whatever the order of the rows; class names are the sorted labels.

        Raises `UserError` naming the file and the line that is wrong. Each image's file must be there.
        """
        rows = sorted(self._rows(), key=lambda row: row.example.path.as_posix())
        parts = {row.part for row in rows}
        if parts == {None}:
            class_names = _class_names(rows)
            whole = to_split([row.example for row in rows], class_names)
            return ImageData(*split_at_random(whole, self.test_fraction, rng), class_names)
        train = [row for row in rows if row.part == "train"]
        test = [row for row in rows if row.part == "test" or (row.part in ("val", "valid") and "test" not in parts)]
        if not train or not test:
            raise self._error(f"no row is marked {'test, val or valid' if train else 'train'} in the column 'split'")
        class_names = _class_names(train)
        for row in sorted(test, key=lambda row: row.line):
            if row.example.label not in class_names:
                raise self._error(f"label {row.example.label!r} is not in the train split", row.line)
        train_split, test_split = (to_split([row.example for row in part], class_names) for part in (train, test))
        return ImageData(train_split, test_split, class_names)

    def _error(self, message: str, line: int | None = None) -> UserError:
        place = "" if line is None else f" line {line}"
        return UserError(f"data.path: {self.path}{place}: {message}")

    def _lines(self) -> list[tuple[int, list[str]]]:
        """The rows that are not blank, as line numbers and stripped cells; the first is the header."""
        lines = []
        try:
            with open(os.path.expanduser(self.path), encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, strict=True)
                try:
                    for row in reader:
                        cells = [cell.strip() for cell in row]
                        if any(cells):
                            lines.append((reader.line_num, cells))
                except csv.Error as error:
                    raise self._error(str(error), reader.line_num) from error
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error
        except UnicodeDecodeError as error:
            raise self._error("expected text in UTF-8") from error
        return lines

    def _rows(self) -> list[_Row]:
        """The rows in the order of the file. Raises `UserError` at the first one that is wrong."""
        lines = self._lines()
        if not lines:
            raise self._error("the file is empty; expected a header with path, label[, client][, split]")
        header = lines[0][1]
        for name in ("path", "label", "client", "split"):
            if header.count(name) != 1 and (name in ("path", "label") or name in header):
                problem = f"the column {name!r} is there twice" if name in header else f"no column {name!r}"
                raise self._error(f"{problem}; found {', '.join(header)}", lines[0][0])
        if len(lines) == 1:
            raise self._error("no rows below the header")
        root = Path(os.path.expanduser(self.root or Path(self.path).parent))
        if not root.is_dir():
            raise UserError(f"data.root: {root}: no such folder; expected the one that paths in {self.path} start from")
        rows: list[_Row] = []
        seen: dict[Path, int] = {}
        for line, cells in lines[1:]:
            row = self._row(line, header, cells, root)
            first = seen.setdefault(row.example.path, line)
            if first != line:
                raise self._error(f"{str(row.example.path)!r} is listed in line {first} already", line)
            rows.append(row)
        return rows

    def _row(self, line: int, header: list[str], cells: list[str], root: Path) -> _Row:
        if len(cells) > len(header):
            raise self._error(f"{len(cells)} cells, but the header has {len(header)} columns", line)
        row = dict(zip(header, cells + [""] * (len(header) - len(cells)), strict=True))
        for name in ("path", "label", "client", "split"):
            if row.get(name) == "":
                raise self._error(f"nothing in the column {name!r}", line)
        part = row.get("split")
        if part is not None and part not in _PARTS:
            raise self._error(f"unknown split {part!r}; {suggest(part, _PARTS)}", line)
        path = Path(os.path.normpath(root / row["path"]))
        if not path.is_file():
            raise self._error(f"no such image file: {str(path)!r}", line)
        return _Row(line, Example(path, row["label"], row.get("client")), part)


def _class_names(rows: Iterable[_Row]) -> tuple[str, ...]:
    return tuple(sorted({row.example.label for row in rows}))
