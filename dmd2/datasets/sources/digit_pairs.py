"""Pairs of handwritten digits with captions: the embedded text-to-image data set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from dmd2.config import Data
from dmd2.config.digit_pairs import COMPOSITIONS, captions_of
from dmd2.datasets.sources.base import insist

SIDE = 16
EACH = 60
"""Images per composition; one half has the caption with "left", the other the one with "right"."""


class DigitPairs:
    """6,000 grey 16x16 images: two of scikit-learn's 8x8 digits side by side, each at its own random height.

    Image i has composition i mod 100, so that any prefix has all of them. The digits, their heights and the captions
    are a function of i alone.
    """

    classes: Sequence[str] = ()

    def __init__(self, data: Data):
        from sklearn.datasets import load_digits

        insist(data, resolution=SIDE, channels=1, levels=256)
        levels, digits = load_digits(return_X_y=True)
        self._glyphs = np.round(levels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
        self._of_digit = [np.flatnonzero(digits == digit) for digit in range(10)]
        self.fingerprint = hashlib.sha256(levels.tobytes() + digits.tobytes() + b"pairs 1").hexdigest()
        self.labels = np.asarray(
            [captions_of(*_composition(i))[i // len(COMPOSITIONS) % 2] for i in range(EACH * len(COMPOSITIONS))]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> np.ndarray:
        """Image `number`: uint8 (16, 16, 1)."""
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([2, number])))
        image = np.zeros((SIDE, SIDE, 1), np.uint8)
        for side, digit in enumerate(_composition(number)):
            choices = self._of_digit[digit]
            glyph = self._glyphs[choices[int(rng.random() * len(choices))]]
            top = int(rng.random() * (SIDE - 8 + 1))
            image[top : top + 8, 8 * side : 8 * side + 8, 0] = glyph
        return image

    def name(self, number: int) -> str:
        """The name of image `number` in messages."""
        return f"image {number}"


def _composition(number: int) -> tuple[int, int]:
    return COMPOSITIONS[number % len(COMPOSITIONS)]
