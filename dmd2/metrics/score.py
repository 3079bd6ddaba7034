"""The inception score (Salimans et al. 2016): confidence and diversity of a classifier's predictions.

Shapes: N samples, K classes of the classifier, S splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dmd2.metrics.images import Matrix

SPLITS = 10  # consecutive parts of a block whose scores are averaged, as in published scores


@dataclass(frozen=True)
class ScoreSums:
    """Sufficient statistics of the score of each split; mergeable over batches."""

    counts: Matrix  # (S,)
    probabilities: Matrix  # (S, K)
    negentropies: Matrix  # (S,), of sum_k p_k ln p_k

    @classmethod
    def of(cls, probabilities: Matrix, positions: NDArray[np.int64], num_samples: int) -> Self:
        """The sums of samples with class probabilities (N, K), at `positions` (N,) in a block of `num_samples`."""
        ends = [num_samples * (i + 1) // SPLITS for i in range(SPLITS)]
        split = np.searchsorted(ends, positions, side="right")
        sums = np.zeros((SPLITS, probabilities.shape[1]))
        np.add.at(sums, split, probabilities)
        counts = np.bincount(split, minlength=SPLITS).astype(np.float64)
        negentropies = np.bincount(split, _negentropy(probabilities), minlength=SPLITS).astype(np.float64)
        return cls(counts, sums, negentropies)

    def merge(self, other: ScoreSums) -> ScoreSums:
        """The sums of the union."""
        return ScoreSums(
            self.counts + other.counts,
            self.probabilities + other.probabilities,
            self.negentropies + other.negentropies,
        )

    def score(self) -> float:
        """The mean over the splits of exp E[KL(p(k | x) || p(k))], in [1, K]."""
        used = self.counts > 0
        counts = self.counts[used]
        marginal = self.probabilities[used] / counts[:, None]
        return float(np.exp(self.negentropies[used] / counts - _negentropy(marginal)).mean())


def _negentropy(p: Matrix) -> Matrix:
    """sum_k p_k ln p_k of each row, with 0 ln 0 = 0."""
    return (p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1)
