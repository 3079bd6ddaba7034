"""The embedded text-to-image data: captions, images, and what is held out."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dmd2.config import Captions, Data
from dmd2.config.digit_pairs import COMPOSITIONS, composition, is_held_out, prompts
from dmd2.datasets import ShardReader, write_images
from dmd2.datasets.sources import open_source
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec

DATA = Data(source="digit_pairs", resolution=16, channels=1, captions=Captions(), shard_size=1000, image_format="png")


def test_both_captions_of_a_composition_say_which_digit_is_left():
    assert composition("a three left of a seven") == (3, 7)
    assert composition("a seven right of a three") == (3, 7)
    assert composition("an eight left of an eight") == (8, 8)
    assert sorted(map(composition, prompts())) == sorted([*COMPOSITIONS, *COMPOSITIONS])
    for text in ("three left of seven", "a three above a seven", "a three left of a seven.", ""):
        with pytest.raises(UserError, match="is not a caption of digit_pairs"):
            composition(text)


def test_every_digit_is_held_out_twice_on_each_side_and_trained_eight_times():
    held_out = [pair for pair in COMPOSITIONS if is_held_out(*pair)]
    assert len(held_out) == 20
    for side in (0, 1):
        assert Counter(pair[side] for pair in held_out) == dict.fromkeys(range(10), 2)
    assert not {composition(text) for text in prompts("training")} & set(held_out)
    assert (len(prompts()), len(prompts("training"))) == (200, 160)


def test_images_are_two_real_digits_that_the_caption_names():
    source = open_source(DATA)
    levels, digits = load_digits(return_X_y=True)
    glyphs = [np.round(glyph * (255 / 16)).astype(np.uint8).tobytes() for glyph in levels]
    known = dict(zip(glyphs, digits, strict=True))
    assert len(source) == 6000
    heights = set()
    for number in range(300):
        image = source[number]
        assert image.shape == (16, 16, 1)
        found = []
        for half in (image[:, :8, 0], image[:, 8:, 0]):
            windows = [(known.get(half[top : top + 8].tobytes()), top) for top in range(9)]
            digit, top = next(window for window in windows if window[0] is not None)
            heights.add(top)
            found.append(digit)
        assert tuple(found) == composition(str(source.labels[number]))
    assert heights == set(range(9))
    assert Counter(source.labels.tolist()) == dict.fromkeys(prompts(), 30)


def test_captions_are_stored_in_shards_and_read_as_text(tmp_path: Path):
    spec = Spec.of("shards", "shards", data=DATA)
    manifest = write_images(tmp_path / "manifest.json", DATA, spec)
    assert set(manifest["fields"]) == {"image.png", "txt"}
    assert manifest["facts"] == {"captions": 200, "missing_captions": 0, "unreadable": 0}
    found = ShardReader(tmp_path / "manifest.json").read([5, 0])
    source = open_source(DATA)
    assert found["txt"].tolist() == [source.labels[5], source.labels[0]]
    assert np.array_equal(found["image"][1], source[0])
