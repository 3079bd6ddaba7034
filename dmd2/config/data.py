"""The keys of data sets."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Literal, Self

from pydantic import Field, model_validator

from dmd2.config.base import Model

COCO_ANNOTATIONS = "annotations_trainval2014.zip"
Subset = Literal["all", "training"]
"""All captions, or those of source digit_pairs without the held-out compositions, which measure generalisation."""
SCHEMES = ("http", "https", "s3", "gs", "az", "file", "memory")
"""Beginnings of URLs under which images may be."""
MANIFEST = "manifest.json"
"""The end of a path to shards that this workflow made elsewhere."""


def is_url(path: str) -> bool:
    """Whether a configured path is the address of something that is not on a mounted disk."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


class Captions(Model):
    """Captions as the labels of images."""

    max_missing: int = Field(0, ge=0, description="images that may be left out because they have no caption")
    subset: Subset = Field("all", description="captions whose images become latents, which networks are trained on")


class Prompts(Model):
    """A list of prompts: those that a generator is trained on, or those of an evaluation."""

    source: Literal["digit_pairs", "file", "coco10k"] = "file"
    path: str | None = Field(
        None,
        description="file: .txt with a prompt per line, .jsonl or .parquet with `caption`; coco10k: COCO's annotations",
    )
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    list_sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="of the list itself as UTF-8 text, one prompt a line"
    )
    subset: Subset = "all"

    @model_validator(mode="after")
    def _files_have_a_path(self) -> Self:
        if (self.source == "digit_pairs") != (self.path is None):
            raise ValueError("`path` belongs to sources file and coco10k, and only there")
        return self


class Data(Model):
    """A labelled image data set: with classes or with captions."""

    source: str = Field(description="key of datasets.SOURCES or, with captions, of datasets.CAPTIONED")
    path: str | None = Field(None, description="folder, archive, URLs of tars, or the manifest.json of shards")
    resolution: int = Field(gt=0)
    channels: Literal[1, 3] = 3
    num_classes: int | None = Field(None, gt=0, description="of a set with classes")
    captions: Captions | None = Field(None, description="of a set with captions in place of classes")
    levels: int = Field(256, ge=2, le=256, description="grey levels of the source; samples are rounded to them")
    shard_size: int = Field(1000, gt=0, description="samples per shard")
    image_format: Literal["png", "webp"] = "webp"  # lossless either way
    min_side: int | None = Field(
        None, gt=0, description="images with a shorter side are left out as unreadable; none: they are enlarged"
    )
    patches: Literal[True] | None = Field(
        None, description="whether shards also have the centre 299x299 pixels of the original images, for patch_fid"
    )
    max_unreadable: int = Field(0, ge=0, description="images that may be left out because they cannot be read")
    max_passed_over: int = Field(
        0, ge=0, exclude=True, description="files that are not taken although they may be images; in no digest"
    )

    @model_validator(mode="after")
    def _classes_or_captions(self) -> Self:
        if (self.num_classes is None) == (self.captions is None):
            raise ValueError("set either `num_classes` or `captions`: the kind of the images' labels")
        return self

    @model_validator(mode="after")
    def _what_is_elsewhere_can_be_read(self) -> Self:
        if self.path is None or not is_url(self.path):
            return self
        scheme = self.path.partition(":")[0]
        if scheme not in SCHEMES:
            raise ValueError(f"path: no {scheme}:// is known, only {', '.join(SCHEMES)}; correct {self.path}")
        if "@" in self.path.split("://")[1].partition("/")[0]:
            raise ValueError("path: holds a user or password; leave credentials to the environment or a .netrc file")
        if self.source != "webdataset" and not self.is_made:
            raise ValueError(
                f"path: source {self.source} reads no URL; pack the images as tars (source webdataset), or name the "
                f"{MANIFEST} of shards that were made from them"
            )
        return self

    @property
    def is_made(self) -> bool:
        """Whether `path` names shards that this workflow made elsewhere, and not a source of images."""
        return self.path is not None and PurePath(self.path).name == MANIFEST

    @property
    def annotations(self) -> str | None:
        """The file with the captions of sources coco and coco10k, beside the images."""
        if self.path is None or self.is_made or self.source not in ("coco", "coco10k"):
            return None
        return str(PurePath(self.path).with_name(COCO_ANNOTATIONS))

    @property
    def label_field(self) -> str:
        """The field of shards with the images' labels: `cls` (class numbers) or `txt` (captions)."""
        return "cls" if self.captions is None else "txt"

    @property
    def classes(self) -> int:
        """The number of classes. Raises ValueError for a set with captions (a bug in the caller)."""
        if self.num_classes is None:
            raise ValueError(f"data set {self.source} has captions, not classes")
        return self.num_classes
