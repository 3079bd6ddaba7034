"""Statistics of the real images, with which samples are compared without the data set.

Shapes: N real images, M of them kept, D features, K classes or distinct captions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from dmd2.errors import UserError
from dmd2.files import atomic
from dmd2.metrics.distances import NEIGHBOURS, Device, to_nearest
from dmd2.metrics.diversity import ClassMoments
from dmd2.metrics.extractor import Extractor, Observed
from dmd2.metrics.frechet import FeatureStats, Gaussian, read_npz, require
from dmd2.metrics.images import (
    Images,
    Labels,
    Matrix,
    as_vectors,
    batch_of,
    batches,
    check_images,
    check_varied,
    patches,
    pixel_features,
    thumbnails,
)
from dmd2.metrics.labels import numbered, targets

MAX_KEPT = 10_000  # real images kept, as thumbnails, for neighbours, precision and recall, and resampling
MAX_READ = 2**30  # bytes of kept images that are read at once
ROUNDING = 1e-20  # variance that equal pixels may get
OF_DATA = "data"
Read = Callable[[Sequence[int] | range | np.ndarray], tuple[Images, Labels]]
"""The images and labels of the samples with the given ids, in their order."""
Observe = Callable[..., Observed]
_NO_CAPTIONS = np.zeros(0, np.str_)
_GAUSSIANS = ("features", "pixels", "patches")
_ARRAYS = ("images", "labels", "kept_features", "kept_probabilities", "radii", "correct", "class_variance")
_LATER = ("captions", "kept_patches", "image_shape")  # arrays that files of class data may lack


@dataclass(frozen=True)
class Reference:
    """Moments of all real images, and a random subset of at most `MAX_KEPT` images."""

    extractor: str  # its name
    origin: str  # OF_DATA, or which published file the moments of the features are from
    features: Gaussian
    pixels: Gaussian
    images: Images  # (M, H, W, C), thumbnails
    labels: Labels  # (M,), classes or captions
    kept_features: NDArray[np.float32]  # (M, D)
    kept_probabilities: NDArray[np.float32]  # (M, classes of the extractor); (0, 0) if it gives none
    radii: Matrix  # (M,), from a kept image's features to those of the third nearest other one
    correct: NDArray[np.bool_]  # (M,), whether the classifier names the label; (0,) without classes
    class_variance: Matrix  # (K,), of the kept images' pixels
    leave_one_out: float  # mean distance of a kept image to the nearest other one
    captions: NDArray[np.str_]  # (K,), sorted; (0,) of data with classes
    image_shape: tuple[int, ...]  # (H, W, C) of the images themselves
    patches: Gaussian | None = None  # of the features of patches, where patch_fid was requested
    kept_patches: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))  # (M, D)

    @classmethod
    def build(
        cls,
        read: Read,
        num_images: int,
        extractor: Extractor,
        num_classes: int | None,
        *,
        with_patches: bool = False,
        bicubic: bool = False,
        published: tuple[Gaussian, str] | None = None,
        max_kept: int = MAX_KEPT,
        seed: int = 0,
        device: Device = "cpu",
        progress: Callable[[int], object] | None = None,
    ) -> Self:
        """Computes the reference of a data set, which is read in batches; the moments are of all images.

        `num_classes` is None for captions as labels. `with_patches` adds what `patch_fid` needs, for a second pass of
        the extractor. `bicubic` is the protocol's (`Extractor.observe`). `published` replaces the moments of the
        features: (moments, description of their origin). `progress` is called with the number of images of each batch.
        Raises ValueError for fewer than 2 images, and UserError for images that are all the same or have features
        that are not finite.
        """
        if num_images < 2 or max_kept < 2:
            raise ValueError(f"a reference needs at least 2 images, got {num_images} with max_kept {max_kept}")
        ids = np.sort(np.random.default_rng(seed).permutation(num_images)[:max_kept])
        observe = partial(extractor.observe, bicubic=bicubic)
        kept = _keep(read, ids, observe, with_patches)
        check_varied(kept.images)
        vectors = as_vectors(kept.images)
        captions: NDArray[np.str_] = np.unique(kept.labels.astype(np.str_)) if num_classes is None else _NO_CAPTIONS
        groups = numbered(kept.labels, captions) if num_classes is None else targets(kept.labels)
        observers = (None if published else observe, observe if with_patches else None)
        moments = _moments(read, num_images, kept.image_shape, observers, progress)
        features, origin = published or (moments[0], OF_DATA)
        assert features is not None  # without published ones they were measured
        assert moments[1] is not None
        found = cls(
            extractor=extractor.name,
            origin=origin,
            features=features,
            pixels=moments[1],
            images=kept.images,
            labels=kept.labels,
            kept_features=kept.seen.features.astype(np.float32),
            kept_probabilities=_or_empty(kept.seen.probabilities),
            radii=to_nearest(kept.seen.features, kept.seen.features, k=NEIGHBOURS, own=False, device=device),
            correct=np.zeros(0, bool) if kept.seen.classes is None else kept.seen.classes == targets(kept.labels),
            class_variance=ClassMoments.of(kept.pixels, groups, num_classes or len(captions)).variance(),
            leave_one_out=float(to_nearest(vectors, vectors, own=False, device=device).mean()),
            captions=captions,
            image_shape=kept.image_shape,
            patches=moments[2],
            kept_patches=_or_empty(kept.patches),
        )
        found._check_finite()
        return found

    def _check_finite(self) -> None:
        """Raises UserError for a moment or feature that is NaN or infinite."""
        gaussians = {name: gaussian for name in _GAUSSIANS if (gaussian := getattr(self, name)) is not None}
        values = {name: np.concatenate([mean, covariance.ravel()]) for name, (mean, covariance) in gaussians.items()}
        values |= {name: getattr(self, name) for name in ("kept_features", "kept_probabilities", "kept_patches")}
        if bad := [name for name, value in values.items() if not np.isfinite(value).all()]:
            raise UserError(
                f"statistics of the real images: `{bad[0]}` has values that are not finite; the weights of the "
                f"extractor {self.extractor} are damaged or diverged: make or fetch them again, or check the images"
            )

    def check_classes(self) -> None:
        """Raises UserError if no class has two different kept images, with which `diversity` is compared."""
        if not np.nansum(self.class_variance) > ROUNDING:
            raise UserError(
                "no class of the data has two different images, which evaluation.measures `diversity` needs; add "
                "images, or list the other measures in evaluation.measures"
            )

    def save(self, path: Path | str) -> None:
        """Writes an .npz file of plain arrays, atomically."""
        arrays = {name: np.asarray(getattr(self, name)) for name in (*_ARRAYS, *_LATER)}
        for name in _GAUSSIANS:
            if (gaussian := getattr(self, name)) is not None:
                arrays |= {f"{name}_mean": gaussian.mean, f"{name}_covariance": gaussian.covariance}
        names = {"extractor": np.array(self.extractor), "origin": np.array(self.origin)}
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays, **names, leave_one_out=np.array(self.leave_one_out))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads a file of `save`; nothing is unpickled. Raises UserError naming a missing or unsuitable file."""
        moments = [f"{name}_{part}" for name in _GAUSSIANS[:2] for part in ("mean", "covariance")]
        a = {"captions": _NO_CAPTIONS, "kept_patches": np.zeros((0, 0), np.float32)} | read_npz(path)
        require(a, ("extractor", "origin", "leave_one_out", *_ARRAYS, *moments), path)
        return cls(
            extractor=str(a["extractor"]),
            origin=str(a["origin"]),
            features=Gaussian(a["features_mean"], a["features_covariance"]),
            pixels=Gaussian(a["pixels_mean"], a["pixels_covariance"]),
            patches=Gaussian(a["patches_mean"], a["patches_covariance"]) if "patches_mean" in a else None,
            **{name: a[name] for name in (*_ARRAYS, "captions", "kept_patches")},
            image_shape=tuple(int(side) for side in a.get("image_shape", a["images"].shape[1:])),
            leave_one_out=float(a["leave_one_out"]),
        )

    def expect(self, extractor: Extractor, images: Images) -> None:
        """Raises UserError unless this reference was built with `extractor` and images of the same shape."""
        if (extractor.name, extractor.dim) != (self.extractor, len(self.features.mean)):
            raise UserError(
                f"the reference was built with extractor {self.extractor} of {len(self.features.mean)} features, "
                f"the samples come with {extractor.name} of {extractor.dim}; build the reference again"
            )
        if images.shape[1:] != self.image_shape:
            raise UserError(f"samples are {images.shape[1:]}, the reference's images {self.image_shape}")


class _Kept(NamedTuple):
    """The kept images as thumbnails, and what was computed of the images themselves."""

    images: Images  # (M, ...), thumbnails
    labels: Labels
    seen: Observed
    pixels: Matrix
    patches: Matrix | None
    image_shape: tuple[int, ...]


def _keep(read: Read, ids: NDArray[np.int64], observe: Observe, with_patches: bool) -> _Kept:
    """Reads the images `ids` in parts of at most MAX_READ."""
    shape = read(ids[:1])[0].shape[1:]
    parts: list[tuple[Any, ...]] = []
    columns: list[Any]
    for part in batches(len(ids), max(1, MAX_READ // math.prod(shape))):
        images, labels = read(ids[part])
        check_images(images, labels)
        labels = labels if labels.dtype.kind == "U" else labels.astype(np.int64)
        seen = observe(images)
        of_patches = observe(patches(images), detailed=False).features if with_patches else None
        parts.append((thumbnails(images), labels, *seen, pixel_features(images), of_patches))
    columns = [None if column[0] is None else np.concatenate(column) for column in zip(*parts, strict=True)]
    images, labels, features, classes, probabilities, pixels, of_patches = columns
    return _Kept(images, labels, Observed(features, classes, probabilities), pixels, of_patches, shape)


def _or_empty(rows: Matrix | None) -> NDArray[np.float32]:
    """The rows in float32, or (0, 0) where there are none."""
    return np.zeros((0, 0), np.float32) if rows is None else rows.astype(np.float32)


def _moments(
    read: Read,
    num_images: int,
    shape: tuple[int, ...],
    observers: tuple[Observe | None, Observe | None],
    progress: Callable[[int], object] | None,
) -> list[Gaussian | None]:
    """Gaussians of the features, pixels and patches' features of all images, computed in batches.

    `observers` are those of the images and of the patches; None where that is not requested.
    """
    features, of_patches = observers
    found: list[FeatureStats | None] = [None] * 3
    for part in batches(num_images, batch_of(shape)):
        images, _ = read(range(part.start, part.stop))
        seen = (
            features and features(images, detailed=False).features,
            pixel_features(images),
            of_patches and of_patches(patches(images), detailed=False).features,
        )
        for i, rows in enumerate(seen):
            if rows is not None:
                stats, sofar = FeatureStats.of(rows), found[i]
                found[i] = stats if sofar is None else sofar.merge(stats)
        if progress is not None:
            progress(len(images))
    return [None if stats is None else stats.gaussian() for stats in found]
