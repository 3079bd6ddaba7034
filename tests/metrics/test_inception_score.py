"""The inception score against its definition and its bounds."""

import numpy as np
import pytest

from dmd2.metrics.score import SPLITS, ScoreSums


def of(probabilities: np.ndarray) -> ScoreSums:
    return ScoreSums.of(probabilities, np.arange(len(probabilities)), len(probabilities))


def random_probabilities(num: int, classes: int) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.full(classes, 0.2), size=num)


def test_equals_the_definition_over_consecutive_parts():
    p = random_probabilities(200, 7)
    scores = []
    for part in np.split(p, SPLITS):
        kl = (part * (np.log(part) - np.log(part.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(kl.mean()))
    assert of(p).score() == pytest.approx(np.mean(scores), rel=1e-12)


def test_sure_and_varied_answers_score_the_number_of_classes():
    assert of(np.tile(np.eye(10), (10, 1))).score() == pytest.approx(10)


@pytest.mark.parametrize("row", [np.eye(10)[3], np.full(10, 0.1)])
def test_answers_that_are_all_the_same_score_one(row: np.ndarray):
    assert of(np.tile(row, (50, 1))).score() == pytest.approx(1)


@pytest.mark.parametrize("cuts", [[1, 70, 71], [33, 66]])
def test_merged_parts_in_any_order_are_the_whole(cuts: list[int]):
    p, positions = random_probabilities(101, 5), np.arange(101)
    parts = [ScoreSums.of(a, b, 101) for a, b in zip(np.split(p, cuts), np.split(positions, cuts), strict=True)]
    merged = parts[-1]
    for part in parts[:-1]:
        merged = merged.merge(part)
    assert merged.score() == pytest.approx(of(p).score(), rel=1e-12)


def test_fewer_samples_than_parts_are_scored_by_the_parts_there_are():
    assert of(np.eye(3)).score() == pytest.approx(1)  # one sample a part: its own marginal
