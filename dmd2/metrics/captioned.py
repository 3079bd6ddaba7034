"""Measures of samples with prompts, and the distance between patches. Shapes: N samples, G distinct captions."""

from __future__ import annotations

import numpy as np

from dmd2.config.protocols import PROTOCOLS
from dmd2.errors import UserError
from dmd2.metrics.context import Context
from dmd2.metrics.diversity import ClassMoments, relative_diversity
from dmd2.metrics.frechet import FeatureStats, frechet_distance
from dmd2.metrics.images import Labels, Matrix, patches
from dmd2.metrics.labels import held_out, numbered, targets
from dmd2.metrics.measure import Batch, Draw, Means


class PatchDistance:
    """`patch_fid`: the squared Frechet distance between features of centre crops (paper, section 5.2).

    `images.patches` says which crops; for small images this is an analogue of the published figure.
    """

    def __init__(self, context: Context) -> None:
        self._reference, self._start = context.reference, PROTOCOLS[context.protocols[0]].covariance_start
        if context.reference.patches is None:
            raise UserError("evaluation.measures: the reference has no patches for patch_fid; build it again")

    def observe(self, batch: Batch) -> FeatureStats:
        """Moments of the crops' features."""
        return FeatureStats.of(batch.features_of(patches(batch.whole[0])))

    def value(self, sums: FeatureStats) -> dict[str, float]:
        """The distance."""
        assert self._reference.patches is not None  # checked above
        return {"patch_fid": frechet_distance(sums.gaussian(self._start), self._reference.patches)}

    def floor(self, draw: Draw) -> dict[str, float]:
        """The distance of the drawn images' crops to those of all kept images."""
        features = draw.kept.reference.kept_patches.astype(np.float64)
        drawn, real = (FeatureStats.of(rows).gaussian() for rows in (features[draw.ids], features))
        return {"patch_fid": frechet_distance(drawn, real)}


class PromptDiversity:
    """`prompt_diversity`: distance between samples of one prompt relative to the data's; 0 is one image per prompt.

    The root mean squared distance of pairs, of pixels in [-1, 1], over the prompts that are captions of two or more
    real images. For data with one image per caption use `lpips_diversity`.
    """

    def __init__(self, context: Context) -> None:
        self._captions, self._variance = context.reference.captions, context.reference.class_variance
        if not np.isfinite(self._variance).any():
            raise UserError(
                "evaluation.measures: prompt_diversity needs data with several images of one caption; leave it out, "
                "or use lpips_diversity"
            )

    def observe(self, batch: Batch) -> ClassMoments:
        """Moments of the pixels of each caption's samples."""
        return self._moments(batch.pixels, batch.labels)

    def _moments(self, pixels: Matrix, labels: Labels) -> ClassMoments:
        groups = numbered(labels, self._captions)
        known = groups >= 0
        return ClassMoments.of(pixels[known], groups[known], len(self._captions))

    def value(self, sums: ClassMoments) -> dict[str, float]:
        """The ratio. Raises UserError if no prompt has two samples."""
        try:
            return {"prompt_diversity": relative_diversity(sums.variance(), self._variance)}
        except ValueError:
            raise UserError(
                "prompt_diversity: no prompt is both the data's and that of two samples; increase "
                "evaluation.num_samples above the number of prompts, or leave it out of evaluation.measures"
            ) from None

    def floor(self, draw: Draw) -> dict[str, float]:
        """The ratio of the drawn images."""
        return self.value(self._moments(draw.kept.pixels[draw.ids], draw.kept.reference.labels[draw.ids]))


class Alignment:
    """`alignment`: fraction of samples in which the extractor finds what the prompt says; `alignment_held_out` the same
    for compositions that no network was trained on. Absent if it has no classes.

    For digit_pairs this stands in for the CLIP score: both digits have to be right, so chance is 1 %.
    """

    def __init__(self, context: Context) -> None:
        del context

    def observe(self, batch: Batch) -> Means | None:
        """How many are right, of all and of the held-out compositions."""
        if batch.seen.classes is None:
            return None
        right = batch.seen.classes == targets(batch.labels)
        return Means.of(right, right[held_out(batch.labels)])

    def value(self, sums: Means) -> dict[str, float]:
        """The fractions; that of held-out compositions only where there are any."""
        return sums.means("alignment", "alignment_held_out")

    def floor(self, draw: Draw) -> dict[str, float]:
        """The fractions of the drawn images."""
        real = draw.kept.reference
        if not len(real.correct):
            return {}
        right = real.correct[draw.ids]
        return self.value(Means.of(right, right[held_out(real.labels[draw.ids])]))
