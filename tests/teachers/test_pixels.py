"""The way between images and x0, and class labels as conditions."""

import numpy as np
import pytest
import torch

from dmd2.errors import UserError
from dmd2.teachers.pixels import ClassConditioner, PixelCodec


def every_level(levels: int) -> np.ndarray:
    """One image (1, levels, 1, 1) that shows each level as round(255 k / (levels - 1))."""
    return np.array([round(k * 255 / (levels - 1)) for k in range(levels)], np.uint8).reshape(1, levels, 1, 1)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("rounding", ["round", "truncate"])
def test_every_level_survives_the_round_trip(levels: int, rounding: str):
    codec, images = PixelCodec(levels, 1), every_level(levels)
    stored = codec.encode(images)
    assert stored.dtype == np.uint8
    assert stored.ravel().tolist() == list(range(levels))
    x0 = codec.load(stored)
    truth = 2 * torch.arange(levels, dtype=torch.float64) / (levels - 1) - 1
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0.flatten().double(), truth, rtol=0, atol=1e-7)
    nudge = 1e-5 if rounding == "truncate" else 0.0  # float32 may fall just below the level that truncation drops
    assert np.array_equal(codec.decode(x0 + nudge, rounding=rounding), images)


def test_layout_is_channels_first_in_storage_and_last_in_images():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    codec = PixelCodec(256, 3)
    stored = codec.encode(images)
    assert stored.shape == (2, 3, 4, 5)
    assert stored[1, 2, 3, 4] == images[1, 3, 4, 2]
    assert np.array_equal(codec.decode(codec.load(stored)), images)


def test_rounding_is_edms_and_truncation_is_dmd2s():
    x0 = torch.linspace(-1.2, 1.2, 9_973).view(1, 1, 1, -1)
    codec, values = PixelCodec(256, 1), x0.flatten().numpy()
    edm = (values * np.float32(127.5) + np.float32(128)).clip(0, 255).astype(np.uint8)
    dmd2 = ((values + np.float32(1)) * np.float32(127.5)).clip(0, 255).astype(np.uint8)
    assert np.array_equal(codec.decode(x0).ravel(), edm)
    assert np.array_equal(codec.decode(x0, rounding="truncate").ravel(), dmd2)
    assert (edm != dmd2).mean() > 0.3


def test_decoding_takes_the_nearest_of_17_levels_and_clamps():
    x0 = torch.linspace(-1.5, 1.5, 2_001, dtype=torch.float64)
    grid = np.array([round(k * 255 / 16) for k in range(17)])
    nearest = np.abs(x0.numpy()[:, None] - (np.arange(17) / 8 - 1)).argmin(1)
    found = PixelCodec(17, 1).decode(x0.float().view(1, 1, 1, -1)).ravel()
    between = np.isclose((x0.numpy() + 1) * 8 % 1, 0.5)  # ties go up, argmin goes down
    assert np.array_equal(found[~between], grid[nearest][~between])


def test_values_between_the_levels_and_wrong_images_are_refused():
    with pytest.raises(UserError, match=r"pixel value 7 is not one of 17 grey levels; set `data\.levels` to 256"):
        PixelCodec(17, 1).encode(np.full((1, 2, 2, 1), 7, np.uint8))
    with pytest.raises(UserError, match=r"images are uint8 \(1, 2, 2, 3\); expected uint8 \(B, H, W, 1\)"):
        PixelCodec(256, 1).encode(np.zeros((1, 2, 2, 3), np.uint8))
    with pytest.raises(UserError, match="images are float64"):
        PixelCodec(256, 1).encode(np.zeros((1, 2, 2, 1)))
    with pytest.raises(ValueError, match="rounding is 'floor'"):
        PixelCodec(256, 1).decode(torch.zeros(1, 1, 2, 2), rounding="floor")
    with pytest.raises(ValueError, match=r"levels 257 must be in 2\.\.256"):
        PixelCodec(257, 1)


def test_nan_is_an_error_and_infinity_is_clamped():
    codec = PixelCodec(256, 1)
    x0 = torch.tensor([float("inf"), float("-inf"), 1e30, 0.0]).view(1, 1, 2, 2)
    assert codec.decode(x0).ravel().tolist() == [255, 0, 255, 128]
    with pytest.raises(UserError, match="samples contain NaN"):
        codec.decode(x0 * float("nan"))


def test_labels_become_int64_conditions_and_foreign_ones_are_refused():
    conditioner = ClassConditioner(10)
    cond = conditioner.tokenize([3, np.uint8(9), 0])
    assert cond["label"].dtype == torch.int64
    assert cond["label"].tolist() == [3, 9, 0]
    assert conditioner.null(cond) is None
    for labels in ([0, 10], [-1, 2]):
        with pytest.raises(UserError, match=r"`data\.num_classes` is 10"):
            conditioner.tokenize(labels)


def test_drawn_labels_are_uniform_and_a_function_of_the_generator():
    conditioner = ClassConditioner(4)
    label = conditioner.draw(40_000, torch.Generator().manual_seed(0))["label"]
    assert torch.equal(label, conditioner.draw(40_000, torch.Generator().manual_seed(0))["label"])
    shares = torch.bincount(label, minlength=4) / 40_000
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.01)
