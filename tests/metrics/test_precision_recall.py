"""Precision and recall against their definition written out over all pairs, and on sets whose answer is known."""

import numpy as np
import pytest

from dmd2.metrics import images as images_module
from dmd2.metrics.distances import precision_recall, to_nearest


def radii(data: np.ndarray, k: int = 3) -> np.ndarray:
    return to_nearest(data, data, k=k, own=False)


def by_definition(samples: np.ndarray, data: np.ndarray, k: int) -> tuple[float, float]:
    """Kynkaanniemi et al. 2019, eq. 1 and 2, a pair at a time."""

    def inside(queries: np.ndarray, members: np.ndarray) -> float:
        hits = 0
        for query in queries:
            hit = False
            for i, member in enumerate(members):
                others = np.sort([np.linalg.norm(member - other) for j, other in enumerate(members) if j != i])
                hit |= bool(np.linalg.norm(query - member) <= others[k - 1])
            hits += hit
        return hits / len(queries)

    return inside(samples, data), inside(data, samples)


@pytest.mark.parametrize("k", [1, 3])
def test_equals_the_definition_over_all_pairs(k: int):
    rng = np.random.default_rng(0)
    samples, data = rng.normal(size=(31, 4)) + 1.5, 1.5 * rng.normal(size=(37, 4))
    found = precision_recall(samples, data, radii(data, k), k=k)
    assert found == pytest.approx(by_definition(samples, data, k))
    assert 0 < found[0] < 1
    assert 0 < found[1] < 1


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(1)
    samples, data = rng.normal(size=(53, 6)), rng.normal(size=(47, 6)) + 0.5
    whole = precision_recall(samples, data, radii(data)), to_nearest(samples, data, k=3)
    batches = images_module.batches
    monkeypatch.setattr("dmd2.metrics.distances.batches", lambda num: batches(num, 10))
    parts = precision_recall(samples, data, radii(data)), to_nearest(samples, data, k=3)
    assert whole[0] == parts[0]
    np.testing.assert_allclose(whole[1], parts[1], rtol=1e-12)


def test_half_of_the_modes_is_precise_and_recalls_half():
    rng = np.random.default_rng(2)
    modes = np.array([[0.0, 0.0], [100.0, 0.0]])
    data = np.concatenate([mode + rng.normal(size=(400, 2)) for mode in modes])
    samples = modes[0] + 0.7 * rng.normal(size=(800, 2))
    precision, recall = precision_recall(samples, data, radii(data))
    assert precision > 0.97
    assert 0.4 < recall <= 0.5


def test_collapsed_samples_are_precise_and_recall_only_themselves():
    data = np.random.default_rng(3).normal(size=(50, 3))
    assert precision_recall(np.repeat(data[:1], 40, axis=0), data, radii(data)) == (1.0, 1 / 50)


def test_far_samples_are_neither():
    data = np.random.default_rng(4).normal(size=(50, 3))
    assert precision_recall(data + 1000, data, radii(data)) == (0.0, 0.0)


def test_fewer_rows_than_neighbours_have_no_radius():
    assert np.isinf(radii(np.eye(3))).all()
