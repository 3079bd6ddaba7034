"""Where labelled images come from. A new data set is one function here and one line in `SOURCES`.

Shapes: H, W, C height, width and channels of an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dmd2.config import Data
from dmd2.datasets.shards import write_shards
from dmd2.errors import UserError
from dmd2.spec import Spec


class Source(Protocol):
    """Labelled images by id, so that shards can be written in parallel and restarted."""

    fingerprint: str
    """Changes when the data behind the configuration does, as far as can be seen without reading the images."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        """Image `number`, uint8 (H, W, C), and its class."""


class Digits:
    """Scikit-learn's handwritten digits: 1,797 grey images of 8x8 in 17 levels, in the order of the data set.

    Level k of 0..16 is stored as round(k * 255 / 16).
    """

    def __init__(self, data: Data):
        from sklearn.datasets import load_digits

        for key, wanted in (("resolution", 8), ("num_classes", 10), ("levels", 17)):
            if getattr(data, key) != wanted:
                raise UserError(f"data.{key} is {getattr(data, key)}, but source digits has {wanted}; set it to that")
        levels, labels = load_digits(return_X_y=True)
        pixels = np.round(levels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        self._images = np.repeat(pixels, data.channels, axis=3)
        self._labels = labels.tolist()
        self.fingerprint = hashlib.sha256(levels.tobytes() + labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        return self._images[number], self._labels[number]


class ImageFolder:
    """A folder with one folder of images per class; classes are numbered in the sorted order of the folders' names.

    Each image is cropped about its centre to its short side and resized with Lanczos' filter, as EDM's dataset tool
    does with `--transform=center-crop`. Grey images are replicated, transparency is dropped, EXIF rotation ignored.
    Hidden files and files that are not images by their suffix do not count.
    """

    SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
    FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # by content; none that runs an interpreter
    MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"})  # 8 bits a channel

    def __init__(self, data: Data):
        if data.path is None:
            raise UserError("data.path is not set, but source image_folder reads one; set it to the class-folder tree")
        self._root, self._data = Path(data.path), data
        if not self._root.is_dir():
            raise UserError(f"data.path: {self._root} is not a folder; set it to the class-folder tree")
        classes = sorted(p.name for p in self._root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if len(classes) != data.num_classes:
            raise UserError(f"{self._root}: {len(classes)} class folders, but data.num_classes is {data.num_classes}")
        self._files = [(path, label) for label, name in enumerate(classes) for path in self._images_of(name)]
        listing = "\n".join(f"{p.relative_to(self._root).as_posix()} {p.stat().st_size}" for p, _ in self._files)
        self.fingerprint = hashlib.sha256(listing.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        path, label = self._files[number]
        return self._read(path), label

    def _images_of(self, name: str) -> list[Path]:
        """The images in and below a class folder, sorted."""
        files = (p for p in (self._root / name).rglob("*") if p.suffix.lower() in self.SUFFIXES)
        images = sorted(p for p in files if not p.name.startswith(".") and p.is_file())
        if not images:
            raise UserError(f"{self._root / name}: class folder without an image; fill or remove it")
        return images

    def _read(self, path: Path) -> np.ndarray:
        try:
            with Image.open(path, formats=self.FORMATS) as image:
                if image.mode not in self.MODES:
                    raise UserError(f"{path}: mode {image.mode} is not an 8-bit image; convert or remove it")
                pixels = np.asarray(image.convert("RGB" if self._data.channels == 3 else "L"))
        except UserError:
            raise
        except Exception as error:  # what decoders raise on damaged files is not one family
            raise UserError(f"{path}: not a readable image ({error}); replace or remove it") from error
        side, size = min(pixels.shape[:2]), self._data.resolution
        top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
        square = Image.fromarray(pixels[top : top + side, left : left + side])
        resized = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))
        return resized.reshape(size, size, self._data.channels)


SOURCES: dict[str, Callable[[Data], Source]] = {"digits": Digits, "image_folder": ImageFolder}


def open_source(data: Data) -> Source:
    """The source that a configuration names. Raises UserError for an unknown one."""
    if data.source not in SOURCES:
        raise UserError(f"data.source is {data.source!r}; known: {', '.join(sorted(SOURCES))}")
    return SOURCES[data.source](data)


def write_images(
    manifest_path: Path | str, data: Data, spec: Spec, *, num_threads: int = 4, **options: Any
) -> dict[str, Any]:
    """Writes the images of a source as shards with the fields `image` and `cls`; returns the manifest.

    `options` are those of `write_shards`.
    """
    source = open_source(data)
    with ThreadPoolExecutor(num_threads) as pool:

        def make(ids: range) -> dict[str, list[Any]]:
            images, labels = zip(*pool.map(source.__getitem__, ids), strict=True)
            return {f"image.{data.image_format}": list(images), "cls": list(labels)}

        return write_shards(
            manifest_path, len(source), data.shard_size, make, spec, inputs=source.fingerprint, **options
        )
