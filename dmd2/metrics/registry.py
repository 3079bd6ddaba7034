"""The measures by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dmd2.config.protocols import DETAILED, MEASURES_OF_CAPTIONS, MEASURES_OF_CLASSES
from dmd2.metrics.basic import (
    Accuracy,
    ClassDiversity,
    FeatureDistance,
    InceptionScore,
    NearestDistance,
    PixelDistance,
    PrecisionRecall,
)
from dmd2.metrics.captioned import Alignment, PatchDistance, PromptDiversity
from dmd2.metrics.clip_score import ClipScore
from dmd2.metrics.context import Context
from dmd2.metrics.measure import Measure
from dmd2.metrics.perceptual_diversity import PerceptualDiversity

MEASURES: dict[str, Callable[[Context], Measure]] = {
    "fid": FeatureDistance,
    "patch_fid": PatchDistance,
    "clip_score": ClipScore,
    "lpips_diversity": PerceptualDiversity,
    "pixel_fd": PixelDistance,
    "nearest_distance": NearestDistance,
    "diversity": ClassDiversity,
    "prompt_diversity": PromptDiversity,
    "accuracy": Accuracy,
    "alignment": Alignment,
    "precision_recall": PrecisionRecall,
    "inception_score": InceptionScore,
}
"""Measures by the names of `evaluation.measures`."""


def measures_of(context: Context, *, detailed: bool = True) -> dict[str, Measure]:
    """The measures of an evaluation, by name, in the order of the record's values.

    The default is that of the data's kind of labels. Each further protocol adds `fid_NAME` after `fid`. Without
    `detailed` those in `DETAILED` are left out, which a training curve does not need. Raises UserError for a measure
    that the reference does not allow.
    """
    found: dict[str, Measure] = {}
    for name in chosen(context.evaluation.measures, captions=len(context.reference.captions) > 0):
        if detailed or name not in DETAILED:
            found[name] = MEASURES[name](context)
        if name == "fid":
            further = range(1, len(context.protocols))
            found |= {f"fid_{context.protocols[i]}": FeatureDistance(context, i) for i in further}
    return found


def chosen(measures: Sequence[str] | None, *, captions: bool) -> Sequence[str]:
    """The names in `evaluation.measures`, or the default for data with captions or with classes."""
    return measures or (MEASURES_OF_CAPTIONS if captions else MEASURES_OF_CLASSES)
