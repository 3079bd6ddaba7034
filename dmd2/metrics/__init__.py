"""Feature extractors, Frechet distances and other metrics of a set of samples.

Images are uint8 (N, H, W, C), labels int64 classes or str prompts (N,).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dmd2 import config
from dmd2.errors import UserError, suggestion
from dmd2.metrics.blocks import Make, measure_blocks, resample_floor, summary, tally_range
from dmd2.metrics.classifier import load_classifier, train_classifier
from dmd2.metrics.extractor import Extractor
from dmd2.metrics.frechet import FeatureStats, frechet_distance, read_published
from dmd2.metrics.images import pixel_features
from dmd2.metrics.inception import load_inception
from dmd2.metrics.reference import Reference
from dmd2.metrics.registry import MEASURES, chosen
from dmd2.metrics.tally import Meter, Tally

__all__ = [
    "EXTRACTORS",
    "MEASURES",
    "Extractor",
    "FeatureStats",
    "Make",
    "Meter",
    "Reference",
    "Tally",
    "chosen",
    "frechet_distance",
    "load_extractor",
    "measure_blocks",
    "pixel_features",
    "read_published",
    "resample_floor",
    "summary",
    "tally_range",
    "train_classifier",
]

EXTRACTORS: dict[str, Callable[..., Extractor]] = {
    "classifier": load_classifier,
    "pair_classifier": load_classifier,
    "inception": load_inception,
}


def load_extractor(
    features: config.Features,
    data: config.Data,
    weights: Path | None,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> Extractor:
    """Loads the extractor `features.kind` with the weights in `weights`.

    `weights` is the output of the rule that trains the classifier; None means the user's file in `features.weights`.
    Images are processed in batches of `batch_size`. Raises UserError for an unknown kind, and for a missing or
    unsuitable file.
    """
    if features.kind not in EXTRACTORS:
        raise UserError(f"features.kind: no extractor {features.kind!r}; {suggestion(features.kind, EXTRACTORS)}")
    return EXTRACTORS[features.kind](features, data, weights, device, batch_size)
