"""Sources of labelled images. A new data set is one class in a file here and one line in `SOURCES`."""

from __future__ import annotations

from collections.abc import Callable

from dmd2.config import Data
from dmd2.datasets.sources.arrays import Cifar10, Digits
from dmd2.datasets.sources.base import Source, Unreadable
from dmd2.datasets.sources.digit_pairs import DigitPairs
from dmd2.datasets.sources.folder import ImageFolder
from dmd2.datasets.sources.tars import ImageNetTar, WebDatasetTars
from dmd2.datasets.sources.zips import ImageZip
from dmd2.errors import UserError

SOURCES: dict[str, Callable[[Data], Source]] = {
    "digits": Digits,
    "cifar10": Cifar10,
    "digit_pairs": DigitPairs,
    "image_folder": ImageFolder,
    "image_zip": ImageZip,
    "imagenet_tar": ImageNetTar,
    "webdataset": WebDatasetTars,
}

__all__ = ["SOURCES", "Source", "Unreadable", "open_source"]


def open_source(data: Data) -> Source:
    """Opens the configured source. Raises UserError for an unknown one."""
    if data.source not in SOURCES:
        raise UserError(f"data.source is {data.source!r}; known: {', '.join(sorted(SOURCES))}")
    return SOURCES[data.source](data)
