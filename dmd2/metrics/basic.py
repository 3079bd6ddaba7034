"""Measures of any samples, and of samples with classes. Shapes: N samples, D features, K classes."""

from __future__ import annotations

import numpy as np

from dmd2.config.protocols import PROTOCOLS
from dmd2.metrics.context import Context
from dmd2.metrics.distances import NEIGHBOURS, precision_recall, to_nearest
from dmd2.metrics.diversity import ClassMoments, relative_diversity
from dmd2.metrics.frechet import FeatureStats, frechet_distance
from dmd2.metrics.images import as_vectors, thumbnails
from dmd2.metrics.labels import targets
from dmd2.metrics.measure import Batch, Draw, Means, Rows
from dmd2.metrics.reference import MAX_KEPT
from dmd2.metrics.score import ScoreSums


class FeatureDistance:
    """`fid`, or `fid_NAME` of a further protocol: the squared Frechet distance to the real images' features."""

    def __init__(self, context: Context, protocol: int = 0) -> None:
        self._protocol, self._reference = protocol, context.reference
        name = context.protocols[protocol]
        self._name = f"fid_{name}" if protocol else "fid"
        self._start = PROTOCOLS[name].covariance_start

    def observe(self, batch: Batch) -> FeatureStats:
        """Moments of the features."""
        return FeatureStats.of(batch.features(self._protocol))

    def value(self, sums: FeatureStats) -> dict[str, float]:
        """The distance."""
        return {self._name: frechet_distance(sums.gaussian(self._start), self._reference.features)}

    def floor(self, draw: Draw) -> dict[str, float]:
        """The distance of the drawn images to all kept ones, under the first protocol."""
        drawn = FeatureStats.of(draw.kept.features[draw.ids]).gaussian()
        return {} if self._protocol else {"fid": frechet_distance(drawn, draw.kept.gaussians[0])}


class PixelDistance:
    """`pixel_fd`: the squared Frechet distance to the real images' pixels in [-1, 1]."""

    def __init__(self, context: Context) -> None:
        self._reference, self._start = context.reference, PROTOCOLS[context.protocols[0]].covariance_start

    def observe(self, batch: Batch) -> FeatureStats:
        """Moments of the pixels."""
        return FeatureStats.of(batch.pixels)

    def value(self, sums: FeatureStats) -> dict[str, float]:
        """The distance."""
        return {"pixel_fd": frechet_distance(sums.gaussian(self._start), self._reference.pixels)}

    def floor(self, draw: Draw) -> dict[str, float]:
        """The distance of the drawn images to all kept ones."""
        drawn = FeatureStats.of(draw.kept.pixels[draw.ids]).gaussian()
        return {"pixel_fd": frechet_distance(drawn, draw.kept.gaussians[1])}


class NearestDistance:
    """`nearest_distance`: mean L2 distance in [-1, 1] pixel space to the nearest real image; near 0 means copies.

    Of the first `MAX_KEPT` samples of a block, and of thumbnails where images are large.
    """

    def __init__(self, context: Context) -> None:
        self._real, self._device = as_vectors(context.reference.images), context.device

    def observe(self, batch: Batch) -> Means:
        """The distances, summed."""
        queries = as_vectors(thumbnails(batch.images[0][: max(0, MAX_KEPT - batch.first)]))  # enough for the mean
        return Means.of(to_nearest(queries, self._real, device=self._device))

    def value(self, sums: Means) -> dict[str, float]:
        """The mean."""
        return sums.means("nearest_distance")

    def floor(self, draw: Draw) -> dict[str, float]:
        """The mean leave-one-out distance of the data: a drawn image is its own nearest."""
        return {"nearest_distance": draw.kept.reference.leave_one_out}


class ClassDiversity:
    """`diversity`: standard deviation of pixels within classes relative to the data's; 0 is one image per class."""

    def __init__(self, context: Context) -> None:
        self._variance = context.reference.class_variance

    def observe(self, batch: Batch) -> ClassMoments:
        """Moments of each class's pixels."""
        return ClassMoments.of(batch.pixels, targets(batch.labels), len(self._variance))

    def value(self, sums: ClassMoments) -> dict[str, float]:
        """The ratio. Raises ValueError if no class has two samples."""
        return {"diversity": relative_diversity(sums.variance(), self._variance)}

    def floor(self, draw: Draw) -> dict[str, float]:
        """The ratio of the drawn images."""
        labels = targets(draw.kept.reference.labels[draw.ids])
        return self.value(ClassMoments.of(draw.kept.pixels[draw.ids], labels, len(self._variance)))


class Accuracy:
    """`accuracy`: fraction of samples that the extractor classifies as their label; absent if it has no classes."""

    def __init__(self, context: Context) -> None:
        del context

    def observe(self, batch: Batch) -> Means | None:
        """How many are classified right."""
        return None if batch.seen.classes is None else Means.of(batch.seen.classes == batch.labels)

    def value(self, sums: Means) -> dict[str, float]:
        """The fraction."""
        return sums.means("accuracy")

    def floor(self, draw: Draw) -> dict[str, float]:
        """The fraction of the drawn images."""
        correct = draw.kept.reference.correct
        return {"accuracy": float(correct[draw.ids].mean())} if len(correct) else {}


class PrecisionRecall:
    """`precision`, `recall`: Kynkaanniemi et al. 2019, k = 3, with at most as many samples as kept real images."""

    def __init__(self, context: Context) -> None:
        self._reference, self._device = context.reference, context.device
        # As many samples as real images, since the manifold grows with the size of the set.
        self._num_kept = min(len(context.reference.images), context.num_samples)

    def observe(self, batch: Batch) -> Rows:
        """The features of the first samples of the block."""
        return Rows(batch.features()[: max(0, self._num_kept - batch.first)].astype(np.float32))

    def value(self, sums: Rows) -> dict[str, float]:
        """Both fractions."""
        real = self._reference
        found = precision_recall(sums.rows, real.kept_features, real.radii, device=self._device)
        return dict(zip(("precision", "recall"), found, strict=True))

    def floor(self, draw: Draw) -> dict[str, float]:
        """Of two random halves of the data: a drawn image is in the manifold by construction."""
        features = draw.kept.features[draw.order]
        samples, data = features[: len(features) // 2], features[len(features) // 2 :]
        radii = to_nearest(data, data, k=NEIGHBOURS, own=False, device=draw.kept.device)
        found = precision_recall(samples, data, radii, device=draw.kept.device)
        return dict(zip(("precision", "recall"), found, strict=True))


class InceptionScore:
    """`inception_score`: mean over ten splits of the block; absent without class probabilities."""

    def __init__(self, context: Context) -> None:
        self._num_samples = context.num_samples

    def observe(self, batch: Batch) -> ScoreSums | None:
        """The sums of each split."""
        probabilities = batch.seen.probabilities
        if probabilities is None:
            return None
        return ScoreSums.of(probabilities, batch.first + np.arange(len(probabilities)), self._num_samples)

    def value(self, sums: ScoreSums) -> dict[str, float]:
        """The score."""
        return {"inception_score": sums.score()}

    def floor(self, draw: Draw) -> dict[str, float]:
        """The score of the drawn images."""
        probabilities = draw.kept.reference.kept_probabilities
        if not probabilities.shape[1]:
            return {}
        positions = np.arange(len(draw.ids))
        return self.value(ScoreSums.of(probabilities[draw.ids].astype(np.float64), positions, len(draw.ids)))
