"""How far samples are from the data and from one another: copies and collapse, which a Frechet distance can hide.

Shapes: N samples, M real images, D dimensions, K classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dmd2.metrics.images import Labels, Matrix, batches

MAX_QUERIES = 10_000  # samples per block whose neighbour is searched; a mean over more says nothing new


def nearest_distance(samples: NDArray, data: NDArray) -> float:
    """The mean Euclidean distance from each sample (N, D) to the nearest row of `data` (M, D)."""
    return float(_to_nearest(samples[:MAX_QUERIES], data).mean())


def leave_one_out_distance(data: NDArray) -> float:
    """The mean Euclidean distance from each row of `data` (M, D), M at least 2, to the nearest other row."""
    return float(_to_nearest(data[:MAX_QUERIES], data, own=False).mean())


def _to_nearest(queries: NDArray, data: NDArray, *, own: bool = True) -> NDArray[np.float64]:
    """The distance of each query to the nearest row of `data`, (N,); `own=False` leaves out the row of its number.

    |a - b|^2 = |a|^2 + |b|^2 - 2 ab by blocks, in float64, where a copy is within 1e-6 of 0. Not by scikit-learn: to
    import it takes longer than to search the digits.
    """
    squares = np.full(len(queries), np.inf)
    for rows in batches(len(queries)):
        a = queries[rows].astype(np.float64)
        for columns in batches(len(data)):
            b = data[columns].astype(np.float64)
            block = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
            if not own and rows.start == columns.start:
                np.fill_diagonal(block, np.inf)
            squares[rows] = np.minimum(squares[rows], block.min(axis=1))
    return np.sqrt(np.maximum(squares, 0))


def class_variance(features: Matrix, labels: Labels, num_classes: int) -> Matrix:
    """The trace of each class's covariance, (K,); NaN for a class with fewer than 2 members.

    Twice this is the mean squared distance between two different members of the class.
    """
    counts = np.bincount(labels, minlength=num_classes).astype(np.float64)
    sums = np.zeros((num_classes, features.shape[1]))
    np.add.at(sums, labels, features)
    means = sums / np.maximum(counts, 1)[:, None]
    squares = np.bincount(labels, ((features - means[labels]) ** 2).sum(axis=1), minlength=num_classes)
    return np.where(counts >= 2, squares / np.maximum(counts - 1, 1), np.nan)


def relative_diversity(variance: Matrix, data_variance: Matrix) -> float:
    """The spread within classes over the data's: 1 is the data's, 0 one image per class.

    The square root of the ratio of the mean variances, (K,) each, over the classes that both have.
    """
    both = np.isfinite(variance) & np.isfinite(data_variance)
    if not both.any() or not data_variance[both].sum() > 0:
        raise ValueError("no class has two different images in the data and two samples; take more samples")
    return float(np.sqrt(variance[both].sum() / data_variance[both].sum()))
