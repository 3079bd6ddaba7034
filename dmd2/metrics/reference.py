"""Statistics of the real images, with which samples are compared without the data set.

Shapes: N real images, M of them kept, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dmd2.errors import UserError
from dmd2.files import atomic
from dmd2.metrics.distances import NEIGHBOURS, Device, to_nearest
from dmd2.metrics.diversity import ClassMoments
from dmd2.metrics.extractor import Extractor, Observed
from dmd2.metrics.frechet import FeatureStats, Gaussian, read_npz
from dmd2.metrics.images import Images, Labels, Matrix, as_vectors, batches, check_images, pixel_features

MAX_KEPT = 10_000  # real images kept for neighbours, precision and recall, and resampling
OF_DATA = "data"
Read = Callable[[Sequence[int] | range | np.ndarray], tuple[Images, Labels]]
"""The images and labels of the samples with the given ids, in their order."""
_GAUSSIANS = ("features", "pixels")
_ARRAYS = ("images", "labels", "kept_features", "kept_probabilities", "radii", "correct", "class_variance")


@dataclass(frozen=True)
class Reference:
    """Moments of all real images, and a random subset of at most `MAX_KEPT` images."""

    extractor: str  # its name
    origin: str  # OF_DATA, or which published file the moments of the features are from
    features: Gaussian
    pixels: Gaussian
    images: Images  # (M, H, W, C)
    labels: Labels  # (M,)
    kept_features: NDArray[np.float32]  # (M, D)
    kept_probabilities: NDArray[np.float32]  # (M, classes of the extractor); (0, 0) if it gives none
    radii: Matrix  # (M,), from a kept image's features to those of the third nearest other one
    correct: NDArray[np.bool_]  # (M,), whether the classifier names the label; (0,) without classes
    class_variance: Matrix  # (K,), of the kept images' pixels
    leave_one_out: float  # mean distance of a kept image to the nearest other one

    @classmethod
    def build(
        cls,
        read: Read,
        num_images: int,
        extractor: Extractor,
        num_classes: int,
        *,
        published: tuple[Gaussian, str] | None = None,
        max_kept: int = MAX_KEPT,
        seed: int = 0,
        device: Device = "cpu",
        progress: Callable[[int], object] | None = None,
    ) -> Self:
        """Computes the reference of a data set, which is read in batches; the moments are of all images.

        `published` replaces the moments of the features: (moments, description of their origin). `progress` is called
        with the number of images of each batch. Raises ValueError for fewer than 2 images.
        """
        if num_images < 2 or max_kept < 2:
            raise ValueError(f"a reference needs at least 2 images, got {num_images} with max_kept {max_kept}")
        kept = np.sort(np.random.default_rng(seed).permutation(num_images)[:max_kept])
        images, labels = read(kept)
        check_images(images, labels)
        labels = labels.astype(np.int64)
        seen = extractor.observe(images)
        vectors = as_vectors(images)
        features, pixels = _moments(read, num_images, None if published else extractor, progress)
        features, origin = published or (features, OF_DATA)
        assert features is not None  # without published ones they were measured
        return cls(
            extractor=extractor.name,
            origin=origin,
            features=features,
            pixels=pixels,
            images=images,
            labels=labels,
            kept_features=seen.features.astype(np.float32),
            kept_probabilities=_or_empty(seen),
            radii=to_nearest(seen.features, seen.features, k=NEIGHBOURS, own=False, device=device),
            correct=np.zeros(0, bool) if seen.classes is None else seen.classes == labels,
            class_variance=ClassMoments.of(pixel_features(images), labels, num_classes).variance(),
            leave_one_out=float(to_nearest(vectors, vectors, own=False, device=device).mean()),
        )

    def save(self, path: Path | str) -> None:
        """Writes an .npz file of plain arrays, atomically."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        for name in _GAUSSIANS:
            mean, covariance = getattr(self, name)
            arrays |= {f"{name}_mean": mean, f"{name}_covariance": covariance}
        names = {"extractor": np.array(self.extractor), "origin": np.array(self.origin)}
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays, **names, leave_one_out=np.array(self.leave_one_out))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads a file of `save`; nothing is unpickled. Raises UserError naming a missing or unsuitable file."""
        moments = [f"{name}_{part}" for name in _GAUSSIANS for part in ("mean", "covariance")]
        a = read_npz(path, ("extractor", "origin", "leave_one_out", *_ARRAYS, *moments))
        return cls(
            extractor=str(a["extractor"]),
            origin=str(a["origin"]),
            features=Gaussian(a["features_mean"], a["features_covariance"]),
            pixels=Gaussian(a["pixels_mean"], a["pixels_covariance"]),
            **{name: a[name] for name in _ARRAYS},
            leave_one_out=float(a["leave_one_out"]),
        )

    def expect(self, extractor: Extractor, images: Images) -> None:
        """Raises UserError unless this reference was built with `extractor` and images of the same shape."""
        if (extractor.name, extractor.dim) != (self.extractor, len(self.features.mean)):
            raise UserError(
                f"the reference was built with extractor {self.extractor} of {len(self.features.mean)} features, "
                f"the samples come with {extractor.name} of {extractor.dim}; build the reference again"
            )
        if images.shape[1:] != self.images.shape[1:]:
            raise UserError(f"samples are {images.shape[1:]}, the reference's images {self.images.shape[1:]}")


def _or_empty(seen: Observed) -> NDArray[np.float32]:
    """The class probabilities, (M, K), or (0, 0) where there are none."""
    return np.zeros((0, 0), np.float32) if seen.probabilities is None else seen.probabilities.astype(np.float32)


def _moments(
    read: Read, num_images: int, extractor: Extractor | None, progress: Callable[[int], object] | None
) -> tuple[Gaussian | None, Gaussian]:
    """Gaussians of the features (None without an extractor) and pixels of all images, computed in batches."""
    features, pixels = None, None
    for part in batches(num_images):
        images, _ = read(range(part.start, part.stop))
        of_pixels = FeatureStats.of(pixel_features(images))
        pixels = of_pixels if pixels is None else pixels.merge(of_pixels)
        if extractor is not None:
            of_features = FeatureStats.of(extractor.observe(images, detailed=False).features)
            features = of_features if features is None else features.merge(of_features)
        if progress is not None:
            progress(len(images))
    assert pixels is not None  # there are at least 2 images
    return None if features is None else features.gaussian(), pixels.gaussian()
