"""Generated images: digits and letters in Pillow's own typeface, distorted until they look handwritten."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from flora.data.datasets import Dataset, ImageArrays, ImageData, Split
from flora.registry import OptionError, option, register
from flora.rng import Rng

CHARACTERS = string.digits + string.ascii_uppercase

_DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Side of a glyph's master drawing, of the drawing after the warp, and of the bitmap that is counted into cells.
_MASTER, _WARPED, _BITMAP = 96, 48, 32
_CELL = 4  # An image has one pixel for each cell of 4 x 4 bitmap pixels, as the handwritten digits do.

# Corners of a polyline, from the top left (0, 0) to the bottom right (1, 1) of the character's box.
Polyline = tuple[tuple[float, float], ...]

# A six whose stem has no hook, and the same turned upside down.
_SIX: Polyline = (
    (0.75, 0.0),
    (0.35, 0.25),
    (0.05, 0.6),
    (0.1, 0.85),
    (0.4, 1.0),
    (0.85, 0.9),
    (0.9, 0.7),
    (0.55, 0.58),
    (0.08, 0.75),
)
_NINE: Polyline = tuple((1 - x, 1 - y) for x, y in _SIX)
_HOOKED_NINE: Polyline = (
    (0.95, 0.2),
    (0.5, 0.0),
    (0.1, 0.2),
    (0.4, 0.42),
    (0.95, 0.2),
    (0.95, 0.7),
    (0.6, 1.0),
    (0.1, 0.9),
)

# Handwriting knows other forms than print. A form is a printed character (or none) and strokes drawn on top.
_FORMS: dict[str, tuple[tuple[str, tuple[Polyline, ...]], ...]] = {
    "1": (("1", ()), ("I", ()), ("1", (((0.0, 1.0), (1.4, 1.0)),))),
    "4": (("4", ()), ("", (((0.35, 0.0), (0.0, 0.6), (1.0, 0.6)), ((0.75, 0.25), (0.6, 1.0))))),
    "6": (("6", ()), ("b", ()), ("", (_SIX,))),
    "7": (("7", ()), ("7", (((0.2, 0.5), (0.95, 0.5)),))),
    "9": (("9", ()), ("g", ()), ("", (_NINE,)), ("", (_HOOKED_NINE,))),
}
# Width / height of a character that is drawn with strokes only.
_STROKE_BOX = (32, 48)
_OFFSET = (0.0, 1.5)
_WIDTH = (20.0, 2.5)
_INK = (0.305, 0.03)
_SHEAR = (0.0, 0.18)
_ANGLE = 7
_STRETCH = 0.12
_AMP = 0.12
_NARROW = 0.5
_LOW = 1
_SQUEEZE = 0.15
_SQUEEZEX = 0.05
_BLUR = 2.0
_MAXSW = 0


@register("glyphs")
@dataclass(frozen=True)
class Glyphs(Dataset):
    """Characters drawn by the program in random shapes, white on black: nothing is downloaded.

    The images are normalised as those of the data set `digits` are: stretched to a box of about 20 x 32 pixels,
    brought to a similar amount of ink, and counted into 8 x 8 cells.
    """

    templates: ClassVar[tuple[str, ...]] = ("a photo of the {}.",)

    num_train: int = option("Number of generated training images", 30_000, at_least=1)
    num_test: int = option("Number of generated test images", 2_000, at_least=1)
    characters: str = option("The classes: digits and letters, each once", CHARACTERS)

    def check(self) -> None:
        """Raise `OptionError` unless the characters are distinct digits and letters."""
        allowed = string.digits + string.ascii_letters
        if not self.characters or any(character not in allowed for character in self.characters):
            raise OptionError("characters", f"expected digits and English letters, got {self.characters!r}")
        if len(set(self.characters)) < len(self.characters):
            raise OptionError("characters", f"expected each character once, got {self.characters!r}")

    def load(self, rng: Rng) -> ImageData:
        """Draw both splits, about a second for every 2,000 images; image i depends on its split and i only."""
        names = tuple(class_name(character) for character in self.characters)
        train = self._draw_split("train", self.num_train, rng)
        return ImageData(train, self._draw_split("test", self.num_test, rng), names)

    def _draw_split(self, title: str, count: int, rng: Rng) -> Split:
        """`count` images whose classes take turns."""
        labels = np.arange(count, dtype=np.int64) % len(self.characters)
        side = _BITMAP // _CELL
        pixels = np.empty((count, side, side), np.uint8)
        for index, label in enumerate(labels):
            pixels[index] = draw_glyph(self.characters[label], rng.child(title, index))
        return Split(ImageArrays(pixels, f"glyphs {title}"), np.arange(count), labels)


def class_name(character: str) -> str:
    """What a character is called in a prompt: "digit three", "letter K", "small letter k"."""
    if character.isdigit():
        return f"digit {_DIGIT_NAMES[int(character)]}"
    return f"letter {character}" if character.isupper() else f"small letter {character}"


def draw_glyph(character: str, rng: Rng) -> np.ndarray:
    """One image `(8, 8)` uint8 of the character, in a random shape that depends on `rng` alone."""
    numpy_rng = rng.numpy()
    num_forms = len(_FORMS.get(character, "?"))
    master = _master(character, int(numpy_rng.integers(num_forms)), int(numpy_rng.integers(0, _MAXSW + 1)))
    return _count_cells(_normalise(_warp(master, numpy_rng), numpy_rng))


@lru_cache(maxsize=1024)
def _master(character: str, form: int, stroke_width: int) -> np.ndarray:
    """The undistorted character `(96, 96)` in the middle of its image, float32 from 0 to 1, softened by a blur.

    The blur makes levels of grey a measure of the distance to the stroke, so that a threshold sets its thickness.
    """
    text, polylines = _FORMS[character][form] if character in _FORMS else (character, ())
    font = ImageFont.load_default(size=66)
    image = Image.new("L", (_MASTER, _MASTER))
    drawing = ImageDraw.Draw(image)
    left, top, right, bottom = drawing.textbbox((0, 0), text, font=font) if text else (0, 0, *_STROKE_BOX)
    x, y = (_MASTER - (right - left)) / 2, (_MASTER - (bottom - top)) / 2
    drawing.text((x - left, y - top), text, fill=255, font=font, stroke_width=stroke_width)
    for polyline in polylines:
        points = [(x + u * (right - left), y + v * (bottom - top)) for u, v in polyline]
        drawing.line(points, fill=255, width=6 + 2 * stroke_width, joint="curve")
    return np.asarray(image.filter(ImageFilter.GaussianBlur(_BLUR)), np.float32) / 255


def _warp(master: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The drawing `(48, 48)` under a random affine map and a smooth random displacement."""
    angle, shear = math.radians(rng.normal(0, _ANGLE)), rng.normal(*_SHEAR)
    stretch = math.exp(rng.normal(0, _STRETCH))
    cos, sin = math.cos(angle), math.sin(angle)
    affine = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]]) @ np.diag([stretch, 1 / stretch])
    axis = np.linspace(-1, 1, _WARPED)
    grid = np.stack(np.meshgrid(axis, axis, indexing="xy"))
    source = np.tensordot(affine, grid, 1) + _displacement(rng)
    source[1] += rng.normal(0, _SQUEEZE) * _waves2()
    source[0] += rng.normal(0, _SQUEEZEX) * _waves2().T
    columns, rows = np.clip(np.rint((source + 1) * (_MASTER - 1) / 2), 0, _MASTER - 1).astype(np.intp)
    return master[rows, columns]


@lru_cache(maxsize=1)
def _waves2() -> np.ndarray:
    """x"""
    return np.cos((np.arange(_WARPED)[:, None] + 0.5) * 2 * math.pi / _WARPED)


@lru_cache(maxsize=1)
def _waves() -> np.ndarray:
    """The three lowest cosines on the drawing's axis, `(3, 48)`."""
    phase = (np.arange(_WARPED) + 0.5) * math.pi / _WARPED
    return np.cos(np.outer(np.arange(_LOW, _LOW + 3), phase))


def _displacement(rng: np.random.Generator) -> np.ndarray:
    """A smooth random field `(2, 48, 48)`: products of low cosines, the higher the weaker."""
    amplitudes = rng.normal(0, _AMP, (2, 3, 3)) / np.sqrt(np.outer([1, 2, 3], [1, 2, 3]))
    field: np.ndarray = _waves().T @ amplitudes @ _waves()
    return field


def _normalise(drawing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The drawing as a bitmap `(32, 32)` of bool: full height, about 20 wide, with a given share of ink."""
    ink = drawing > 0.35
    columns, rows = np.flatnonzero(ink.any(0)), np.flatnonzero(ink.any(1))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    aspect = (box[2] - box[0]) / (box[3] - box[1])
    width = int(np.clip(rng.normal(*_WIDTH) * min(1, aspect / _NARROW) ** 0.5, 8, 28))
    grey = Image.fromarray(drawing).resize((width, _BITMAP), Image.Resampling.BILINEAR, box=box)
    levels = np.asarray(grey)
    num_ink = int(np.clip(rng.normal(*_INK), 0.2, 0.4) * _BITMAP**2)
    num_ink = min(num_ink, levels.size * 4 // 5)
    threshold = np.partition(levels, levels.size - num_ink, axis=None)[levels.size - num_ink]
    bitmap = np.zeros((_BITMAP, _BITMAP), bool)
    left = int(np.clip(round((_BITMAP - width) / 2 + rng.normal(*_OFFSET)), 0, _BITMAP - width))
    bitmap[:, left : left + width] = levels >= max(threshold, 0.02)
    return bitmap


def _count_cells(bitmap: np.ndarray) -> np.ndarray:
    """The share of ink in each cell of 4 x 4 pixels, 0 to 255, `(8, 8)` uint8."""
    side = _BITMAP // _CELL
    counts = bitmap.reshape(side, _CELL, side, _CELL).sum((1, 3))
    return np.rint(counts * (255 / _CELL**2)).astype(np.uint8)
