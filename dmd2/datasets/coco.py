"""The captions of COCO's validation set of 2014, and the 10,000 of them that SDXL is evaluated on.

The released evaluation (github.com/tianweiy/DMD2, main/sdxl/data_process.py) merges images and annotations with
pandas, shuffles the rows, keeps the first row of every image and draws 10,000 of those, all with NumPy's legacy
generator seeded with 123. `RandomState.permutation`, whose stream NumPy keeps unchanged, gives the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmd2.config.data import COCO_ANNOTATIONS
from dmd2.datasets.texts import tidy
from dmd2.errors import UserError

ANNOTATIONS = "captions_val2014.json"


class Captioned(NamedTuple):
    """File name and caption of an image."""

    image: str
    caption: str


def read_captions(path: Path) -> list[Captioned]:
    """All captions in `captions_val2014.json`, or in the official archive with it: in the order of the images, those of
    one image in the order of the annotations. Raises UserError for another or a damaged file.
    """
    try:
        content = json.loads(_content(path))
        names = {int(item["id"]): str(item["file_name"]) for item in content["images"]}
        captions: dict[int, list[str]] = {number: [] for number in names}
        for item in content["annotations"]:
            captions[int(item["image_id"])].append(str(item["caption"]))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; put {COCO_ANNOTATIONS} or {ANNOTATIONS} there") from None
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not COCO's captions ({type(error).__name__}: {error}); fetch it again") from None
    return [Captioned(name, caption) for number, name in names.items() for caption in captions[number]]


def subset(rows: Sequence[Captioned], num: int = 10_000, seed: int = 123) -> list[Captioned]:
    """`num` images in random order with one random caption each: the released evaluation's for the defaults.

    Raises UserError if there are fewer images.
    """
    rng = np.random.RandomState(seed)  # the generator of the released list
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    each = first_of_each(shuffled)
    if len(each) < num:
        raise UserError(f"COCO's captions are of {len(each)} images, but {num} are needed; use {ANNOTATIONS}")
    return [each[i] for i in rng.permutation(len(each))[:num]]


def first_of_each(rows: Iterable[Captioned]) -> list[Captioned]:
    """The first row of every image."""
    found: dict[str, Captioned] = {}
    for row in rows:
        found.setdefault(row.image, row)
    return list(found.values())


def as_text(captions: Iterable[str]) -> str:
    """The captions as the text of a list of prompts: one a line, with single spaces."""
    return "".join(f"{tidy(caption)}\n" for caption in captions)


def digest(captions: Iterable[str]) -> str:
    """SHA-256 of `as_text` in UTF-8: that of the list as a file."""
    return hashlib.sha256(as_text(captions).encode()).hexdigest()


def _content(path: Path) -> Any:
    if path.suffix != ".zip":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read(f"annotations/{ANNOTATIONS}")
