"""Your own images: folders of them, or a CSV file that lists them."""

from __future__ import annotations

import csv
import io
import os
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flora.core.errors import UserError
from flora.core.files import read_bytes
from flora.core.registry import option, register, suggest
from flora.core.rng import Rng
from flora.data.datasets.base import Dataset, ImageData, ImageFiles, Split, stratified_split
from flora.data.datasets.walk import SUFFIXES, Walk, subfolders


@dataclass(frozen=True)
class Example:
    """One image, its class and, where the data name one, its client."""

    path: Path
    label: str
    client: str | None = None


@dataclass(frozen=True)
class _Place:
    """A class folder and, where the layout names one, its client."""

    folder: Path
    client: str | None


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
        walk = Walk()
        try:
            parts = [part for part in self._split_folders(root) if part is not None]
            places = [self._places(part) for part in parts]
            images = iter(walk.images([place.folder for part in places for place in part]))
            examples, *test_examples = (
                self._examples(part, [(place, next(images)) for place in own], walk)
                for part, own in zip(parts, places, strict=True)
            )
        except OSError as error:
            raise UserError(f"data.root: {error.filename}: {error.strerror}") from error
        remarks = tuple(f"data.root: {line}" for line in [*walk.remarks(), *self._doubts(root, places[0], examples)])
        class_names = tuple(sorted({example.label for example in examples}))
        train = to_split(examples, class_names)
        if not test_examples:
            return ImageData(*split_at_random(train, self.test_fraction, rng), class_names, remarks=remarks)
        unknown = sorted({example.label for example in test_examples[0]}.difference(class_names))
        if unknown:
            raise UserError(f"data.root: {parts[1]}: class {unknown[0]!r} is not in {parts[0]}")
        return ImageData(train, to_split(test_examples[0], class_names), class_names, remarks=remarks)

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

    def _places(self, part: Path) -> list[_Place]:
        """The class folders of one split, by client and class."""
        groups = [(None, part)] if self.groups == "none" else [(path.name, path) for path in subfolders(part)]
        expected = "CLASS/image" if self.groups == "none" else "CLIENT/CLASS/image"
        if not groups:
            raise UserError(f"data.root: {part}: no client folders; expected {part / expected}")
        places = []
        for client, folder in groups:
            class_folders = subfolders(folder)
            if not class_folders:
                raise UserError(f"data.root: {folder}: no class folders; expected {part / expected}")
            places += [_Place(path, client) for path in class_folders]
        return places

    def _examples(self, part: Path, images: Sequence[tuple[_Place, list[Path]]], walk: Walk) -> list[Example]:
        """The images of one split, by client and class. Raises `UserError` for a client or a class without any."""
        examples = [Example(path, place.folder.name, place.client) for place, paths in images for path in paths]
        clients, classes = ({getattr(example, name) for example in examples} for name in ("client", "label"))
        for place, _ in images:
            is_link = place.folder in walk.repeated
            reason = f"{place.folder} is a link to a folder that is read elsewhere" if is_link else _known_suffixes()
            if place.client is not None and place.client not in clients:
                raise UserError(f"data.root: {place.folder.parent}: client {place.client!r} has no images ({reason})")
            if place.folder.name not in classes:
                raise UserError(f"data.root: {part}: class {place.folder.name!r} has no images ({reason})")
        return examples

    def _doubts(self, root: Path, places: Sequence[_Place], examples: Sequence[Example]) -> list[str]:
        """A warning if the class folders look like those of clients: in them are only folders, and several kinds."""
        folders = {place.folder for place in places}
        if self.groups == "folder" or any(each.path.parent in folders for each in examples):
            return []
        below = {next(path.name for path in each.path.parents if path.parent in folders) for each in examples}
        if len(below) < 2:
            return []
        classes, inner = (", ".join(sorted(names)[:3]) for names in ({folder.name for folder in folders}, below))
        return [
            f"{root}: the class folders ({classes} ...) hold no images themselves, but folders ({inner} ...); if those "
            "are the classes, and the upper ones clients, set data.groups=folder"
        ]


def _known_suffixes() -> str:
    return "looked for " + " ".join(sorted(SUFFIXES))


@dataclass(frozen=True)
class _Row:
    """A row of a CSV file: its line number and the cells that we know."""

    line: int
    example: Example
    part: str | None


# Missing files that an error names.
MAX_NAMED = 100
_PARTS = ("train", "test", "val", "valid")


@register("csv")
@dataclass(frozen=True)
class CsvFile(Dataset):
    """Images that a CSV file lists: a header, then one row for each image, in UTF-8 (or UTF-16 with a byte-order mark).

    Commas, semicolons, tabs or bars separate, whichever the header does. The columns `path` and `label` are required,
    `client` and `split` are read if they are there (in whatever case), others are ignored; images to test on need no
    client. `split` is `train` or `test`; rows marked `val` or `valid` are the test split if no row is marked `test`,
    and are left out otherwise. Without the column the split is drawn at random, each class in the same proportion.
    """

    path: str = option("CSV file with the columns path and label and, if you have them, client and split")
    root: str = option("folder that relative paths start from; empty: the CSV file's folder", "")
    test_fraction: float = option("share of the images to test on, if there is no column split", 0.2, above=0, below=1)

    def load(self, rng: Rng) -> ImageData:
        """Index the images, ordered by path whatever the order of the rows; class names are the sorted labels.

        Raises `UserError` naming the file and the line that is wrong. Each image's file must be there, unless
        unreadable images are left out.
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
        text = self._text()
        header = next((line for line in text.splitlines() if line.strip()), "")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=_delimiter(header))
        try:
            for row in reader:
                cells = [cell.strip() for cell in row]
                if any(cells):
                    lines.append((reader.line_num, cells))
        except csv.Error as error:
            raise self._error(str(error), reader.line_num) from error
        return lines

    def _text(self) -> str:
        try:
            content = read_bytes(os.path.expanduser(self.path))
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error
        try:
            return content.decode("utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise self._error("expected text in UTF-8") from error

    def _rows(self) -> list[_Row]:
        """The rows in the order of the file. Raises `UserError` at the first one that is wrong."""
        lines = self._lines()
        if not lines:
            raise self._error("the file is empty; expected a header with path, label[, client][, split]")
        header = [name.casefold() for name in lines[0][1]]
        for name in ("path", "label", "client", "split"):
            if header.count(name) != 1 and (name in ("path", "label") or name in header):
                problem = f"the column {name!r} is there twice" if name in header else f"no column {name!r}"
                raise self._error(f"{problem}; found {', '.join(lines[0][1])}", lines[0][0])
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
        missing = [row for row in rows if self.unreadable == "error" and not row.example.path.is_file()]
        if len(missing) == 1:
            raise self._error(f"no such image file: {str(missing[0].example.path)!r}", missing[0].line)
        if missing:
            named = ", ".join(f"{str(row.example.path)!r} (line {row.line})" for row in missing[:MAX_NAMED])
            more = f" and {len(missing) - MAX_NAMED:,} more" * (len(missing) > MAX_NAMED)
            raise self._error(f"{len(missing):,} image files are not there: {named}{more}; or set data.unreadable=skip")
        return rows

    def _row(self, line: int, header: list[str], cells: list[str], root: Path) -> _Row:
        if len(cells) > len(header):
            raise self._error(f"{len(cells)} cells, but the header has {len(header)} columns", line)
        row = dict(zip(header, cells + [""] * (len(header) - len(cells)), strict=True))
        part = row.get("split")
        needed = ("path", "label", "split") if part not in (None, "", "train") else ("path", "label", "client", "split")
        for name in needed:
            if row.get(name) == "":
                raise self._error(f"nothing in the column {name!r}", line)
        if part is not None and part not in _PARTS:
            raise self._error(f"unknown split {part!r}; {suggest(part, _PARTS)}", line)
        path = Path(os.path.normpath(root / row["path"]))
        return _Row(line, Example(path, row["label"], row.get("client") or None), part)


def _class_names(rows: Iterable[_Row]) -> tuple[str, ...]:
    return tuple(sorted({row.example.label for row in rows}))


def _delimiter(header: str) -> str:
    """Return what separates the columns `path` and `label` in a header; a comma if nothing does."""
    for delimiter in ",;\t|":
        names = [name.strip().casefold() for name in next(csv.reader([header], delimiter=delimiter), [])]
        if "path" in names and "label" in names:
            return delimiter
    return ","
