"""Image arrays of the metrics, and pixel features.

Shapes: N images, H height, W width, C channels (1 or 3), D = dimension of the pixel features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]  # (N, H, W, C), 0..255
Labels = NDArray[np.int64]  # (N,)
Matrix = NDArray[np.float64]  # (N, D)

BATCH = 1024  # images per batch; bounds the memory, does not change results
MAX_SIDE = 16  # pixel features have at most 16 x 16 x C dimensions: 768 for C = 3


def check_images(images: Images, labels: Labels | None = None) -> None:
    """Raises ValueError unless `images` is uint8 (N, H, W, C) and `labels`, if given, int64 (N,)."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"images are {images.dtype} {images.shape}; expected uint8 (N, H, W, C) with C 1 or 3: "
            f"round to 0..255 and put the channels last"
        )
    if len(images) == 0:
        raise ValueError("images are empty; there is nothing to measure")
    if labels is not None and (labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(f"labels are {labels.dtype} {labels.shape}; expected integers of shape ({len(images)},)")


def batches(num_images: int, size: int = BATCH) -> Iterator[slice]:
    """Consecutive slices that cover `range(num_images)`."""
    return (slice(start, min(start + size, num_images)) for start in range(0, num_images, size))


def as_vectors(images: Images) -> NDArray[np.float32]:
    """The flattened images in [-1, 1], float32 (N, H*W*C); N may be 0."""
    return images.reshape(len(images), math.prod(images.shape[1:])).astype(np.float32) / 127.5 - 1


def pixel_features(images: Images) -> Matrix:
    """The flattened images in [-1, 1], float64 (N, D).

    Images with more than 16 pixels per side are first averaged over blocks, so that D <= 768: a covariance of 12,288
    dimensions would need a gigabyte, and its square root hours.
    """
    check_images(images)
    num, height, width, channels = images.shape
    rows, columns = _block(height), _block(width)
    x = images.reshape(num, height // rows, rows, width // columns, columns, channels).mean(axis=(2, 4))
    return x.reshape(num, -1) / 127.5 - 1


def _block(side: int) -> int:
    """The smallest divisor of `side` that leaves at most MAX_SIDE blocks."""
    return next(size for size in range(1, side + 1) if side % size == 0 and side // size <= MAX_SIDE)
