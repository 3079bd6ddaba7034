"""The interface of a measure, what it sees of samples, and the sums that it adds up.

A measure observes batches of a block's samples as `Sums`, which merge over batches and processes, and computes its
values from those of the whole block. Shapes: N samples of a batch, M kept real images, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from dmd2.config.protocols import PROTOCOLS
from dmd2.metrics.distances import Device
from dmd2.metrics.extractor import Extractor, Observed
from dmd2.metrics.frechet import FeatureStats, Gaussian
from dmd2.metrics.images import Images, Labels, Matrix, pixel_features, resized
from dmd2.metrics.reference import Reference


class Batch:
    """Samples [first, first + N) of a block, and what several measures compute of them, computed once.

    `whole` has one array of samples (N, H, W, C) for each protocol, `images` the same as the protocol resizes them.
    """

    def __init__(
        self,
        extractor: Extractor,
        whole: Sequence[Images],
        labels: Labels,
        first: int = 0,
        protocols: Sequence[str] = ("edm",),
        *,
        detailed: bool = True,
    ) -> None:
        self._extractor, self.labels, self.first, self._detailed = extractor, labels, first, detailed
        self.whole, self._protocols = whole, [PROTOCOLS[name] for name in protocols]
        self.images = [resized(x, protocol.side) for x, protocol in zip(whole, self._protocols, strict=True)]

    @cached_property
    def seen(self) -> Observed:
        """What the extractor observes of the first protocol's images."""
        return self._observed(self.images[0], 0, self._detailed)

    def features(self, protocol: int = 0) -> Matrix:
        """The features (N, D) of the images of a protocol."""
        return self._observed(self.images[protocol], protocol).features if protocol else self.seen.features

    def features_of(self, images: Images) -> Matrix:
        """The features of other images under the first protocol."""
        return self._observed(images, 0).features

    @cached_property
    def pixels(self) -> Matrix:
        """The pixel features of the first protocol's images."""
        return pixel_features(self.images[0])

    def _observed(self, images: Images, protocol: int, detailed: bool = False) -> Observed:
        return self._extractor.observe(images, detailed=detailed, bicubic=self._protocols[protocol].bicubic)


class Sums(Protocol):
    """Sums over some samples: a dataclass of arrays and numbers alone, so that any can be stored."""

    def merge(self, other: Any, /) -> Any:
        """The sums of the union of two disjoint sets of samples."""


@dataclass(frozen=True)
class Means:
    """Sums and counts of S quantities whose means are the values."""

    totals: NDArray[np.float64]  # (S,)
    counts: NDArray[np.float64]  # (S,)

    @classmethod
    def of(cls, *values: NDArray) -> Self:
        """The sums of S arrays of any length."""
        return cls(np.array([float(x.sum()) for x in values]), np.array([float(len(x)) for x in values]))

    def merge(self, other: Means) -> Means:
        """The sums of the union."""
        return Means(self.totals + other.totals, self.counts + other.counts)

    def means(self, *names: str) -> dict[str, float]:
        """The means by name; a quantity without members is absent."""
        pairs = zip(names, self.totals, self.counts, strict=True)
        return {name: float(total / count) for name, total, count in pairs if count}


@dataclass(frozen=True)
class Rows:
    """Rows of features that are kept, of the first samples of a block."""

    rows: NDArray[np.float32]  # (N, D)

    def merge(self, other: Rows) -> Rows:
        """The rows of both, in their order."""
        return Rows(np.concatenate([self.rows, other.rows]))


@dataclass(frozen=True)
class Labelled:
    """Images that are kept with their labels, of the first samples of a block."""

    images: Images  # (N, H, W, C)
    texts: NDArray[np.str_]  # (N,), labels as text

    def merge(self, other: Labelled) -> Labelled:
        """The images of both, in their order."""
        return Labelled(np.concatenate([self.images, other.images]), np.concatenate([self.texts, other.texts]))


class Kept:
    """The kept real images in the forms from which `Measure.floor` draws."""

    def __init__(self, reference: Reference, device: Device) -> None:
        self.reference, self.device = reference, device

    @cached_property
    def features(self) -> Matrix:
        """(M, D)."""
        return self.reference.kept_features.astype(np.float64)

    @cached_property
    def pixels(self) -> Matrix:
        """(M, dimension of the pixel features)."""
        return pixel_features(self.reference.images)

    @cached_property
    def gaussians(self) -> tuple[Gaussian, Gaussian]:
        """Of the features and of the pixels."""
        return FeatureStats.of(self.features).gaussian(), FeatureStats.of(self.pixels).gaussian()


class Draw(NamedTuple):
    """Real images drawn with replacement in place of samples, and a random order of all kept ones."""

    kept: Kept
    ids: NDArray[np.int64]  # (N,), of kept images
    order: NDArray[np.int64]  # (M,)


class Measure(Protocol):
    """One or several named values of a block of samples."""

    def observe(self, batch: Batch) -> Sums | None:
        """The sums of a batch; None if this extractor, or this data, does not provide what is measured."""

    def value(self, sums: Any) -> dict[str, float]:
        """The values of a whole block by column name, from its merged sums."""

    def floor(self, draw: Draw) -> dict[str, float]:
        """The values of real images in place of samples; empty if that means nothing."""
