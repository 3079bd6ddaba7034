"""The Frechet distance between two sets of features, and the statistics it needs.

Shapes: N samples, D features. Everything is float64.
"""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from dmd2.config.protocols import CovarianceStart
from dmd2.errors import UserError
from dmd2.metrics.images import Matrix

_UNREADABLE = (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)  # what np.load may raise


class Gaussian(NamedTuple):
    """Mean and covariance of a set of features."""

    mean: Matrix  # (D,)
    covariance: Matrix  # (D, D)


@dataclass(frozen=True)
class FeatureStats:
    """Count, mean and scatter matrix of a set of features; mergeable, so that no set has to fit in memory."""

    count: int
    mean: Matrix  # (D,)
    scatter: Matrix  # (D, D), sum of (f - mean)(f - mean)^T

    @classmethod
    def empty(cls, dim: int) -> Self:
        """The statistics of an empty set."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: Matrix) -> Self:
        """The statistics of one batch (N, D). Raises ValueError for another rank or N = 0."""
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"features have shape {features.shape}; expected (N, D) with N at least 1")
        f = features.astype(np.float64, copy=False)
        mean = f.mean(axis=0)
        return cls(len(f), mean, (f - mean).T @ (f - mean))

    def merge(self, other: FeatureStats) -> FeatureStats:
        """The statistics of the union (pairwise update of Chan, Golub and LeVeque 1983)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count)
        return FeatureStats(count, mean, scatter)

    def covariance(self, start: CovarianceStart = "zeros", num_processes: int = 1) -> Matrix:
        """The covariance with divisor N - 1, (D, D).

        `ones` is the protocol of the released DMD2 code, which initialises the accumulator of f f^T with ones in each
        of its P processes and so adds P/(N-1) to every entry; `zeros` is the correct covariance, as in EDM. Raises
        ValueError for N < 2.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        first = {"zeros": 0, "ones": num_processes}[start]
        return (self.scatter + first) / (self.count - 1)

    def gaussian(self, start: CovarianceStart = "zeros", num_processes: int = 1) -> Gaussian:
        """The Gaussian with these moments; arguments as for `covariance`."""
        return Gaussian(self.mean, self.covariance(start, num_processes))


def read_published(path: Path | str, dim: int) -> Gaussian:
    """Reads published reference statistics: an .npz with `mu` (D,) and `sigma` (D, D), as EDM publishes them.

    Raises UserError naming the file and array unless they are finite moments of `dim` features.
    """
    arrays = read_npz(path, ("mu", "sigma"))
    for name, shape in (("mu", (dim,)), ("sigma", (dim, dim))):
        found = arrays[name]
        if found.shape != shape or found.dtype.kind != "f":
            raise UserError(
                f"{path}: `{name}` is {found.dtype} {found.shape}, the extractor has {dim} features; "
                f"correct features.reference"
            )
        if not np.isfinite(found).all():
            raise UserError(f"{path}: `{name}` contains NaN or infinity; download the file again")
    mean, covariance = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
    slack = 1e-6 * np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > slack or covariance.diagonal().min() < -slack:
        raise UserError(
            f"{path}: `sigma` is not a covariance (not symmetric, or a negative variance); download it again"
        )
    return Gaussian(mean, covariance)


def read_npz(path: Path | str, keys: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    """Reads the arrays `keys` of an .npz file, or all, without pickle.

    Raises UserError naming the file if it is missing, not such an archive, or lacks a key.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {key: archive[key] for key in archive.files if keys is None or key in keys}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the rule that writes it, or restore it") from None
    except _UNREADABLE as error:
        raise UserError(f"{path}: not an .npz archive of plain arrays ({error}); delete it and run again") from None
    require(found, keys or (), path)
    return found


def require(arrays: Mapping[str, np.ndarray], keys: tuple[str, ...], path: Path | str) -> None:
    """Raises UserError naming the file `path` if one of the arrays `keys` is missing."""
    if missing := [key for key in keys if key not in arrays]:
        raise UserError(f"{path}: contains no array `{missing[0]}`; delete it and run the workflow again")


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet distance between two Gaussians, at least 0, computed by clean-fid.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, equation 6). Raises ValueError for
    different dimensions or a result that is not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} dimensions; compare sets of one extractor")
    from cleanfid.fid import frechet_distance as distance  # slow: imports torchvision

    with warnings.catch_warnings():
        # Constant pixels make the product singular, which clean-fid handles; SciPy warns about it, and about a
        # deprecated argument that clean-fid passes.
        warnings.simplefilter("ignore")
        value = float(distance(a.mean, a.covariance, b.mean, b.covariance))
    if not np.isfinite(value):
        raise ValueError(f"the Frechet distance is {value}: the features of one side are not finite")
    return max(value, 0.0)  # rounding can leave -1e-13 for equal sets
