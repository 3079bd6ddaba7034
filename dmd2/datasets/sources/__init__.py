"""Sources of labelled images. A new data set is one class in a file here and one line in `SOURCES` or `CAPTIONED`."""

from __future__ import annotations

from collections.abc import Callable

from dmd2.config import Data
from dmd2.datasets.sources.arrays import Cifar10, Digits
from dmd2.datasets.sources.base import Source, Unreadable
from dmd2.datasets.sources.captions import CaptionedFolder, CaptionedTars
from dmd2.datasets.sources.coco import Coco10k, CocoImages
from dmd2.datasets.sources.digit_pairs import DigitPairs
from dmd2.datasets.sources.folder import ImageFolder
from dmd2.datasets.sources.tars import ImageNetTar, WebDatasetTars
from dmd2.datasets.sources.zips import ImageZip
from dmd2.errors import UserError


def _parquet(data: Data) -> Source:
    from dmd2.datasets.sources.parquet import ParquetImages  # imports pyarrow, which only this source needs

    return ParquetImages(data)


SOURCES: dict[str, Callable[[Data], Source]] = {
    "digits": Digits,
    "cifar10": Cifar10,
    "image_folder": ImageFolder,
    "image_zip": ImageZip,
    "imagenet_tar": ImageNetTar,
    "webdataset": WebDatasetTars,
}
"""Sources of images with classes (`data.num_classes`)."""
CAPTIONED: dict[str, Callable[[Data], Source]] = {
    "digit_pairs": DigitPairs,
    "image_folder": CaptionedFolder,
    "webdataset": CaptionedTars,
    "parquet": _parquet,
    "coco": CocoImages,
    "coco10k": Coco10k,
}
"""Sources of images with captions (`data.captions`)."""

__all__ = ["CAPTIONED", "SOURCES", "Source", "Unreadable", "open_source"]


def open_source(data: Data) -> Source:
    """Opens the configured source. Raises UserError for an unknown one."""
    kind, sources = ("classes", SOURCES) if data.captions is None else ("captions", CAPTIONED)
    if data.source not in sources:
        raise UserError(f"data.source is {data.source!r}; known with {kind}: {', '.join(sorted(sources))}")
    return sources[data.source](data)
