"""Random changes to training images. They make every look at an image another one, so nothing of it can be kept."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image
from PIL.ImageEnhance import Brightness, Color, Contrast
from PIL.ImageFilter import GaussianBlur

from flora.core.registry import Component, option, register
from flora.core.rng import Rng


@dataclass(frozen=True)
class Augmentation(Component):
    """How training images are changed at random before each use."""

    changes_images: ClassVar[bool] = True

    @abstractmethod
    def apply(self, image: Image.Image, size: tuple[int, int], rng: Rng) -> Image.Image:
        """A changed copy of an RGB image; `size` is the model's (height, width), all chance is `rng`'s."""


@register("none")
@dataclass(frozen=True)
class NoAugmentation(Augmentation):
    """Images as they are (the default)."""

    changes_images: ClassVar[bool] = False

    def apply(self, image: Image.Image, size: tuple[int, int], rng: Rng) -> Image.Image:
        return image


@register("crop_flip")
@dataclass(frozen=True)
class CropFlip(Augmentation):
    """A random part of the image, stretched to the model's size, and mirrored half of the time (arXiv:1409.4842)."""

    min_area: float = option("smallest share of the image's area that is kept", 0.5, above=0, at_most=1)
    max_stretch: float = option("largest ratio of the part's sides", 4 / 3, at_least=1)
    flip: float = option("probability of mirroring left and right", 0.5, at_least=0, at_most=1)

    def apply(self, image: Image.Image, size: tuple[int, int], rng: Rng) -> Image.Image:
        generator = rng.numpy()
        area, log_ratio, left, top, flip = generator.uniform(size=5)
        area = self.min_area + (1 - self.min_area) * area
        ratio = math.exp((2 * log_ratio - 1) * math.log(self.max_stretch))
        width = min(math.sqrt(area * image.width * image.height * ratio), image.width)
        height = min(math.sqrt(area * image.width * image.height / ratio), image.height)
        x, y = left * (image.width - width), top * (image.height - height)
        part = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip < self.flip else part


@register("corrupt")
@dataclass(frozen=True)
class Corrupt(Augmentation):
    """A damaged copy: blurred, its colours changed, and some of its patches grey, after another augmentation.

    The strongly changed views of FixMatch (arXiv:2001.07685) and the corrupted images of STIC (arXiv:2405.19716).
    Differs from the papers: these three kinds of damage, in place of RandAugment's fourteen.
    """

    first: Augmentation = option("what is done before", NoAugmentation())
    blur: float = option("largest radius of the blur, as a share of the image's longer side", 0.02, at_least=0, below=1)
    colour: float = option("by how much brightness, contrast and colour change at most", 0.5, at_least=0, below=1)
    dropped: float = option("share of the patches that become grey", 0.25, at_least=0, at_most=1)
    grid: int = option("patches along each side", 6, at_least=1, at_most=64)

    def apply(self, image: Image.Image, size: tuple[int, int], rng: Rng) -> Image.Image:
        image = self.first.apply(image, size, rng.child("first"))
        generator = rng.numpy()
        blur, *factors = generator.uniform(size=4).tolist()
        for enhance, factor in zip((Brightness, Contrast, Color), factors, strict=True):
            image = enhance(image).enhance(1 + self.colour * (2 * factor - 1))
        image = image.filter(GaussianBlur(blur * self.blur * max(image.size)))
        dropped = generator.permutation(self.grid**2)[: round(self.dropped * self.grid**2)]
        for place in dropped.tolist():
            row, column = divmod(place, self.grid)
            edges = [column * image.width, row * image.height, (column + 1) * image.width, (row + 1) * image.height]
            left, top, right, bottom = (edge // self.grid for edge in edges)
            image.paste((128, 128, 128), (left, top, right, bottom))
        return image
