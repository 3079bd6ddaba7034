"""The interface of a source of labelled images; decoding, cropping and resizing of encoded images.

Shapes: (H, W, C) an image.
"""

from __future__ import annotations

import hashlib
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from dmd2.config import Data
from dmd2.datasets.sources.listing import SUFFIXES, PassedOver
from dmd2.datasets.sources.spans import printable
from dmd2.errors import UserError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # by content; none that runs an interpreter
MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})  # 8 bits a channel


class Unreadable(Exception):
    """An image that cannot be decoded; the message is the reason."""


class Source(Protocol):
    """Labelled images by number; picklable, so that several processes can read it."""

    fingerprint: str
    """Changes when the data does, as far as can be determined without reading the images."""
    classes: Sequence[str]
    """The names of the classes by class number; none for a set with captions."""
    labels: np.ndarray
    """The class of every image, (number of images,) int64, or its caption as a str, empty if it has none."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> np.ndarray:
        """Image `number`, uint8 (H, W, C). Raises Unreadable for one that cannot be decoded."""

    def name(self, number: int) -> str:
        """The name of image `number` in messages."""


class EncodedImages(ABC):
    """Images stored as encoded files, whose bytes a subclass reads.

    Each is centre-cropped to its short side and resized with a Lanczos filter, like EDM's dataset tool with
    `--transform=center-crop`; one of the right size is unchanged. Also like that tool, grey, palette and CMYK become
    RGB, transparency is dropped, only the first frame of an animation is read, and EXIF rotation is ignored. Unreadable
    are more than 8 bits per channel, more pixels than Pillow's limit, sides below `data.min_side`, and damaged images.
    """

    def __init__(
        self,
        data: Data,
        names: Sequence[str],
        labels: Sequence[Any] | np.ndarray,
        classes: Sequence[str],
        passed_over: PassedOver | None = None,
    ):
        if data.captions is None and len(classes) != data.num_classes:
            raise UserError(f"{data.path}: {len(classes)} classes, but data.num_classes is {data.num_classes}")
        if not len(names):
            raise UserError(f"{data.path}: contains no image ({', '.join(sorted(SUFFIXES))}); correct data.path")
        self._data, self._names, self.classes = data, names, classes
        self.passed_over = passed_over or PassedOver()
        self.labels = np.asarray(labels, np.int64 if data.captions is None else object)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, number: int) -> str:
        return printable(self._names[number])

    def __getitem__(self, number: int) -> np.ndarray:
        return decode(self.read(number), self._data.resolution, self._data.channels, self._data.min_side)

    @abstractmethod
    def read(self, number: int) -> bytes:
        """The encoded image `number`."""


def decode(content: bytes, resolution: int, channels: int, min_side: int | None = None) -> np.ndarray:
    """Decodes, crops and resizes an image: uint8 (resolution, resolution, channels).

    Raises Unreadable, also for an image with a side of less than `min_side` pixels.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.mode not in MODES:
                raise Unreadable(f"mode {image.mode} is not 8 bits per channel")
            if min_side is not None and min(image.size) < min_side:
                raise Unreadable(f"{image.width}x{image.height} pixels, data.min_side is {min_side}")
            if (bits := _bits(image)) > 8:
                raise Unreadable(f"{bits} bits per channel, not 8")
            mode = "RGB" if channels == 3 else "L"
            image.load()
            square = _centre(image if image.mode == mode else image.convert(mode))
        resized = square.resize((resolution, resolution), Image.Resampling.LANCZOS)
    except Unreadable:
        raise
    except UnidentifiedImageError:  # its message contains a memory address
        raise Unreadable(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise many types on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unreadable(f"not a readable image ({reason[:200]})") from error
    return np.asarray(resized).reshape(resolution, resolution, channels)


def _bits(image: Image.Image) -> int:
    """Bits per channel in the file, before decoding, for which Pillow cuts a coloured image to 8."""
    if image.format == "BMP":  # its raw mode has the bits of a pixel
        return 8
    tiles: Any = getattr(image, "tile", ())
    for _, _, _, arguments in tiles:  # of the decoder: its raw mode is such as RGB;16B; PPM's is its largest value
        for part in arguments if isinstance(arguments, tuple) else (arguments,):
            if isinstance(part, str) and (found := re.search(r";(\d+)", part)):
                return int(found[1])
            if image.format == "PPM" and isinstance(part, int) and part > 255:
                return part.bit_length()
    return 8


def _centre(image: Image.Image) -> Image.Image:
    """The largest centred square."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def existing(data: Data, what: str) -> Path:
    """The configured path of a source. Raises UserError if it is not set or does not exist."""
    if data.path is None:
        raise UserError(f"data.path is not set, but source {data.source} reads one; set it to {what}")
    path = Path(data.path)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"data.path: {path} does not exist; put {what} there or correct it") from None
    except OSError as error:
        raise UserError(f"data.path: {path} cannot be read ({error.strerror}); give yourself access to it") from None
    return path


def read_image(path: Path) -> bytes:
    """The bytes of an image that was listed. Raises UserError if it cannot be read any more."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); was it moved? run again") from error


def fingerprint_of(names: Iterable[str], sizes: Iterable[int]) -> str:
    """SHA-256 of a listing of names and sizes."""
    listing = "\n".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()


def insist(data: Data, **wanted: int) -> None:
    """Raises UserError if a key of the configuration differs from the source's value."""
    for key, value in wanted.items():
        if getattr(data, key) != value:
            found = getattr(data, key)
            raise UserError(f"data.{key} is {found}, but source {data.source} has {value}; set it to that")
