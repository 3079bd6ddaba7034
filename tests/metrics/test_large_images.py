"""Large images: what is kept of them, how they are resized, and that memory does not grow with their number."""

import tracemalloc

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from PIL import Image

from dmd2 import config
from dmd2.config.protocols import PROTOCOLS, describe
from dmd2.errors import UserError
from dmd2.metrics import FeatureStats, Meter, Reference, measure_blocks
from dmd2.metrics.extractor import Observed
from dmd2.metrics.images import batch_of, patches, pixel_features, resized, thumbnails
from dmd2.metrics.inception import InceptionExtractor, to_input


class Few:
    """Features of a few pixels, and the arguments of every call."""

    name, dim = "few", 2

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], bool]] = []

    def observe(self, images, *, detailed=True, bicubic=False):
        self.calls.append((images.shape[1:], bicubic))
        return Observed(images[:, ::97, ::97].mean(axis=3).reshape(len(images), -1)[:, :2].astype(np.float64))


def picture(i: int, side: int = 512) -> np.ndarray:
    """A smooth image that differs from others at all scales."""
    x = np.linspace(0, 2 * np.pi, side)
    wave = 127 + 60 * np.sin(x[:, None] * (1 + i % 7) + i) + 60 * np.cos(x[None] * (1 + i % 5))
    return np.stack([wave, wave[::-1], wave.T], axis=2).astype(np.uint8)


def read(ids, side: int = 512):
    return np.stack([picture(int(i), side) for i in ids]), np.array([f"prompt {i}" for i in ids])


def test_large_images_are_kept_as_thumbnails_and_measured_as_such():
    reference = Reference.build(read, 12, Few(), None)
    assert reference.images.shape == (12, 64, 64, 3)
    assert reference.image_shape == (512, 512, 3)
    meter = Meter(reference, Few(), 12)
    found = measure_blocks(meter, lambda ids: ([read(ids)[0]], read(ids)[1]))["metrics"]
    assert found["nearest_distance"]["mean"] == pytest.approx(0, abs=1e-5)
    assert found["pixel_fd"]["mean"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match=r"samples are \(256, 256, 3\), the reference's images \(512, 512, 3\)"):
        meter.tally([read(range(12), 256)[0]], read(range(12))[1], 0)


def test_thumbnail_is_the_mean_of_blocks_and_a_small_image_itself():
    large, small = read([3])[0], read([3], 64)[0]
    blocks = large.reshape(1, 64, 8, 64, 8, 3).astype(np.float64).mean(axis=(2, 4))
    np.testing.assert_array_equal(thumbnails(large), np.rint(blocks).astype(np.uint8))
    assert thumbnails(small) is small
    np.testing.assert_allclose(pixel_features(thumbnails(large)), pixel_features(large), atol=0.5 / 127.5)


def test_patches_of_the_originals_take_the_place_of_those_of_the_stored_images():
    def originals(ids):
        return read([int(i) + 50 for i in ids], 299)[0]

    usual, stored = (
        Reference.build(read, 12, Few(), None, with_patches=True, **more) for more in ({}, {"read_patches": originals})
    )
    wanted = FeatureStats.of(Few().observe(originals(range(12))).features).gaussian()
    np.testing.assert_allclose(stored.patches.covariance, wanted.covariance)
    assert abs(usual.patches.mean - wanted.mean).max() > 1
    np.testing.assert_array_equal(usual.features.mean, stored.features.mean)
    np.testing.assert_allclose(FeatureStats.of(stored.kept_patches.astype(np.float64)).gaussian().mean, wanted.mean)


def test_memory_of_a_reference_does_not_grow_with_the_number_of_large_images(monkeypatch: pytest.MonkeyPatch):
    """Of whole images, 120 would be 94 MB and their float32 four times that."""
    monkeypatch.setattr("dmd2.metrics.reference.MAX_READ", 8 * 512 * 512 * 3)
    monkeypatch.setattr("dmd2.metrics.images.MAX_BATCH", 8 * 512 * 512 * 3)

    def peak(num: int) -> float:
        tracemalloc.start()
        reference = Reference.build(read, num, Few(), None, with_patches=True)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(reference.images) == num
        return found / 2**20

    few, many = peak(24), peak(120)
    per_image = (many - few) / 96
    # a thumbnail, its float32 vector, float64 pixels and features; a whole image alone is 0.75 MB
    assert per_image < 0.25, (few, many)


@pytest.mark.parametrize(("side", "most"), [(8, 1024), (64, 1024), (256, 1024), (512, 341), (1024, 85)])
def test_batches_of_large_images_are_small(side: int, most: int):
    assert batch_of((side, side, 3)) == most


def test_patch_is_the_centre_or_of_small_images_the_enlarged_half():
    large = read([0], 1024)[0]
    np.testing.assert_array_equal(patches(large), large[:, 362:661, 362:661])  # half to even, as torchvision
    small = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(
        patches(small)[0, :, :, 0], [[5, 5, 6, 6], [5, 5, 6, 6], [9, 9, 10, 10], [9, 9, 10, 10]]
    )
    assert patches(np.zeros((2, 9, 9, 3), np.uint8)).shape == (2, 9, 9, 3)


def test_resizing_cuts_the_centre_square_and_filters_by_lanczos():
    wide = np.concatenate([read([1], 100)[0]] * 2, axis=2)  # 100 x 200
    found = resized(wide, 30)
    square = Image.fromarray(wide[0, :, 50:150])
    np.testing.assert_array_equal(found[0], np.asarray(square.resize((30, 30), Image.Resampling.LANCZOS)))
    grey = read([1], 100)[0][..., :1]
    np.testing.assert_array_equal(resized(grey, 30)[..., 0], resized(grey.repeat(3, axis=3), 30)[..., 0])
    assert resized(grey, None) is resized(grey, 100) is grey


def test_bicubic_input_is_clean_fids():
    images = read([2, 5], 256)[0]
    clean = build_resizer("clean")
    wanted = np.stack([clean(image) for image in images])
    found = to_input(images)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


def test_inception_gets_the_bicubic_input_where_the_protocol_says_so():
    class Means(torch.nn.Module):
        def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return torch.cat([img.mean(dim=[2, 3]), torch.full([img.shape[0], 1], float(img.shape[2]))], dim=1)

    extractor = InceptionExtractor(torch.jit.script(Means()))
    images = read([2], 256)[0]
    own, bicubic = (extractor.observe(images, bicubic=value).features[0] for value in (False, True))
    assert (own[3], bicubic[3]) == (256, 299)
    np.testing.assert_allclose(bicubic[:3], to_input(images).mean(axis=(0, 1, 2)), rtol=1e-5)


def test_coco_protocol_compares_resized_samples_and_crops_of_whole_ones():
    real = Few()
    reference = Reference.build(lambda ids: read(ids, 512), 6, real, None, with_patches=True, bicubic=True)
    assert {bicubic for _, bicubic in real.calls} == {True}
    seen = Few()
    evaluation = config.Evaluation(protocols=("coco10k",), measures=("fid", "patch_fid"))
    meter = Meter(reference, seen, 6, ("coco10k",), evaluation=evaluation)
    meter.tally([read(range(6), 1024)[0]], read(range(6))[1], 0)
    assert set(seen.calls) == {((512, 512, 3), True), ((299, 299, 3), True)}


def test_records_say_what_a_protocol_does_and_no_more():
    assert describe(("edm",)) == {"edm": {"rounding": "round", "covariance_start": "zeros"}}
    assert describe(("coco30k",)) == {
        "coco30k": {"rounding": "truncate", "covariance_start": "zeros", "side": "256", "bicubic": "True"}
    }
    bicubic = {"coco10k", "coco30k", "coco10k_released", "coco30k_released"}
    assert {name for name, protocol in PROTOCOLS.items() if protocol.bicubic} == bicubic


def test_statistics_of_real_images_depend_on_few_keys():
    plain = config.Evaluation(protocols=("dmd2", "edm"), num_samples=7)
    assert plain.of_real_images() is None
    coco = config.Evaluation(protocols=("coco10k",), measures=("fid", "patch_fid"), num_samples=7)
    assert coco.of_real_images() == config.Evaluation(protocols=("coco10k",), measures=("fid", "patch_fid"))
