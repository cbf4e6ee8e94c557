"""Generated images: digits and letters in Pillow's own typeface, printed and then distorted."""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from flora.core.progress import Progress
from flora.core.registry import OptionError, option, register
from flora.core.rng import Rng
from flora.data.datasets.base import Dataset, ImageArrays, ImageData, Split
from flora.data.datasets.digits import DIGIT_NAMES

CHARACTERS = string.digits + string.ascii_uppercase

# Sides of the undistorted drawing, of the distorted one and of the bitmap whose cells of 4 x 4 become pixels.
_MASTER, _WARPED, _BITMAP, _CELL = 96, 48, 32, 4


@register("glyphs")
@dataclass(frozen=True)
class Glyphs(Dataset):
    """Characters drawn by the program in random shapes, white on black: nothing is read or downloaded.

    The images are normalised as those of `digits` are: stretched to a box of about 20 x 32 pixels, brought to a
    similar amount of ink, and counted into 8 x 8 cells.
    """

    templates: ClassVar[tuple[str, ...]] = ("a photo of the {}.",)

    num_train: int = option("generated training images", 20_000, at_least=1, at_most=10_000_000)
    num_test: int = option("generated test images", 2_000, at_least=1, at_most=10_000_000)
    characters: str = option("the classes: English letters and digits, each once", CHARACTERS)

    def check(self) -> None:
        """Raise `OptionError` unless the characters are distinct digits and letters."""
        unknown = set(self.characters) - set(string.digits + string.ascii_letters)
        if unknown or not self.characters or len(set(self.characters)) < len(self.characters):
            raise OptionError("characters", f"expected English letters and digits, each once, got {self.characters!r}")

    def load(self, rng: Rng) -> ImageData:
        """Draw both splits, which takes a second for every 1,500 images or so.

        Image i depends on `rng`, the split and i: more images leave the others as they are.
        """
        return self.load_with_progress(rng, lambda title, total: lambda done: None)

    def load_with_progress(self, rng: Rng, progress: Progress) -> ImageData:
        advance = progress("drawing glyphs", self.num_train + self.num_test)
        train = self._draw_split("train", self.num_train, rng, advance)
        test = self._draw_split("test", self.num_test, rng, advance)
        return ImageData(train, test, tuple(class_name(character) for character in self.characters))

    def _draw_split(self, title: str, num_images: int, rng: Rng, advance: Callable[[int], object]) -> Split:
        """`num_images` images whose classes take turns."""
        labels = np.arange(num_images) % len(self.characters)
        pixels = []
        for i, label in enumerate(labels):
            pixels.append(draw(self.characters[label], rng.child(title, i)))
            advance(1)
        return Split(ImageArrays(np.stack(pixels), f"glyphs/{title}"), np.arange(num_images), labels)


def class_name(character: str) -> str:
    """Return what a character is called in a prompt: "digit three", "letter K", "small letter k"."""
    if character.isdigit():
        return f"digit {DIGIT_NAMES[int(character)]}"
    return f"letter {character}" if character.isupper() else f"small letter {character}"


def draw(character: str, rng: Rng) -> np.ndarray:
    """An image `(8, 8)` uint8 of the character, white on black, in a random shape."""
    numpy_rng = rng.numpy()
    return _count_cells(_normalise(_warp(_printed(character), numpy_rng), numpy_rng))


@lru_cache(maxsize=64)
def _printed(character: str) -> np.ndarray:
    """The character in the middle of an image `(96, 96)`, float32 from 0 to 1, softened by a blur.

    The blur makes the grey levels a measure of the distance to the stroke: a threshold then sets its thickness.
    """
    image = Image.new("L", (_MASTER, _MASTER))
    centre = (_MASTER / 2, _MASTER / 2)
    ImageDraw.Draw(image).text(centre, character, fill=255, font=ImageFont.load_default(size=66), anchor="mm")
    return np.asarray(image.filter(ImageFilter.GaussianBlur(2)), np.float32) / 255


def _warp(drawing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The drawing `(48, 48)` under a random rotation, shear, stretch and smooth displacement."""
    angle, shear, stretch = math.radians(rng.normal(0, 7)), rng.normal(0, 0.18), math.exp(rng.normal(0, 0.12))
    cos, sin = math.cos(angle), math.sin(angle)
    affine = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]]) @ np.diag([stretch, 1 / stretch])
    axis = np.linspace(-1, 1, _WARPED)
    source = np.tensordot(affine, np.stack(np.meshgrid(axis, axis)), 1) + _displacement(rng)
    columns, rows = np.clip(np.rint((source + 1) * (_MASTER - 1) / 2), 0, _MASTER - 1).astype(np.intp)
    warped: np.ndarray = drawing[rows, columns]
    return warped


def _displacement(rng: np.random.Generator) -> np.ndarray:
    """A smooth random field `(2, 48, 48)`, x then y, in units of half the image."""
    waves = _waves()
    orders = np.arange(1, len(waves) + 1)
    amplitudes = rng.normal(0, 0.12, (2, 3, 3)) / np.sqrt(np.outer(orders, orders))
    field: np.ndarray = waves.T @ amplitudes @ waves
    # Moves the waist of a character up or down, and a little to the side: a six gets a small loop or a large one.
    field[0] += rng.normal(0, 0.05) * waves[1]
    field[1] += rng.normal(0, 0.15) * waves[1][:, None]
    return field


@lru_cache(maxsize=1)
def _waves() -> np.ndarray:
    """The three lowest cosines along one axis of the distorted drawing, `(3, 48)`."""
    waves: np.ndarray = np.cos(np.outer(np.arange(1, 4), (np.arange(_WARPED) + 0.5) * math.pi / _WARPED))
    return waves


def _normalise(drawing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The drawing as a bitmap `(32, 32)` of bool: full height, about 20 wide, three tenths of it ink.

    That is what the NIST programs made of the handwritten digits (M. D. Garris and others, NISTIR 5469, 1994).
    """
    visible = drawing >= 0.35 * drawing.max()
    columns, rows = np.flatnonzero(visible.any(0)), np.flatnonzero(visible.any(1))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    narrowness = math.sqrt(min(1, 2 * (right - left) / (bottom - top)))
    width = int(np.clip(rng.normal(20, 2.5) * narrowness, 8, 28))
    image = Image.fromarray(drawing).resize((width, _BITMAP), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    levels = np.asarray(image)
    num_ink = min(int(np.clip(rng.normal(0.305, 0.03), 0.2, 0.4) * _BITMAP**2), levels.size * 4 // 5)
    threshold = np.partition(levels, -num_ink, axis=None)[-num_ink]
    margin = _BITMAP - width
    offset = int(np.clip(round(margin / 2 + rng.normal(0, 1.5)), 0, margin))
    bitmap = np.zeros((_BITMAP, _BITMAP), bool)
    bitmap[:, offset : offset + width] = levels >= max(threshold, 0.02)
    return bitmap


def _count_cells(bitmap: np.ndarray) -> np.ndarray:
    """The share of ink in each cell of 4 x 4 pixels, from 0 to 255: `(8, 8)` uint8."""
    side = _BITMAP // _CELL
    shares = bitmap.reshape(side, _CELL, side, _CELL).mean((1, 3))
    image: np.ndarray = np.rint(255 * shares).astype(np.uint8)
    return image
