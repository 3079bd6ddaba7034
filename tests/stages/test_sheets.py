"""Sheets of sets with many classes and few images, as a streamed evaluation of ImageNet stores them."""

from pathlib import Path

import numpy as np
from PIL import Image
from world import World

from dmd2.datasets import write_shards
from dmd2.lineage.spec import Spec
from dmd2.report.sheets import GAP, HEAD, MARGIN
from dmd2.stages.figures import compare, grid

SIDE = 40


def stored(folder: Path, labels: np.ndarray) -> Path:
    """Images of one grey level each, 4 pixels a side: their number in the set, so that a sheet says whose they are."""

    def make(ids: range) -> dict:
        grey = (np.asarray(ids) % 256).astype(np.uint8)[:, None, None, None]
        return {"image.png": list(np.broadcast_to(grey, (len(ids), 4, 4, 1))), "cls": labels[ids.start : ids.stop]}

    write_shards(folder / "manifest.json", len(labels), 1000, make, Spec.of("sample", "x"))
    return folder / "manifest.json"


def greys(sheet: Path) -> list[list[int]]:
    """The level at the centre of every image of a sheet."""
    pixels, step = np.asarray(Image.open(sheet))[:, :, 0], SIDE + GAP
    rows = range(MARGIN + HEAD + SIDE // 2, pixels.shape[0] - MARGIN, step)
    return [[int(pixels[y, x]) for x in range(MARGIN + SIDE // 2, pixels.shape[1] - MARGIN, step)] for y in rows]


def test_samples_of_a_hundred_classes_fill_the_sheet_in_their_order(tmp_path: Path):
    grid(stored(tmp_path, np.arange(100)), tmp_path / "grid.png")
    assert greys(tmp_path / "grid.png") == np.arange(80).reshape(8, 10).tolist()


def test_samples_of_ten_classes_keep_a_column_each(tmp_path: Path):
    grid(stored(tmp_path, np.arange(200) % 10), tmp_path / "grid.png")
    assert greys(tmp_path / "grid.png") == np.arange(80).reshape(8, 10).tolist()


def test_sorted_set_is_shown_by_evenly_spaced_images(tmp_path: Path):
    manifest = stored(tmp_path / "real", np.arange(2500) // 250)
    compare({"real": manifest, "samples": stored(tmp_path / "gen", np.arange(100))}, tmp_path / "c.png")
    first_panel = [row[:10] for row in greys(tmp_path / "c.png")]
    assert first_panel == (np.linspace(0, 2499, 80).astype(int) % 256).reshape(8, 10).tolist()


def test_digits_are_compared_class_by_class(world: World, tmp_path: Path):
    compare({"a": world.shards, "b": world.shards}, tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").height == 8 * SIDE + 7 * GAP + HEAD + 2 * MARGIN
