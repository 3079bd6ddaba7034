"""Image arrays of the metrics, and pixel features.

Shapes: N images, H height, W width, C channels (1 or 3), D = dimension of the pixel features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dmd2.errors import UserError

Images = NDArray[np.uint8]  # (N, H, W, C), 0..255
Labels = NDArray[np.int64] | NDArray[np.str_]  # (N,), classes or texts
Matrix = NDArray[np.float64]  # (N, D)

BATCH = 1024  # images per batch; bounds the memory, does not change results
MAX_BATCH = 2**28  # bytes of images per batch
MAX_SIDE = 16  # pixel features have at most 16 x 16 x C dimensions: 768 for C = 3
MAX_KEPT_SIDE = 64  # of thumbnails
PATCH = 299  # side of a patch: the input of Inception, so that it is not resized


def check_images(images: Images, labels: Labels | None = None) -> None:
    """Raises ValueError unless `images` is uint8 (N, H, W, C) and `labels`, if given, integers or texts (N,)."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"images are {images.dtype} {images.shape}; expected uint8 (N, H, W, C) with C 1 or 3: "
            f"round to 0..255 and put the channels last"
        )
    if len(images) == 0:
        raise ValueError("images are empty; there is nothing to measure")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iuU"):
        raise ValueError(
            f"labels are {labels.dtype} {labels.shape}; expected integers or texts of shape ({len(images)},)"
        )


def check_varied(images: Images) -> None:
    """Raises UserError if the images of a data set are all the same: nothing can be compared with them."""
    if (images == images[:1]).all():
        raise UserError(
            f"the {len(images)} images of the data are all the same, so that no sample can be compared with them; "
            f"check the images and data.path, and make the shards again"
        )


def batches(num_images: int, size: int = BATCH) -> Iterator[slice]:
    """Consecutive slices that cover `range(num_images)`."""
    return (slice(start, min(start + size, num_images)) for start in range(0, num_images, size))


def batch_of(shape: tuple[int, ...]) -> int:
    """The number of images (H, W, C) of a batch of at most 256 MB; BATCH up to 256 pixels per side."""
    return max(1, min(BATCH, MAX_BATCH // math.prod(shape)))


def as_vectors(images: Images) -> NDArray[np.float32]:
    """The flattened images in [-1, 1], float32 (N, H*W*C); N may be 0."""
    return images.reshape(len(images), math.prod(images.shape[1:])).astype(np.float32) / 127.5 - 1


def pixel_features(images: Images) -> Matrix:
    """The flattened images in [-1, 1], float64 (N, D).

    Images with more than 16 pixels per side are first averaged over blocks, so that D <= 768: a covariance of 12,288
    dimensions would need a gigabyte, and its square root hours.
    """
    check_images(images)
    return _averaged(images, MAX_SIDE).reshape(len(images), -1) / 127.5 - 1


def thumbnails(images: Images) -> Images:
    """Images of at most 64 pixels per side unchanged, larger ones averaged over blocks and rounded; N may be 0.

    In this form real images are kept, so that neither memory nor the search of neighbours grows with the resolution.
    """
    if max(images.shape[1:3]) <= MAX_KEPT_SIDE:
        return images
    return np.rint(_averaged(images, MAX_KEPT_SIDE)).astype(np.uint8)


def resized(images: Images, side: int | None) -> Images:
    """The centre square of each image with `side` pixels, by PIL's Lanczos filter; unchanged if it is that already."""
    num, height, width, channels = images.shape
    if side is None or (height, width) == (side, side):
        return images
    square = min(height, width)
    cut = _centre(images, square, square)
    made = [
        Image.fromarray(x[..., 0] if channels == 1 else x).resize((side, side), Image.Resampling.LANCZOS) for x in cut
    ]
    return np.stack([np.asarray(x) for x in made]).reshape(num, side, side, channels)


def patches(images: Images) -> Images:
    """The centre crop of each image: 299 x 299 of images that large, as the released evaluation takes of 1024 x 1024.

    Of smaller images the centre half of each side, enlarged to the image's size by repeating pixels: an analogue that
    shows detail at twice the scale to an extractor whose input has a fixed size.
    """
    height, width = images.shape[1:3]
    if min(height, width) >= PATCH:
        return _centre(images, PATCH, PATCH)
    crops = _centre(images, (height + 1) // 2, (width + 1) // 2)
    return crops.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]


def _centre(images: Images, height: int, width: int) -> Images:
    top, left = (round((whole - part) / 2) for whole, part in zip(images.shape[1:3], (height, width), strict=True))
    return images[:, top : top + height, left : left + width]


def _averaged(images: Images, most: int) -> NDArray[np.float64]:
    """Means over equal blocks, of which there are at most `most` per side: (N, h, w, C)."""
    num, height, width, channels = images.shape
    rows, columns = _block(height, most), _block(width, most)
    blocks = images.reshape(num, height // rows, rows, width // columns, columns, channels)
    averaged: NDArray[np.float64] = blocks.mean(axis=(2, 4))
    return averaged


def _block(side: int, most: int) -> int:
    """The smallest divisor of `side` that leaves at most `most` blocks."""
    return next(size for size in range(1, side + 1) if side % size == 0 and side // size <= most)
