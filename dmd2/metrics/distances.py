"""Nearest-neighbour distances, precision and recall, in memory independent of N * M.

Shapes: N queries, M rows of data, D dimensions. |a - b|^2 = |a|^2 + |b|^2 - 2 ab is computed block by block in float64,
which gives a copy a distance below 1e-6, on the caller's device. scikit-learn and `prdc` keep the whole (N, M) matrix,
and importing them costs more time than searching the digits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmd2.metrics.images import Matrix, batches

Device = torch.device | str
NEIGHBOURS = 3  # k of Kynkaanniemi et al. 2019


def to_nearest(
    queries: NDArray, data: NDArray, *, k: int = 1, own: bool = True, device: Device = "cpu"
) -> NDArray[np.float64]:
    """Euclidean distance (N,) of each query (N, D) to its k-th nearest row of `data` (M, D); inf if M < k.

    `own=False` excludes the row with the query's own index.
    """
    nearest = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=device)
    for rows, columns, squares in _squares(queries, data, device):
        if not own and rows.start == columns.start:
            squares.fill_diagonal_(torch.inf)
        candidates = torch.cat([nearest[rows], squares], dim=1)
        nearest[rows] = candidates.topk(k, dim=1, largest=False).values
    return nearest[:, -1].sqrt().cpu().numpy()


def precision_recall(
    samples: NDArray, data: NDArray, radii: Matrix, *, k: int = NEIGHBOURS, device: Device = "cpu"
) -> tuple[float, float]:
    """Precision and recall of `samples` (N, D) against `data` (M, D) (Kynkaanniemi et al. 2019, eq. 1 and 2).

    A set's manifold is the union of balls around its members with radius the distance to the k-th nearest other member;
    `radii` (M,) are the data's. Precision is the fraction of samples in the data's manifold, recall the fraction of the
    data in the samples'.
    """
    limits = torch.from_numpy(radii).to(device).square()  # (M,)
    reach = torch.from_numpy(to_nearest(samples, samples, k=k, own=False, device=device)).to(device).square()  # (N,)
    inside = torch.zeros(len(samples), dtype=torch.bool, device=device)
    covered = torch.zeros(len(data), dtype=torch.bool, device=device)
    for rows, columns, squares in _squares(samples, data, device):
        inside[rows] |= (squares <= limits[columns]).any(dim=1)
        covered[columns] |= (squares <= reach[rows, None]).any(dim=0)
    return float(inside.double().mean()), float(covered.double().mean())


def _squares(a: NDArray, b: NDArray, device: Device) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances between blocks of rows of `a` and `b`, clamped to >= 0."""
    for rows in batches(len(a)):
        x = _block(a[rows], device)
        for columns in batches(len(b)):
            y = _block(b[columns], device)
            squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
            yield rows, columns, squares.clamp_(min=0)


def _block(rows: NDArray, device: Device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows)).to(device).double()
