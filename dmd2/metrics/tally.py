"""Metrics of a block of samples from mergeable sums, so that a block may exceed memory and be split over processes.

A `Meter` computes the `Tally` of a batch, tallies of one block are merged, and the meter computes the metrics of the
whole. Shapes: N samples, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dmd2.config.protocols import PROTOCOLS
from dmd2.files import atomic
from dmd2.metrics.distances import Device, precision_recall, to_nearest
from dmd2.metrics.diversity import ClassMoments, relative_diversity
from dmd2.metrics.extractor import Extractor
from dmd2.metrics.frechet import FeatureStats, frechet_distance, read_npz
from dmd2.metrics.images import Images, Labels, as_vectors, check_images, pixel_features
from dmd2.metrics.reference import MAX_KEPT, Reference
from dmd2.metrics.score import ScoreSums

_UNKNOWN = -1


@dataclass(frozen=True)
class Tally:
    """The sums of some samples of a block; tallies of disjoint samples of one block can be merged."""

    count: int
    features: tuple[FeatureStats, ...]  # by protocol
    pixels: FeatureStats
    classes: ClassMoments  # of the pixels
    nearest: NDArray[np.float64]  # (2,), sum of the distances to the nearest real image, and how many
    num_correct: int  # _UNKNOWN if the extractor knows no classes
    score: ScoreSums  # of no classes if the extractor gives no probabilities
    kept: NDArray[np.float32]  # features of the first samples of the block, for precision and recall

    def merge(self, other: Tally) -> Tally:
        """The sums of the union of both sets of samples."""
        return Tally(
            count=self.count + other.count,
            features=tuple(a.merge(b) for a, b in zip(self.features, other.features, strict=True)),
            pixels=self.pixels.merge(other.pixels),
            classes=self.classes.merge(other.classes),
            nearest=self.nearest + other.nearest,
            num_correct=_UNKNOWN if self.num_correct == _UNKNOWN else self.num_correct + other.num_correct,
            score=self.score.merge(other.score),
            kept=np.concatenate([self.kept, other.kept]),
        )

    def save(self, path: Path | str) -> None:
        """Writes an .npz file of plain arrays, atomically."""
        arrays = {name: np.asarray(getattr(self, name)) for name in ("count", "nearest", "num_correct", "kept")}
        for i, stats in enumerate((*self.features, self.pixels)):
            arrays |= {f"stats{i}_{name}": np.asarray(value) for name, value in vars(stats).items()}
        for group in ("classes", "score"):
            arrays |= {f"{group}_{name}": value for name, value in vars(getattr(self, group)).items()}
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, num_protocols=np.array(len(self.features)), **arrays)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads a file of `save`; nothing is unpickled. Raises UserError naming a missing or damaged file."""
        num_stats = int(read_npz(path, ("num_protocols",))["num_protocols"]) + 1
        parts = {f"stats{i}": ("count", "mean", "scatter") for i in range(num_stats)}
        parts |= {"classes": ("counts", "means", "squares"), "score": ("counts", "probabilities", "negentropies")}
        keys = [f"{group}_{name}" for group, names in parts.items() for name in names]
        a = read_npz(path, ("count", "nearest", "num_correct", "kept", *keys))
        groups = {group: [a[f"{group}_{name}"] for name in names] for group, names in parts.items()}
        stats = [FeatureStats(int(count), mean, scatter) for count, mean, scatter in list(groups.values())[:num_stats]]
        return cls(
            count=int(a["count"]),
            features=tuple(stats[:-1]),
            pixels=stats[-1],
            classes=ClassMoments(*groups["classes"]),
            nearest=a["nearest"],
            num_correct=int(a["num_correct"]),
            score=ScoreSums(*groups["score"]),
            kept=a["kept"],
        )


class Meter:
    """Measures blocks of `num_samples` samples against a reference.

    The first of `protocols` is used for all metrics but `fid_NAME` of the others. `detailed` enables precision, recall
    and the inception score, which the training curve does not need. Raises ValueError for fewer than 2 samples.
    """

    def __init__(
        self,
        reference: Reference,
        extractor: Extractor,
        num_samples: int,
        protocols: Sequence[str] = ("edm",),
        *,
        detailed: bool = True,
        device: Device = "cpu",
    ) -> None:
        if num_samples < 2:
            raise ValueError(f"{num_samples} samples are not a block: a covariance needs at least 2")
        self.reference, self.extractor, self.num_samples = reference, extractor, num_samples
        self.protocols, self.detailed, self.device = tuple(protocols), detailed, device
        self._real = as_vectors(reference.images)
        # As many samples as real images, since the manifold grows with the size of the set.
        self._num_kept = min(len(reference.images), num_samples) if detailed else 0

    def tally(self, images: Sequence[Images], labels: Labels, first: int) -> Tally:
        """The sums of samples [first, first + N) of a block; `images` has one array for each protocol."""
        check_images(images[0], labels)
        self.reference.expect(self.extractor, images[0])
        seen = self.extractor.observe(images[0], detailed=self.detailed)
        further = [self.extractor.observe(other, detailed=False).features for other in images[1:]]
        pixels = pixel_features(images[0])
        asked = as_vectors(images[0][: max(0, MAX_KEPT - first)])  # enough for the mean
        distances = to_nearest(asked, self._real, device=self.device)
        probabilities = np.zeros((len(labels), 0)) if seen.probabilities is None else seen.probabilities
        return Tally(
            count=len(labels),
            features=tuple(FeatureStats.of(features) for features in (seen.features, *further)),
            pixels=FeatureStats.of(pixels),
            classes=ClassMoments.of(pixels, labels, len(self.reference.class_variance)),
            nearest=np.array([distances.sum(), len(distances)]),
            num_correct=_UNKNOWN if seen.classes is None else int((seen.classes == labels).sum()),
            score=ScoreSums.of(probabilities, first + np.arange(len(labels)), self.num_samples),
            kept=seen.features[: max(0, self._num_kept - first)].astype(np.float32),
        )

    def measures(self, tally: Tally) -> dict[str, float]:
        """The metrics of a whole block. Raises ValueError for another number of samples.

        - fid, fid_NAME, pixel_fd: squared Frechet distance to the real images' features under the first and the other
          protocols, and to their pixels in [-1, 1]
        - nearest_distance: mean L2 distance in [-1, 1] pixel space to the nearest real image; near 0 means copies
        - diversity: standard deviation within classes relative to the data's; 0 means one image per class
        - accuracy: fraction of samples that the extractor classifies as their label; absent if it has no classes
        - precision, recall: Kynkaanniemi et al. 2019, k = 3, with at most as many samples as kept real images
        - inception_score: mean over ten splits of the block; absent without class probabilities
        """
        if tally.count != self.num_samples:
            raise ValueError(f"a block has {self.num_samples} samples, got {tally.count}")
        names = ["fid", *(f"fid_{name}" for name in self.protocols[1:])]
        starts = [PROTOCOLS[name].covariance_start for name in self.protocols]
        distances = {
            name: frechet_distance(stats.gaussian(start), self.reference.features)
            for name, stats, start in zip(names, tally.features, starts, strict=True)
        }
        values = {
            **distances,
            "pixel_fd": frechet_distance(tally.pixels.gaussian(starts[0]), self.reference.pixels),
            "nearest_distance": float(tally.nearest[0] / tally.nearest[1]),
            "diversity": relative_diversity(tally.classes.variance(), self.reference.class_variance),
        }
        if tally.num_correct != _UNKNOWN:
            values["accuracy"] = tally.num_correct / tally.count
        return values | self._details(tally)

    def _details(self, tally: Tally) -> dict[str, float]:
        if not self.detailed:
            return {}
        real = self.reference
        found = precision_recall(tally.kept, real.kept_features, real.radii, device=self.device)
        values = dict(zip(("precision", "recall"), found, strict=True))
        if tally.score.probabilities.shape[1]:
            values["inception_score"] = tally.score.score()
        return values
