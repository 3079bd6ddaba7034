"""The keys of data sets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dmd2.config.base import Model


class Data(Model):
    """A labelled image data set."""

    source: str = Field(description="key of datasets.SOURCES")
    path: str | None = Field(None, description="folder or archive, for sources that read one")
    resolution: int = Field(gt=0)
    channels: Literal[1, 3] = 3
    num_classes: int = Field(gt=0)
    levels: int = Field(256, ge=2, le=256, description="grey levels of the source; samples are rounded to them")
    shard_size: int = Field(1000, gt=0, description="samples per shard")
    image_format: Literal["png", "webp"] = "webp"  # lossless either way
    max_unreadable: int = Field(0, ge=0, description="images that may be left out because they cannot be read")
