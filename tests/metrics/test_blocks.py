"""Measures of sample sets whose answer is known: the data, copies, collapse, noise."""

from pathlib import Path

import numpy as np
import pytest

from dmd2.errors import UserError
from dmd2.metrics import FeatureStats, Meter, Reference, Tally, frechet_distance, pixel_features, resample_floor
from dmd2.metrics import measure_blocks as measure_made
from dmd2.metrics.distances import to_nearest
from dmd2.metrics.diversity import ClassMoments, relative_diversity
from dmd2.metrics.images import batches


def measure(images: np.ndarray, labels: np.ndarray, reference, extractor, num_blocks: int = 1, **options) -> dict:
    meter = Meter(reference, extractor, len(images) // num_blocks, **options)
    return measure_made(meter, lambda ids: ([images[ids]], labels[ids]), num_blocks)


def means(result: dict) -> dict[str, float]:
    return {name: value["mean"] for name, value in result["metrics"].items()}


def test_the_data_scores_as_itself(digits, reference, extractor):
    found = means(measure(digits.images, digits.labels, reference, extractor))
    assert found["fid"] == pytest.approx(0, abs=1e-5)
    assert found["pixel_fd"] == pytest.approx(0, abs=1e-6)
    assert found["nearest_distance"] == pytest.approx(0, abs=1e-5)
    assert found["diversity"] == pytest.approx(1, abs=1e-9)
    assert found["accuracy"] == pytest.approx(reference.correct.mean())
    assert (found["precision"], found["recall"]) == (1, 1)
    assert 5 < found["inception_score"] <= 10


def test_collapse_to_one_image_per_class_keeps_accuracy_and_loses_diversity(digits, reference, extractor):
    first = np.array([np.flatnonzero((digits.labels == k) & reference.correct)[0] for k in range(10)])
    labels = np.tile(np.arange(10), 60)
    found = means(measure(digits.images[first][labels], labels, reference, extractor))
    assert found["accuracy"] == 1
    assert found["diversity"] == pytest.approx(0, abs=1e-9)
    assert found["pixel_fd"] > 5
    assert found["precision"] == 1
    assert found["recall"] < 0.02
    assert found["inception_score"] > 8  # which a collapse does not lower either


def test_wrong_labels_lower_accuracy_alone(digits, reference, extractor):
    right = means(measure(digits.images, digits.labels, reference, extractor))
    wrong = means(measure(digits.images, (digits.labels + 1) % 10, reference, extractor))
    assert wrong["accuracy"] < 0.05 < 0.9 < right["accuracy"]
    assert wrong["fid"] == right["fid"]


def test_more_noise_is_further_away(digits, reference, extractor):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=digits.images.shape)
    levels = [np.clip(digits.images + s * noise, 0, 255).round().astype(np.uint8) for s in (5, 20, 60)]
    found = [means(measure(images, digits.labels, reference, extractor)) for images in levels]
    for name in ("fid", "pixel_fd", "nearest_distance"):
        assert found[0][name] < found[1][name] < found[2][name]
    for name in ("precision", "recall"):
        assert found[0][name] > found[1][name] > found[2][name]


def test_blocks_are_the_measures_of_each_part_and_their_spread(digits, reference, extractor):
    images, labels = digits.images[:900], digits.labels[:900]
    found = measure(images, labels, reference, extractor, num_blocks=3)
    separate = [means(measure(images[i : i + 300], labels[i : i + 300], reference, extractor)) for i in (0, 300, 600)]
    assert (found["num_samples"], found["num_blocks"]) == (300, 3)
    for name, value in found["metrics"].items():
        blocks = np.array([part[name] for part in separate])
        np.testing.assert_allclose(value["blocks"], blocks)
        assert value["mean"] == pytest.approx(blocks.sum() / 3)
        assert value["sd"] == pytest.approx(np.sqrt(((blocks - blocks.mean()) ** 2).sum() / 2))


def test_one_block_has_no_standard_deviation(digits, reference, extractor):
    assert measure(digits.images, digits.labels, reference, extractor)["metrics"]["fid"]["sd"] is None


def test_ones_protocol_reaches_the_distance(digits, reference, extractor):
    images, labels = digits.images[:50], digits.labels[:50]
    zeros = means(measure(images, labels, reference, extractor))["fid"]
    ones = means(measure(images, labels, reference, extractor, protocols=["dmd2"]))["fid"]
    moments = FeatureStats.of(extractor.observe(images).features)
    shifted = FeatureStats(moments.count, moments.mean, moments.scatter + 1)
    assert ones == pytest.approx(frechet_distance(shifted.gaussian(), reference.features), rel=1e-6)
    assert ones != pytest.approx(zeros, rel=1e-4)


def test_further_protocol_adds_its_distance_and_changes_nothing_else(digits, reference, extractor):
    darker = (digits.images[:200].astype(int) - 3).clip(0).astype(np.uint8)
    labels = digits.labels[:200]
    alone = means(measure(digits.images[:200], labels, reference, extractor))
    as_dmd2 = means(measure(darker, labels, reference, extractor, protocols=["dmd2"]))
    meter = Meter(reference, extractor, 200, ["edm", "dmd2"])
    both = means(measure_made(meter, lambda ids: ([digits.images[ids], darker[ids]], labels[ids])))
    assert both.pop("fid_dmd2") == pytest.approx(as_dmd2["fid"], rel=1e-9)
    assert both == alone
    assert as_dmd2["fid"] != pytest.approx(alone["fid"], rel=1e-3)


def test_measures_of_a_curve_leave_the_others_as_they_are(digits, reference, extractor):
    full = means(measure(digits.images[:200], digits.labels[:200], reference, extractor))
    few = means(measure(digits.images[:200], digits.labels[:200], reference, extractor, detailed=False))
    assert list(few) == ["fid", "pixel_fd", "nearest_distance", "diversity", "accuracy"]
    assert few == {name: full[name] for name in few}


def test_neighbours_are_searched_for_the_first_samples_of_a_block_alone(
    digits, reference, extractor, monkeypatch: pytest.MonkeyPatch
):
    few = Reference.build(digits.read, 1797, extractor, 10, max_kept=60)
    images, labels = digits.images[-300:], digits.labels[-300:]
    first = means(measure(images[:100], labels[:100], few, extractor))
    monkeypatch.setattr("dmd2.metrics.basic.MAX_KEPT", 100)
    monkeypatch.setattr("dmd2.metrics.blocks.batches", lambda num, _: batches(num, 50))
    whole = means(measure(images, labels, few, extractor))
    assert whole["nearest_distance"] == pytest.approx(first["nearest_distance"], rel=1e-9)
    # as many samples as real images: the first 60
    assert (whole["precision"], whole["recall"]) == (first["precision"], first["recall"])
    assert whole["precision"] == means(measure(images[:60], labels[:60], few, extractor))["precision"]
    assert whole["fid"] != first["fid"]


def test_moments_of_many_batches_equal_those_of_one(digits, extractor, reference):  # 1797 images are two batches
    covariance = np.cov(extractor.observe(digits.images).features.T)
    np.testing.assert_allclose(reference.features.covariance, covariance, atol=1e-6)
    np.testing.assert_allclose(reference.pixels.mean, pixel_features(digits.images).mean(axis=0), atol=1e-12)


def test_nearest_distance_equals_brute_force():
    rng = np.random.default_rng(0)
    samples, data = rng.normal(size=(30, 6)), rng.normal(size=(40, 6))
    table = np.sqrt(((samples[:, None] - data[None]) ** 2).sum(-1))
    assert to_nearest(samples, data) == pytest.approx(table.min(axis=1), rel=1e-6)
    own = np.sqrt(((data[:, None] - data[None]) ** 2).sum(-1)) + np.diag(np.full(40, np.inf))
    assert to_nearest(data, data, own=False) == pytest.approx(own.min(axis=1), rel=1e-6)


def test_class_variance_is_half_the_mean_squared_distance_of_pairs():
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(9, 3)), np.array([0, 0, 0, 0, 2, 2, 2, 3, 2])
    found = ClassMoments.of(features, labels, 4).variance()
    for k in (0, 2):
        x = features[labels == k]
        pairs = [((x[i] - x[j]) ** 2).sum() for i in range(len(x)) for j in range(i)]
        assert found[k] == pytest.approx(np.mean(pairs) / 2)
    assert np.isnan(found[[1, 3]]).all()  # none, and one member


def test_diversity_of_images_shrunk_to_their_class_mean_is_the_factor():
    rng = np.random.default_rng(2)
    features, labels = rng.normal(size=(50, 4)), np.arange(50) % 5
    centres = np.stack([features[labels == k].mean(axis=0) for k in range(5)])[labels]
    data = ClassMoments.of(features, labels, 5).variance()
    shrunk = ClassMoments.of(centres + 0.3 * (features - centres), labels, 5).variance()
    assert relative_diversity(shrunk, data) == pytest.approx(0.3)


def test_diversity_needs_a_class_with_two_images():
    with pytest.raises(ValueError, match="take more samples"):
        relative_diversity(np.array([np.nan, 1.0]), np.array([1.0, np.nan]))


def test_floor_is_below_any_real_difference_and_shrinks_with_the_count(digits, reference, extractor):
    small, large = (means(resample_floor(reference, n, draws=3)) for n in (400, 8000))
    assert 0 < large["fid"] < small["fid"] < 5
    assert 0 < large["pixel_fd"] < small["pixel_fd"]
    assert large["diversity"] == pytest.approx(1, abs=0.02)
    assert large["nearest_distance"] == pytest.approx(2.05, abs=0.02)
    assert large["accuracy"] == pytest.approx(reference.correct.mean(), abs=0.01)


def test_floor_of_pixels_is_what_its_expectation_says(reference):
    # For small differences E FD ~ tr(S)/n from the means alone, and more from the covariances.
    found = means(resample_floor(reference, 5391, draws=4))["pixel_fd"]
    from_means = np.trace(reference.pixels.covariance) / 5391
    assert from_means < found < 10 * from_means


def test_floor_depends_on_its_seed_alone(reference):
    assert resample_floor(reference, 300, seed=1) == resample_floor(reference, 300, seed=1)
    assert resample_floor(reference, 300, seed=1) != resample_floor(reference, 300, seed=2)


def test_saved_reference_measures_the_same(digits, reference, extractor, tmp_path: Path):
    reference.save(tmp_path / "reference.npz")
    loaded = Reference.load(tmp_path / "reference.npz")
    sample = digits.images[:100][:, ::-1], digits.labels[:100]
    assert measure(*sample, loaded, extractor) == measure(*sample, reference, extractor)
    assert resample_floor(loaded, 100) == resample_floor(reference, 100)


def test_reference_of_an_earlier_version_measures_the_same(digits, reference, extractor, tmp_path: Path):
    reference.save(tmp_path / "reference.npz")
    with np.load(tmp_path / "reference.npz") as archive:
        earlier = {name: archive[name] for name in archive.files}
    for name in ("captions", "kept_patches", "image_shape"):
        del earlier[name]
    np.savez(tmp_path / "earlier.npz", **earlier)
    sample = digits.images[:100], digits.labels[:100]
    loaded = Reference.load(tmp_path / "earlier.npz")
    assert measure(*sample, loaded, extractor) == measure(*sample, reference, extractor)
    del earlier["radii"]
    np.savez(tmp_path / "damaged.npz", **earlier)
    with pytest.raises(UserError, match=r"damaged\.npz: contains no array `radii`"):
        Reference.load(tmp_path / "damaged.npz")


@pytest.mark.parametrize("name", ["nearest", "fid.Unknown.x", "fid.Means.totals"])
def test_stored_sums_of_another_version_are_refused_by_name(tmp_path: Path, name: str):
    np.savez(tmp_path / "tally.npz", count=np.array(3), **{name: np.zeros(2)})
    with pytest.raises(UserError, match=r"tally\.npz: not the sums of samples"):
        Tally.load(tmp_path / "tally.npz")


def test_kept_images_are_a_choice_but_the_moments_are_of_all(digits, reference, extractor):
    few = Reference.build(digits.read, len(digits.images), extractor, 10, max_kept=100)
    assert len(few.images) == len(few.labels) == len(few.kept_features) == 100
    np.testing.assert_array_equal(few.features.mean, reference.features.mean)


def test_reference_of_another_extractor_or_size_is_refused(digits, reference, extractor):
    class Other:
        name, dim = "inception", 2048

    with pytest.raises(UserError, match="built with extractor classifier of 64 features, the samples come with inc"):
        measure(digits.images[:10], digits.labels[:10], reference, Other())
    with pytest.raises(UserError, match=r"samples are \(16, 16, 1\), the reference's images \(8, 8, 1\)"):
        measure(np.zeros((10, 16, 16, 1), np.uint8), digits.labels[:10], reference, extractor)


def test_published_moments_take_the_place_of_the_features_and_of_nothing_else(digits, reference, extractor):
    other = FeatureStats.of(np.random.default_rng(0).normal(size=(90, 64))).gaussian()
    found = Reference.build(digits.read, 1797, extractor, 10, published=(other, "refs.npz 0123"))
    assert (reference.origin, found.origin) == ("data", "refs.npz 0123")
    sample = digits.images[:300], digits.labels[:300]
    ours, theirs = (means(measure(*sample, used, extractor)) for used in (reference, found))
    moments = FeatureStats.of(extractor.observe(sample[0]).features).gaussian()
    assert theirs.pop("fid") == pytest.approx(frechet_distance(moments, other), rel=1e-6)
    ours.pop("fid")
    assert theirs == ours


def test_part_of_a_block_is_not_measured_as_one(digits, reference, extractor):
    meter = Meter(reference, extractor, 20)
    with pytest.raises(ValueError, match="a block has 20 samples, got 10"):
        meter.measures(meter.tally([digits.images[:10]], digits.labels[:10], 0))
    with pytest.raises(ValueError, match="1 samples are not a block"):
        measure(digits.images[:1], digits.labels[:1], reference, extractor)
