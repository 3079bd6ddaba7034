"""All measures of a set of samples, block by block, and what the data itself would score.

Shapes: N samples in S blocks. A result is what the `metrics` record of a run holds:
`{"metrics": {name: {"mean", "sd", "blocks"}}, "num_samples": per block, "num_blocks": S}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dmd2.metrics.diversity import class_variance, nearest_distance, relative_diversity
from dmd2.metrics.extractor import Extractor
from dmd2.metrics.frechet import CovarianceStart, FeatureStats, frechet_distance
from dmd2.metrics.images import Images, Labels, as_vectors, batches, check_images, pixel_features
from dmd2.metrics.reference import Reference, accumulate


def measure(
    images: Images,
    labels: Labels,
    reference: Reference,
    extractor: Extractor,
    num_blocks: int = 1,
    covariance_start: CovarianceStart = "zeros",
) -> dict[str, Any]:
    """The measures of `num_blocks` equal, consecutive blocks of samples, with their mean and standard deviation.

    - fid, pixel_fd: squared Frechet distance to the real images' features, and to their pixels in [-1, 1]
    - accuracy: share of samples that the extractor's classifier gives their label; absent if it has no classes
    - nearest_distance: mean L2 distance in [-1, 1] pixel space to the nearest real image; near 0 means copies
    - diversity: spread within classes over the data's; 0 means one image per class
    """
    check_images(images, labels)
    reference.expect(extractor, images)
    if len(images) % num_blocks or len(images) < 2 * num_blocks:
        raise ValueError(f"{len(images)} samples do not make {num_blocks} equal blocks of at least 2")
    size = len(images) // num_blocks
    parts = [slice(start, start + size) for start in range(0, len(images), size)]
    blocks = [_measure_block(images[part], labels[part], reference, extractor, covariance_start) for part in parts]
    return {"metrics": summarise(blocks), "num_samples": size, "num_blocks": num_blocks}


def _measure_block(
    images: Images, labels: Labels, reference: Reference, extractor: Extractor, start: CovarianceStart
) -> dict[str, float]:
    features, pixels = accumulate(images, extractor)
    variance = class_variance(pixel_features(images), labels, max(len(reference.class_variance), labels.max() + 1))
    values = {
        "fid": frechet_distance(features, reference.features, start=start),
        "pixel_fd": frechet_distance(pixels, reference.pixels, start=start),
        "nearest_distance": nearest_distance(as_vectors(images), as_vectors(reference.images)),
        "diversity": relative_diversity(variance[: len(reference.class_variance)], reference.class_variance),
    }
    guesses = [extractor.classify(images[part]) for part in batches(len(images))]
    known = [guess for guess in guesses if guess is not None]
    return values | ({"accuracy": float((np.concatenate(known) == labels).mean())} if known else {})


def resample_floor(reference: Reference, num_samples: int, draws: int = 3, seed: int = 0) -> dict[str, Any]:
    """What `num_samples` images drawn from the data with replacement score against the data, over `draws` draws.

    It is the distance that sampling noise alone gives a perfect model. The nearest distance, which would be 0, is the
    data's own: of each image to the nearest other one. With more than `MAX_KEPT` real images the draws and what they
    are compared with are the kept ones.
    """
    rng = np.random.default_rng(seed)
    num_kept = len(reference.images)
    features = reference.kept_features.astype(np.float64)
    pixels = pixel_features(reference.images)
    of_all = FeatureStats.of(features), FeatureStats.of(pixels)
    blocks = []
    for _ in range(draws):
        drawn = rng.integers(num_kept, size=num_samples)
        variance = class_variance(pixels[drawn], reference.labels[drawn], len(reference.class_variance))
        values = {
            "fid": frechet_distance(FeatureStats.of(features[drawn]), of_all[0]),
            "pixel_fd": frechet_distance(FeatureStats.of(pixels[drawn]), of_all[1]),
            "nearest_distance": reference.leave_one_out,
            "diversity": relative_diversity(variance, reference.class_variance),
        }
        if len(reference.correct):
            values["accuracy"] = float(reference.correct[drawn].mean())
        blocks.append(values)
    return {"metrics": summarise(blocks), "num_samples": num_samples, "num_blocks": draws}


def summarise(blocks: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation (N - 1; None for one block) and values of each measure over the blocks."""
    columns = {name: [block[name] for block in blocks] for name in blocks[0]}
    return {
        name: {
            "mean": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "blocks": values,
        }
        for name, values in columns.items()
    }
