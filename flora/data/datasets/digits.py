"""The one real data set that comes with the program: 1,797 handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from flora.core.registry import option, register
from flora.core.rng import Rng
from flora.data.datasets.base import Dataset, ImageArrays, ImageData, Split, stratified_split

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@register("digits")
@dataclass(frozen=True)
class Digits(Dataset):
    """Handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak, UCI, CC BY 4.0; see `flora/assets/DIGITS.md`)."""

    templates: ClassVar[tuple[str, ...]] = ("a photo of the digit {}.",)

    test_fraction: float = option("share of the images held out for testing", 0.2, above=0, below=1)

    def load(self, rng: Rng) -> ImageData:
        """Both splits, with each digit in the same proportion."""
        pixels, labels = read_digits()
        train, test = stratified_split(labels, self.test_fraction, rng)
        everything = Split(ImageArrays(pixels, "digits"), np.arange(len(labels)), labels)
        return ImageData(everything.subset(train), everything.subset(test), DIGIT_NAMES)


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """The images `(1797, 8, 8)` uint8, white on black, and their labels `(1797,)` int64."""
    with (Path(__file__).parents[2] / "assets/digits.npz").open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        return archive["images"], archive["labels"].astype(np.int64)
