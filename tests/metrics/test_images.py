"""Pixels as features."""

import numpy as np
import pytest

from dmd2.metrics import pixel_features
from dmd2.metrics.images import batches, check_images


def test_small_images_are_flattened_to_minus_one_to_one():
    images = np.array([0, 255, 51, 204], np.uint8).reshape(1, 2, 2, 1)
    np.testing.assert_allclose(pixel_features(images), [[-1, 1, -0.6, 0.6]], atol=1e-12)


def test_large_images_are_averaged_over_blocks_to_sixteen_a_side():
    images = np.zeros((2, 64, 64, 3), np.uint8)
    images[1, :4, 4:8, 2] = 255  # exactly block (0, 1) of channel 2
    found = pixel_features(images).reshape(2, 16, 16, 3)
    assert found[1, 0, 1, 2] == 1
    assert found[1].sum() == pytest.approx(-16 * 16 * 3 + 2)
    assert (found[0] == -1).all()


@pytest.mark.parametrize(("side", "left"), [(8, 8), (16, 16), (28, 14), (32, 16), (24, 12), (17, 1)])
def test_number_of_pixel_features_is_bounded_for_any_side(side, left):
    assert pixel_features(np.zeros((1, side, side, 1), np.uint8)).shape == (1, left * left)


def test_batches_cover_every_image_once():
    parts = list(batches(10, 4))
    assert [i for part in parts for i in range(10)[part]] == list(range(10))
    assert [part.stop - part.start for part in parts] == [4, 4, 2]


@pytest.mark.parametrize(
    ("images", "rule"),
    [
        (np.zeros((2, 8, 8, 1), np.float32), "expected uint8"),
        (np.zeros((2, 1, 8, 8), np.uint8), "channels last"),
        (np.zeros((8, 8, 1), np.uint8), "expected uint8"),
        (np.zeros((0, 8, 8, 1), np.uint8), "empty"),
    ],
)
def test_images_of_another_kind_are_refused(images, rule):
    with pytest.raises(ValueError, match=rule):
        check_images(images)


def test_labels_of_another_count_are_refused():
    with pytest.raises(ValueError, match=r"expected integers or texts of shape \(2,\)"):
        check_images(np.zeros((2, 8, 8, 1), np.uint8), np.zeros(3, np.int64))
