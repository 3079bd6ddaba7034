"""The contract of a feature extractor."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from dmd2.metrics.images import Images, Labels, Matrix


class Observed(NamedTuple):
    """What an extractor says of N images."""

    features: Matrix  # (N, D) float64
    classes: Labels | None = None  # (N,), the most probable of the data's classes
    probabilities: Matrix | None = None  # (N, K) float64, of whatever classes the extractor knows; rows sum to 1


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

    def observe(self, images: Images, *, detailed: bool = True) -> Observed:
        """The features of the images, and their classes if it knows the data's.

        `detailed` asks for the class probabilities of the inception score too, where it has some.
        """
