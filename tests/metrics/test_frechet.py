"""Moments and distances against closed forms, NumPy and one-shot computation."""

from pathlib import Path

import numpy as np
import pytest

from dmd2.errors import UserError
from dmd2.metrics import FeatureStats, frechet_distance, read_published
from dmd2.metrics.frechet import Gaussian, read_npz


def gaussian(mean: list[float], covariance: list[list[float]]) -> Gaussian:
    return Gaussian(np.array(mean), np.array(covariance))


def of(features: np.ndarray) -> Gaussian:
    return FeatureStats.of(features).gaussian()


def test_distance_of_diagonal_gaussians_is_the_closed_form():
    a = gaussian([0.0, 1.0, 2.0], np.diag([1.0, 4.0, 9.0]).tolist())
    b = gaussian([1.0, 1.0, 0.0], np.diag([4.0, 4.0, 1.0]).tolist())
    expected = (1 + 0 + 4) + (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 1) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-9)


def test_distance_of_covariances_that_do_not_commute_is_the_closed_form():
    a, b = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    # For 2 x 2 matrices tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)).
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    found = frechet_distance(gaussian([0, 0], a.tolist()), gaussian([0.5, 0], b.tolist()))
    assert found == pytest.approx(0.25 + np.trace(a + b) - 2 * root, abs=1e-9)


@pytest.mark.parametrize("num_distinct", [1, 3, 40])
def test_distance_stays_right_for_collapsed_samples(num_distinct):
    rng = np.random.default_rng(0)
    data = np.hstack([rng.normal(size=(200, 12)), np.full((200, 4), -1.0)])  # four pixels never change
    few = np.repeat(data[:num_distinct], 50, axis=0)
    a, b = of(few), of(data)
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance) - 2 * cross
    # One single image makes the product the zero matrix, and clean-fid adds 1e-6 to the diagonals: 2 sqrt(1e-6 l)
    # for each eigenvalue l of the data.
    slack = 2 * np.sqrt(1e-6 * np.linalg.eigvalsh(b.covariance).clip(0)).sum() if num_distinct == 1 else 0
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-5 + 1.01 * slack)


def test_distance_to_itself_is_zero():
    features = np.random.default_rng(0).normal(size=(50, 5))
    assert frechet_distance(of(features), of(features)) == pytest.approx(0, abs=1e-6)


def test_moments_in_uneven_batches_equal_numpy_in_one():
    features = np.random.default_rng(1).normal(size=(1000, 7)) * 3 + 1e4  # a large mean would cost a naive sum digits
    streamed = FeatureStats.empty(7)
    for batch in np.split(features, [1, 4, 500, 501]):
        streamed = streamed.merge(FeatureStats.of(batch))
    assert streamed.count == 1000
    np.testing.assert_allclose(streamed.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(streamed.covariance(), np.cov(features.T), rtol=1e-9, atol=1e-9)


def test_merging_is_symmetric_and_empty_is_neutral():
    rng = np.random.default_rng(2)
    a, b = FeatureStats.of(rng.normal(size=(10, 3))), FeatureStats.of(rng.normal(size=(30, 3)) + 5)
    np.testing.assert_allclose(a.merge(b).scatter, b.merge(a).scatter, rtol=1e-12)
    np.testing.assert_array_equal(a.merge(FeatureStats.empty(3)).mean, a.mean)
    assert FeatureStats.empty(3).merge(FeatureStats.empty(3)).count == 0


@pytest.mark.parametrize("num_processes", [1, 8])
def test_ones_protocol_is_a_sum_started_at_ones_in_each_process(num_processes):
    features = np.random.default_rng(3).normal(size=(64, 4))
    total = np.zeros((4, 4))
    for part in np.split(features, num_processes):
        total += np.ones((4, 4)) + part.T @ part
    mean = features.mean(axis=0)
    released = (total - 64 * np.outer(mean, mean)) / 63
    found = FeatureStats.of(features)
    np.testing.assert_allclose(found.covariance("ones", num_processes), released, atol=1e-12)
    np.testing.assert_allclose(found.covariance("ones", num_processes) - found.covariance(), num_processes / 63)


def published(path: Path, **changed: np.ndarray) -> Path:
    """A file as EDM publishes them, with arrays changed."""
    features = np.random.default_rng(4).normal(size=(40, 3))
    np.savez(path, **({"mu": features.mean(axis=0), "sigma": np.cov(features.T)} | changed))
    return path


def test_published_statistics_are_used_as_they_are(tmp_path: Path):
    features = np.random.default_rng(4).normal(size=(40, 3))
    found = read_published(published(tmp_path / "ref.npz"), 3)
    np.testing.assert_array_equal(found.mean, features.mean(axis=0))
    np.testing.assert_array_equal(found.covariance, np.cov(features.T))
    other = of(np.random.default_rng(5).normal(size=(40, 3)))
    assert frechet_distance(other, found) == pytest.approx(frechet_distance(other, of(features)), rel=1e-9)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"mu": np.zeros(4)}, r"`mu` is float64 \(4,\), the extractor has 3 features"),
        ({"sigma": np.eye(4)}, r"`sigma` is float64 \(4, 4\), the extractor has 3 features"),
        ({"mu": np.zeros(3, np.int64)}, r"`mu` is int64"),
        ({"mu": np.array([0, np.nan, 1])}, "`mu` contains NaN"),
        ({"sigma": np.array([[1, 0.5, 0], [0, 1, 0], [0, 0, 1.0]])}, "`sigma` is not a covariance"),
        ({"sigma": np.diag([1.0, -1, 1])}, "`sigma` is not a covariance"),
        ({"mu": np.array([{"a": 1}, None, None], dtype=object)}, r"not an \.npz archive of plain arrays"),
    ],
)
def test_file_without_published_statistics_is_named(tmp_path: Path, changed, complaint):
    with pytest.raises(UserError, match=rf"ref\.npz: {complaint}"):
        read_published(published(tmp_path / "ref.npz", **changed), 3)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"not an archive"])
def test_damaged_file_is_named(tmp_path: Path, content: bytes):
    path = tmp_path / "stats.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"stats\.npz: not an"):
        read_npz(path, ("count",))


def test_single_array_in_place_of_an_archive_is_named(tmp_path: Path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"one\.npy: not an"):
        read_npz(tmp_path / "one.npy", ("count",))


def test_missing_file_and_missing_array_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        read_npz(tmp_path / "gone.npz", ("count",))
    np.savez(tmp_path / "other.npz", mean=np.zeros(2))
    with pytest.raises(UserError, match="no array `count`"):
        read_npz(tmp_path / "other.npz", ("count",))


def test_covariance_of_one_sample_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        FeatureStats.of(np.zeros((1, 3))).covariance()


def test_features_of_two_extractors_are_not_compared():
    with pytest.raises(ValueError, match="4 and 3 dimensions"):
        frechet_distance(of(np.zeros((5, 4))), of(np.zeros((5, 3))))


def test_features_that_are_not_finite_are_refused():
    bad = of(np.array([[0.0, np.nan], [1.0, 0.0]]))
    with pytest.raises(ValueError, match=r"not finite|infs or NaNs|imaginary"):
        frechet_distance(bad, of(np.eye(2)))
