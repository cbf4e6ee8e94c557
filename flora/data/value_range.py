"""Images of more than 8 bits: one range of values for a whole data set, and how it makes 8 bits of them.

Scaling each file by its own range would make the same scene another picture in each of them.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flora.core.errors import UserError
from flora.core.files import open_regular
from flora.core.progress import Progress
from flora.data.datasets.base import ImageArrays, ImageData, ImageFiles, ImageSource, Split

# What Pillow raises for a file that it can't decode, or that would be absurdly large once decoded.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
# Pillow has these formats in more than 8 bits. Elsewhere such an image is refused when it is read.
DEEP_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".pgm", ".ppm"})
# Values that programs write where nothing was measured. They count as such only far from all other values.
FILL_VALUES = (-9999.0, -32767.0, -32768.0, -99999.0)
# No picture has values beyond this, but fill values of floating-point formats lie there.
LARGEST = 1e30
# TIFF tags: TIFF 6.0, pages 37 to 39 and 80; GDAL_NODATA from the GeoTIFF driver of GDAL.
BITS, FORMAT, NO_DATA = 258, 339, 42113
RANGE_TAGS = ((340, 341), (280, 281))


@dataclass(frozen=True)
class ValueRange:
    """Values from `low` (black) to `high` (white); `no_data` and what is not finite become black, too."""

    low: float
    high: float
    no_data: tuple[float, ...] = ()

    @property
    def limits(self) -> tuple[float, float]:
        """`(low, high)`."""
        return self.low, self.high

    def __str__(self) -> str:
        return f"[{self.low:.10g}, {self.high:.10g}]"

    def to_8_bits(self, image: Image.Image) -> Image.Image:
        """A copy of an image of more than 8 bits in 256 greys, upright; values beyond the range are clipped to it."""
        values = np.asarray(ImageOps.exif_transpose(image), dtype=np.float64)
        values = np.where(_is_data(values, self.no_data), values, self.low).clip(self.low, self.high)
        scale = 255 / (self.high - self.low) if self.high > self.low else 0.0
        return Image.fromarray(np.rint((values - self.low) * scale).astype(np.uint8))


@dataclass(frozen=True, eq=False)
class EightBitSource:
    """The images of another source, those of more than 8 bits scaled by one range for all."""

    source: ImageSource
    value_range: ValueRange

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def open(self, index: int) -> Image.Image:
        image = self.source.open(index)
        return self.value_range.to_8_bits(image) if is_deep(image) else image

    def fingerprint(self, indices: np.ndarray) -> str:
        """Of the images and of the range."""
        return self._with_range(self.source.fingerprint(indices))

    def contents(self, indices: np.ndarray) -> str:
        """Of the images and of the range."""
        return self._with_range(self.source.contents(indices))

    def digest(self, index: int) -> bytes:
        """Of the image alone."""
        return self.source.digest(index)

    def _with_range(self, digest: str) -> str:
        return hashlib.sha256(repr((digest, self.value_range)).encode()).hexdigest()


@dataclass(frozen=True)
class Depth:
    """What a file says of its values, before they are read.

    `type_range`: what its type can hold, if it is of integers; `tagged`: the range that it says it has.
    """

    is_colour: bool
    type_range: tuple[float, float] | None = None
    tagged: tuple[float, float] | None = None
    no_data: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Values:
    """The smallest and largest value of one image (None: it has no data), and the fill values in it."""

    depth: Depth
    extent: tuple[float, float] | None
    fill_values: tuple[float, ...]


def is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits a value: Pillow's modes I, I;16... and F."""
    return image.mode[0] in "IF"


def depth_of(image: Image.Image) -> Depth | None:
    """Return what an opened file says of its values; None if they have 8 bits. Pixels are not decoded."""
    tags = getattr(image, "tag_v2", None) or {}
    if not is_deep(image):
        bits = tags.get(BITS, (8,))
        is_deep_png = image.format == "PNG" and ";16" in str(getattr(image, "tile", ""))
        return Depth(is_colour=True) if is_deep_png or (isinstance(bits, tuple) and max(bits) > 8) else None
    type_range: tuple[float, float] | None = (0.0, 65535.0)
    if image.mode == "F":
        type_range = None
    elif image.mode == "I" and image.format == "TIFF":
        half = 2.0 ** (int(tags.get(BITS, (32,))[0]) - 1)
        type_range = (-half, half - 1)
    tagged = type_range if image.format == "PPM" else _tagged_range(tags, type_range)
    return Depth(is_colour=False, type_range=type_range, tagged=tagged, no_data=_tagged_no_data(tags))


def with_one_range(
    data: ImageData,
    given: Sequence[float] | None,
    *,
    whole: ImageData,
    progress: Progress,
    log: Callable[[str], object],
) -> tuple[ImageData, ValueRange | None]:
    """The data with images of more than 8 bits scaled by one range, and that range; unchanged if there are none.

    The range is `given`, or what the files' tags say, or that of all values of the `whole` data set, of which `data`
    may be a part. Raises `UserError` if integers and floating-point numbers would have to share one that nobody gave.
    """
    value_range = _find(_sources(whole), given, progress=progress, log=log)
    if value_range is None:
        return data, None
    wrapped: dict[int, EightBitSource] = {}

    def scaled(split: Split) -> Split:
        source = wrapped.setdefault(id(split.source), EightBitSource(split.source, value_range))
        return replace(split, source=source)

    new = None if data.new is None else scaled(data.new)
    return replace(data, train=scaled(data.train), test=scaled(data.test), new=new), value_range


def _sources(data: ImageData) -> list[tuple[ImageSource, np.ndarray]]:
    """Each source of the data with the indices that are used of it."""
    splits = [data.train, data.test] + ([data.new] if data.new is not None else [])
    by_id = {id(split.source): split.source for split in splits}
    return [
        (source, np.unique(np.concatenate([split.source_indices for split in splits if id(split.source) == key])))
        for key, source in by_id.items()
    ]


def _find(
    sources: Sequence[tuple[ImageSource, np.ndarray]],
    given: Sequence[float] | None,
    *,
    progress: Progress,
    log: Callable[[str], object],
) -> ValueRange | None:
    """The one range of all images; None if none has more than 8 bits."""
    files = [(source, int(index)) for source, indices in sources for index in indices if _may_be_deep(source, index)]
    read = _read_all(files, progress)
    deep = [each for each in read if not each.depth.is_colour]
    if len(deep) < len(read):
        log(
            f"warning: data: {len(read) - len(deep):,} colour images have 16 bits a channel; the upper 8 are read, as "
            "of the range [0, 65535]"
        )
    if not deep:
        if given is None:
            return None
        if all(isinstance(source, ImageFiles | ImageArrays) for source, _ in sources):
            log("warning: data.value_range is not used: no grey image was found that has more than 8 bits")
        return ValueRange(float(given[0]), float(given[1]))
    value_range, origin = _choose(deep, given)
    log(f"{len(deep):,} images of more than 8 bits: {value_range} becomes black to white ({origin})")
    for line in _doubts(deep, value_range, is_found=origin == FOUND):
        log(f"warning: data.value_range: {line}")
    return value_range


GIVEN, TAGGED, FOUND = "data.value_range", "by the files' tags", "found over all of them"


def _choose(deep: Sequence[_Values], given: Sequence[float] | None) -> tuple[ValueRange, str]:
    """The range of all images, and where it comes from."""
    no_data = sorted({value for each in deep for value in each.depth.no_data})
    if given is not None:
        return ValueRange(float(given[0]), float(given[1]), tuple(no_data)), GIVEN
    if len({each.depth.type_range is None for each in deep}) > 1:
        raise UserError(
            "data.value_range: some images have integers and some floating-point numbers, and no range is that of "
            "both; expected [LOW, HIGH]"
        )
    extent, fill_values = _extent(deep)
    no_data += fill_values
    tagged = [each.depth.tagged for each in deep if each.depth.tagged is not None]
    if len(tagged) == len(deep):
        low, high = min(low for low, _ in tagged), max(high for _, high in tagged)
        return ValueRange(low, high, tuple(no_data)), TAGGED
    return ValueRange(*extent, tuple(no_data)), FOUND


def _extent(deep: Sequence[_Values]) -> tuple[tuple[float, float], list[float]]:
    """The smallest and largest value of all images, and the fill values that are none of them.

    A fill value counts as one if it is farther from all others than they are from each other.
    """
    extents = [each.extent for each in deep if each.extent is not None]
    low, high = min((low for low, _ in extents), default=0.0), max((high for _, high in extents), default=0.0)
    no_data = []
    for value in sorted({value for each in deep for value in each.fill_values}, reverse=True):
        if extents and low - value <= high - low:
            low = min(low, value)
        else:
            no_data.append(value)
    return (low, high), no_data


def _doubts(deep: Sequence[_Values], value_range: ValueRange, *, is_found: bool) -> list[str]:
    """Return what may be wrong with the range, a line each."""
    low, high = _extent(deep)[0]
    doubts = []
    types = [each.depth.type_range for each in deep if each.depth.type_range is not None]
    possible = (value_range.low, value_range.high)
    if is_found and types:
        possible = (min(low for low, _ in types), max(high for _, high in types))
    if high - low < (possible[1] - possible[0]) / 4:
        chosen = "" if is_found else "; much of what they show is lost"
        doubts.append(
            f"the images use [{low:.10g}, {high:.10g}], less than a quarter of [{possible[0]:.10g}, "
            f"{possible[1]:.10g}]{chosen}; expected [LOW, HIGH], the values that should be black and white"
        )
    if low < value_range.low or high > value_range.high:
        doubts.append(f"values of the images reach from {low:.10g} to {high:.10g} and are clipped to {value_range}")
    if low == high:
        doubts.append(f"all values are {low:.10g}")
    if value_range.no_data:
        values = ", ".join(f"{value:.10g}" for value in value_range.no_data)
        doubts.append(f"{values} and what is not finite count as no data, and become black")
    return doubts


def _may_be_deep(source: ImageSource, index: int) -> bool:
    return isinstance(source, ImageFiles) and source.paths[index].suffix.lower() in DEEP_SUFFIXES


def _read_all(files: Sequence[tuple[ImageSource, int]], progress: Progress) -> list[_Values]:
    """Return what those of the images that have more than 8 bits hold, without those that can't be read."""
    if not files:
        return []
    advance, read = progress("value range", len(files)), []
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16)) as pool:
        for values in pool.map(lambda file: _read(*file), files):
            advance(1)
            if values is not None:
                read.append(values)
    return read


def _read(source: ImageSource, index: int) -> _Values | None:
    assert isinstance(source, ImageFiles)
    try:
        if not _is_png_of_8_bits(source.paths[index]):
            with source.undecoded(index) as image:
                depth = depth_of(image)
                return None if depth is None else _values(image, depth)
    except UNREADABLE:
        pass  # whoever needs the image will say so
    return None


def _values(image: Image.Image, depth: Depth) -> _Values:
    if depth.is_colour:
        return _Values(depth, None, ())
    values = np.asarray(image, dtype=np.float64)
    values = values[_is_data(values, depth.no_data)]
    is_fill = np.isin(values, FILL_VALUES)
    fill_values, values = np.unique(values[is_fill]), values[~is_fill]
    extent = (float(values.min()), float(values.max())) if len(values) else None
    return _Values(depth, extent, tuple(fill_values.tolist()))


def _is_png_of_8_bits(path: Path) -> bool:
    """Whether a file begins as PNG files of at most 8 bits do; much faster than asking Pillow."""
    with open_regular(path) as file:
        start = file.read(25)
    return start.startswith(b"\x89PNG\r\n\x1a\n") and len(start) == 25 and start[24] <= 8


def _is_data(values: np.ndarray, no_data: Sequence[float]) -> np.ndarray:
    """Where `values` are finite, of a size that means something, and not among `no_data`."""
    is_data: np.ndarray = np.abs(values) < LARGEST  # False for NaN, too
    return is_data & ~np.isin(values, no_data) if no_data else is_data


def _tagged_range(tags: dict[int, object], type_range: tuple[float, float] | None) -> tuple[float, float] | None:
    """The range that a TIFF file says its values have; a limit that it doesn't name is its type's."""
    for names in RANGE_TAGS:
        limits = [_number(tags.get(name)) for name in names]
        if limits == [None, None] or (type_range is None and None in limits):
            continue
        low, high = (limit if limit is not None else (type_range or ())[i] for i, limit in enumerate(limits))
        if low < high:
            return low, high
    return None


def _tagged_no_data(tags: dict[int, object]) -> tuple[float, ...]:
    value = _number(tags.get(NO_DATA))
    return () if value is None else (value,)


def _number(tag: object) -> float | None:
    """A tag's first value, if it is a finite number."""
    first = tag[0] if isinstance(tag, tuple) and tag else tag
    try:
        value = float(str(first).strip("\0 "))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
