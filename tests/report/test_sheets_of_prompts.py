"""Sheets of samples for prompts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmd2.report.sheets import prompts_png

SIDE = 40


def test_prompts_are_rows_with_the_same_prompts_in_every_set(tmp_path: Path):
    prompts = np.asarray(["a one left of a two", "a two right of a one", "an eight left of a nine"])
    captions = prompts[np.arange(12) % 3]
    values = 60 * (np.arange(12) % 3)  # a set's images of one prompt are of one grey
    images = np.broadcast_to(values[:, None, None, None], (12, SIDE, SIDE, 1)).astype(np.uint8)
    prompts_png({"all": (images, captions), "two": (images[:2], captions[:2])}, tmp_path / "x.png", each=3)
    sheet = np.asarray(Image.open(tmp_path / "x.png").convert("L"))

    def rows_of(value: int, num: int) -> np.ndarray:
        """The rows with at least `num` images' width of a grey (letters have a few pixels of it)."""
        return np.flatnonzero((sheet == value).sum(axis=1) >= num * SIDE)

    for value in (0, 60):
        assert len(rows_of(value, 3 + 1)) == SIDE, "three samples of the first set and one of the second"
    assert rows_of(60, 1)[0] > rows_of(0, 1)[-1]
    assert not len(rows_of(120, 1)), "a prompt that one set lacks is left out"
    with pytest.raises(ValueError, match="no prompt in common"):
        prompts_png({"a": (images[:1], captions[:1]), "b": (images[1:2], captions[1:2])}, tmp_path / "y.png")
