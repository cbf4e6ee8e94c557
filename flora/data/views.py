"""Fixed random views of images, as a collection of images of its own: so that features of views can be kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from flora.core.rng import Rng
from flora.data.augmentation import Augmentation
from flora.data.datasets.base import DIGEST_BYTES, ImageSource, Split
from flora.data.rgb import to_rgb


@dataclass(frozen=True, eq=False)
class ViewSource:
    """V views of each image of `source`: view v of image i is number i * V + v, the same at each look.

    `size` is the model's (height, width); all chance is that of `rng`'s child for the image and the view.
    """

    source: ImageSource
    augmentation: Augmentation
    num_views: int
    size: tuple[int, int]
    rng: Rng

    def __len__(self) -> int:
        return len(self.source) * self.num_views

    def name(self, index: int) -> str:
        return self.source.name(index // self.num_views)

    def open(self, index: int) -> Image.Image:
        image, view = divmod(index, self.num_views)
        return self.augmentation.apply(to_rgb(self.source.open(image)), self.size, self.rng.child(image, view))

    def fingerprint(self, indices: np.ndarray) -> str:
        """Of the images, and of what makes views of them."""
        return self._with_views(self.source.fingerprint(indices // self.num_views), indices)

    def contents(self, indices: np.ndarray) -> str:
        """Of the images, and of what makes views of them."""
        return self._with_views(self.source.contents(indices // self.num_views), indices)

    def digest(self, index: int) -> bytes:
        """Of the image's digest and the view's number."""
        image, view = divmod(index, self.num_views)
        return hashlib.sha256(self.source.digest(image) + repr(view).encode()).digest()[:DIGEST_BYTES]

    def _with_views(self, digest: str, indices: np.ndarray) -> str:
        what = (digest, self.augmentation, self.num_views, self.size, self.rng)
        return hashlib.sha256(repr(what).encode() + (indices % self.num_views).tobytes()).hexdigest()


def views_of(split: Split, augmentation: Augmentation, num_views: int, size: tuple[int, int], rng: Rng) -> Split:
    """A split's examples in V views each: those of example i are examples i * V to i * V + V - 1."""
    source = ViewSource(split.source, augmentation, num_views, size, rng)
    places = (split.source_indices[:, None] * num_views + np.arange(num_views)).flatten()
    return Split(source, places, np.repeat(split.labels, num_views))
