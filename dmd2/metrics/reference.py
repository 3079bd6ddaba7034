"""What the real images are remembered by, so that samples can be compared with them without the data set.

Shapes: N real images, M of them kept, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dmd2.errors import UserError
from dmd2.metrics.diversity import class_variance, leave_one_out_distance
from dmd2.metrics.extractor import Extractor
from dmd2.metrics.frechet import FeatureStats, read_npz
from dmd2.metrics.images import Images, Labels, Matrix, as_vectors, batches, check_images, pixel_features
from dmd2.records import atomic

MAX_KEPT = 10_000  # real images kept for nearest neighbours and resampling
ARRAYS = ("images", "labels", "kept_features", "correct", "class_variance", "leave_one_out")


@dataclass(frozen=True)
class Reference:
    """Moments of all real images, and a random choice of at most `MAX_KEPT` of them kept as they are."""

    extractor: str  # its name
    features: FeatureStats
    pixels: FeatureStats
    images: Images  # (M, H, W, C)
    labels: Labels  # (M,)
    kept_features: NDArray[np.float32]  # (M, D)
    correct: NDArray[np.bool_]  # (M,), whether the classifier names the label; (0,) without classes
    class_variance: Matrix  # (K,), of the kept images' pixels
    leave_one_out: float  # mean distance of a kept image to the nearest other one

    @classmethod
    def build(
        cls, images: Images, labels: Labels, extractor: Extractor, *, max_kept: int = MAX_KEPT, seed: int = 0
    ) -> Self:
        """The reference of a data set; the moments are of all images, whatever is kept."""
        check_images(images, labels)
        if len(images) < 2 or max_kept < 2:
            raise ValueError(f"a reference needs at least 2 images, got {len(images)} with max_kept {max_kept}")
        kept = np.sort(np.random.default_rng(seed).permutation(len(images))[:max_kept])
        images_kept, labels_kept = images[kept], labels[kept].astype(np.int64)
        classes = extractor.classify(images_kept)
        features, pixels = accumulate(images, extractor)
        return cls(
            extractor=extractor.name,
            features=features,
            pixels=pixels,
            images=images_kept,
            labels=labels_kept,
            kept_features=extractor.features(images_kept).astype(np.float32),
            correct=np.zeros(0, bool) if classes is None else classes == labels_kept,
            class_variance=class_variance(pixel_features(images_kept), labels_kept, int(labels.max()) + 1),
            leave_one_out=leave_one_out_distance(as_vectors(images_kept)),
        )

    def save(self, path: Path | str) -> None:
        """Writes an .npz file of plain arrays, atomically."""
        arrays = {name: np.asarray(getattr(self, name)) for name in ARRAYS}
        parts = self.features.arrays("features_") | self.pixels.arrays("pixels_")
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, extractor=np.array(self.extractor), **arrays, **parts)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads what `save` wrote; nothing is unpickled. Raises UserError naming a missing or foreign file."""
        moments = [f"{kind}_{part}" for kind in ("features", "pixels") for part in ("count", "mean", "scatter")]
        a = read_npz(path, ("extractor", *ARRAYS, *moments))
        return cls(
            extractor=str(a["extractor"]),
            features=FeatureStats.from_arrays(a, "features_"),
            pixels=FeatureStats.from_arrays(a, "pixels_"),
            **{name: a[name] for name in ARRAYS[:-1]},
            leave_one_out=float(a["leave_one_out"]),
        )

    def expect(self, extractor: Extractor, images: Images) -> None:
        """Raises UserError unless `extractor` and the images' shape are the ones this reference was built with."""
        if (extractor.name, extractor.dim) != (self.extractor, len(self.features.mean)):
            raise UserError(
                f"the reference was built with extractor {self.extractor} of {len(self.features.mean)} features, "
                f"the samples come with {extractor.name} of {extractor.dim}; build the reference again"
            )
        if images.shape[1:] != self.images.shape[1:]:
            raise UserError(f"samples are {images.shape[1:]}, the reference's images {self.images.shape[1:]}")


def accumulate(images: Images, extractor: Extractor) -> tuple[FeatureStats, FeatureStats]:
    """The moments of the images' features and of their pixels, one batch in memory at a time."""
    features, pixels = FeatureStats.empty(extractor.dim), None
    for batch in _chunks(images):
        features = features.merge(FeatureStats.of(extractor.features(batch)))
        of_pixels = FeatureStats.of(pixel_features(batch))
        pixels = of_pixels if pixels is None else pixels.merge(of_pixels)
    assert pixels is not None  # check_images refuses an empty set
    return features, pixels


def _chunks(images: Images) -> Iterator[Images]:
    return (images[part] for part in batches(len(images)))
