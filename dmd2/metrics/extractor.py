"""The interface of a feature extractor."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from dmd2.metrics.images import Images, Labels, Matrix


class Observed(NamedTuple):
    """The output of an extractor for N images."""

    features: Matrix  # (N, D) float64
    classes: Labels | None = None  # (N,), the most probable of the data's classes
    probabilities: Matrix | None = None  # (N, K) float64, of the extractor's own K classes; rows sum to 1


class Extractor(Protocol):
    """Computes the features that the Frechet distance compares.

    Distances are comparable only for the same extractor and weights, so its name and the weights' SHA-256 are recorded
    with every number.
    """

    @property
    def name(self) -> str:
        """The key of `EXTRACTORS`."""

    @property
    def dim(self) -> int:
        """The number of features."""

    def observe(self, images: Images, *, detailed: bool = True, bicubic: bool = False) -> Observed:
        """The features of the images, and their classes if the extractor was trained on the data's classes.

        `detailed`: also the class probabilities for the inception score, if the extractor has any. `bicubic`: resize
        images to the network's input as clean-fid does, where that is another size (`config.protocols`).
        """
