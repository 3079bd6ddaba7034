"""The contract of a feature extractor."""

from __future__ import annotations

from typing import Protocol

from dmd2.metrics.images import Images, Labels, Matrix


class Extractor(Protocol):
    """Turns images into the features that the Frechet distance compares.

    A distance means something only within one extractor with one set of weights: its name and the weights' SHA-256
    stand beside every number.
    """

    @property
    def name(self) -> str:
        """The key of `EXTRACTORS`."""

    @property
    def dim(self) -> int:
        """The number of features."""

    def features(self, images: Images) -> Matrix:
        """The features of the images, float64 (N, dim)."""

    def classify(self, images: Images) -> Labels | None:
        """The most probable class of each image, int64 (N,); None if the extractor knows no classes of the data."""
