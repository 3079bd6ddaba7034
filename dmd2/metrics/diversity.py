"""Diversity within classes: detects mode collapse, which a Frechet distance and a classifier can hide.

Shapes: N samples, D dimensions, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dmd2.metrics.images import Matrix


@dataclass(frozen=True)
class ClassMoments:
    """Count, mean and summed squared deviation per class; mergeable over batches."""

    counts: Matrix  # (K,)
    means: Matrix  # (K, D)
    squares: Matrix  # (K,), sum over the class of |f - mean|^2

    @classmethod
    def of(cls, features: Matrix, labels: NDArray[np.int64], num_classes: int) -> Self:
        """The moments of one batch, (N, D) and (N,). Raises ValueError for a label outside 0 .. K-1."""
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(f"labels span {labels.min()}..{labels.max()}; there are {num_classes} classes")
        counts = np.bincount(labels, minlength=num_classes).astype(np.float64)
        sums = np.zeros((num_classes, features.shape[1]))
        np.add.at(sums, labels, features)
        means = sums / np.maximum(counts, 1)[:, None]
        deviations = ((features - means[labels]) ** 2).sum(axis=1)
        return cls(counts, means, np.bincount(labels, deviations, minlength=num_classes).astype(np.float64))

    def merge(self, other: ClassMoments) -> ClassMoments:
        """The moments of the union (pairwise update of Chan, Golub and LeVeque 1983)."""
        counts = self.counts + other.counts
        share = other.counts / np.maximum(counts, 1)
        delta = other.means - self.means
        means = self.means + delta * share[:, None]
        squares = self.squares + other.squares + (delta**2).sum(axis=1) * self.counts * share
        return ClassMoments(counts, means, squares)

    def variance(self) -> Matrix:
        """The trace of each class's covariance, (K,); NaN for a class with fewer than 2 members.

        Twice this is the mean squared distance between two different members of the class.
        """
        return np.where(self.counts >= 2, self.squares / np.maximum(self.counts - 1, 1), np.nan)


def relative_diversity(variance: Matrix, data_variance: Matrix) -> float:
    """Standard deviation within classes relative to the data's: 1 equals the data, 0 is one image per class.

    The square root of the ratio of the summed variances (K,) over the classes for which both are finite. Raises
    ValueError if there is none.
    """
    both = np.isfinite(variance) & np.isfinite(data_variance)
    if not both.any() or not data_variance[both].sum() > 0:
        raise ValueError("no class has two different images in the data and two samples; take more samples")
    return float(np.sqrt(variance[both].sum() / data_variance[both].sum()))
