"""The Frechet distance between two sets of features, and the statistics it needs.

Shapes: N samples, D features. Everything is float64.
"""

from __future__ import annotations

import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np

from dmd2.errors import UserError
from dmd2.metrics.images import Matrix
from dmd2.records import atomic

CovarianceStart = Literal["zeros", "ones"]
_UNREADABLE = (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)  # what np.load may raise


@dataclass(frozen=True)
class FeatureStats:
    """Count, mean and scatter of a set of features; batches are merged, so that no set has to fit in memory."""

    count: int
    mean: Matrix  # (D,)
    scatter: Matrix  # (D, D), sum of (f - mean)(f - mean)^T

    @classmethod
    def empty(cls, dim: int) -> Self:
        """The statistics of no sample: the start of an accumulation."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: Matrix) -> Self:
        """The statistics of one batch, (N, D)."""
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"features have shape {features.shape}; expected (N, D) with N at least 1")
        f = features.astype(np.float64, copy=False)
        mean = f.mean(axis=0)
        return cls(len(f), mean, (f - mean).T @ (f - mean))

    def merge(self, other: FeatureStats) -> FeatureStats:
        """The statistics of both sets together (pairwise update of Chan, Golub and LeVeque 1983)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count)
        return FeatureStats(count, mean, scatter)

    def covariance(self, start: CovarianceStart = "zeros", num_processes: int = 1) -> Matrix:
        """The covariance with divisor N - 1, (D, D).

        `ones` is the protocol of the released DMD2 code, whose accumulator of f f^T starts at ones in each of its P
        processes, which adds P/(N-1) to every entry; `zeros` is the covariance proper, as in EDM.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        first = {"zeros": 0, "ones": num_processes}[start]
        return (self.scatter + first) / (self.count - 1)

    def arrays(self, prefix: str = "") -> dict[str, Matrix]:
        """The three parts by name, ready for an .npz file."""
        return {
            f"{prefix}count": np.array(self.count),
            f"{prefix}mean": self.mean,
            f"{prefix}scatter": self.scatter,
        }

    def save(self, path: Path | str) -> None:
        """Writes an .npz file of plain arrays, atomically."""
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **self.arrays())

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads what `save` wrote; nothing is unpickled. Raises UserError naming a missing or foreign file."""
        return cls.from_arrays(read_npz(path, ("count", "mean", "scatter")))

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], prefix: str = "") -> Self:
        """The inverse of `arrays`."""
        return cls(int(arrays[f"{prefix}count"]), arrays[f"{prefix}mean"], arrays[f"{prefix}scatter"])


def read_npz(path: Path | str, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays `keys` of an .npz file, read without pickle.

    Raises UserError naming the file if it is missing, is no such archive, or lacks a key.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {key: archive[key] for key in keys if key in archive.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the rule that writes it, or restore it") from None
    except _UNREADABLE as error:
        raise UserError(f"{path}: not an .npz archive of plain arrays ({error}); delete it and run again") from None
    if missing := [key for key in keys if key not in found]:
        raise UserError(f"{path}: no array `{missing[0]}` in it; delete it and run the workflow again")
    return found


def frechet_distance(
    a: FeatureStats, b: FeatureStats, *, start: CovarianceStart = "zeros", num_processes: int = 1
) -> float:
    """The squared Frechet distance between Gaussians with the moments of `a` and `b`, by clean-fid's function.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, equation 6). `start` concerns the
    covariance of `a`, the generated side; that of the reference `b` always starts at zeros.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} dimensions; compare sets of one extractor")
    from cleanfid.fid import frechet_distance as distance  # takes seconds: it imports torchvision

    with warnings.catch_warnings():
        # Pixels that never change make the product singular, which clean-fid handles; SciPy warns of that and of
        # an argument that clean-fid passes.
        warnings.simplefilter("ignore")
        value = float(distance(a.mean, a.covariance(start, num_processes), b.mean, b.covariance()))
    if not np.isfinite(value):
        raise ValueError(f"the Frechet distance is {value}: the features of one side are not finite")
    return max(value, 0.0)  # rounding can leave -1e-13 for equal sets
