"""Sheets of samples as PNG, enlarged by integer factors.

Images are uint8 (N, H, W, C) with C 1 or 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dmd2.files import atomic

Images = NDArray[np.uint8]
Labels = NDArray[Any]  # (N,), class numbers or captions

SIDE = 40  # minimum width of an enlarged image in pixels
GAP = 3  # pixels between images
MARGIN = 10  # pixels around a sheet
TITLE = 15  # pixels
HEAD = TITLE + 6  # pixels above the images for titles


def by_class(images: Images, labels: Labels, columns: int = 10, rows: int = 8) -> tuple[Images, Labels]:
    """At most rows x columns images in row-major order with one class per column, and the columns' classes.

    With more classes than `columns`, evenly spaced ones are used; the class with the fewest images limits the rows.
    Raises ValueError for arrays of another dtype or shape.
    """
    _check(images)
    if labels.shape != (len(images),):
        raise ValueError(f"labels have shape {labels.shape}; expected ({len(images)},)")
    classes, counts = np.unique(labels, return_counts=True)
    chosen = np.linspace(0, len(classes) - 1, min(columns, len(classes))).round().astype(int)
    depth = min(rows, int(counts[chosen].min()))
    places = np.stack([np.flatnonzero(labels == classes[i])[:depth] for i in chosen], axis=1)  # (rows, columns)
    return images[places.ravel()], classes[chosen]


def grid_png(
    images: Images, labels: Labels, out: Path | str, columns: int = 10, scale: int | None = None, rows: int = 8
) -> None:
    """Writes a sheet of the samples of `by_class`: one class per column, labelled.

    `scale` is the enlargement; None enlarges images to at least SIDE pixels.
    """
    shown, classes = by_class(images, labels, columns, rows)
    factor = scale or _factor(images)
    mosaic = _mosaic(shown, len(classes), factor)
    side = images.shape[2] * factor
    sheet = Image.new("RGB", (mosaic.width + 2 * MARGIN, mosaic.height + HEAD + 2 * MARGIN), "white")
    for i, label in enumerate(classes):
        _write(sheet, str(label), MARGIN + i * (side + GAP) + side // 2, MARGIN, centred=True)
    sheet.paste(mosaic, (MARGIN, MARGIN + HEAD))
    _save(sheet, out)


def compare_png(panels: Mapping[str, Images], out: Path | str, columns: int = 10, scale: int | None = None) -> None:
    """Writes sets of samples side by side with their titles, each in rows of `columns` in the given order.

    All sets are truncated to the shortest one. Raises ValueError without panels.
    """
    if not panels:
        raise ValueError("there are no panels to compare; pass at least one title with images")
    for images in panels.values():
        _check(images)
    count = min(len(images) for images in panels.values())
    columns = min(columns, count)
    sheets = {title: _mosaic(images[:count], columns, scale or _factor(images)) for title, images in panels.items()}
    gap = 3 * MARGIN
    widths = [max(sheet.width, _length(title)) for title, sheet in sheets.items()]
    height = max(sheet.height for sheet in sheets.values())
    whole = Image.new("RGB", (sum(widths) + gap * (len(widths) - 1) + 2 * MARGIN, height + HEAD + 2 * MARGIN), "white")
    left = MARGIN
    for (title, sheet), width in zip(sheets.items(), widths, strict=True):
        _write(whole, title, left, MARGIN)
        whole.paste(sheet, (left, MARGIN + HEAD))
        left += width + gap
    _save(whole, out)


def prompts_png(panels: Mapping[str, tuple[Images, Labels]], out: Path | str, rows: int = 12, each: int = 4) -> None:
    """Writes samples of several sets for the same prompts: a row per prompt with its text, at most `each` per set.

    `panels` maps titles to images and captions (N,) str. The prompts are evenly spaced among those that all sets have,
    at most `rows`. Raises ValueError if there are none.
    """
    common = set.intersection(*(set(map(str, captions)) for _, captions in panels.values()))
    if not common:
        raise ValueError("the sets of samples have no prompt in common; pass sets of the same prompts")
    ordered = sorted(common)
    prompts = [ordered[i] for i in np.linspace(0, len(ordered) - 1, min(rows, len(ordered))).round().astype(int)]
    found = {title: _of_prompts(images, captions, prompts, each) for title, (images, captions) in panels.items()}
    left, gap = MARGIN + max(map(_length, prompts)) + MARGIN, 3 * MARGIN
    widths = []
    for title, picked in found.items():
        factor = _factor(picked[0])
        widths.append(max(max(map(len, picked)) * (picked[0].shape[2] * factor + GAP), _length(title)))
    tall = max(picked[0].shape[1] * _factor(picked[0]) for picked in found.values()) + GAP
    size = (left + sum(widths) + gap * (len(widths) - 1) + MARGIN, len(prompts) * tall + HEAD + 2 * MARGIN)
    sheet = Image.new("RGB", size, "white")
    for i, prompt in enumerate(prompts):
        _write(sheet, prompt, MARGIN, MARGIN + HEAD + i * tall + (tall - TITLE) // 2)
    for (title, picked), width in zip(found.items(), widths, strict=True):
        _write(sheet, title, left, MARGIN)
        for i, images in enumerate(picked):
            sheet.paste(_mosaic(images, len(images), _factor(images)), (left, MARGIN + HEAD + i * tall))
        left += width + gap
    _save(sheet, out)


def _of_prompts(images: Images, captions: Labels, prompts: Sequence[str], each: int) -> list[Images]:
    """The first `each` images of every prompt."""
    _check(images)
    return [images[np.flatnonzero(captions == prompt)[:each]] for prompt in prompts]


def _check(images: Images) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images are {images.dtype} {images.shape}; expected uint8 (N, H, W, C), N > 0, C 1 or 3")


def _factor(images: Images) -> int:
    return max(1, math.ceil(SIDE / images.shape[2]))


def _enlarged(image: NDArray[np.uint8], factor: int) -> Image.Image:
    pixels = np.broadcast_to(image, (*image.shape[:2], 3)).repeat(factor, axis=0).repeat(factor, axis=1)
    return Image.fromarray(pixels)


def _mosaic(images: Images, columns: int, factor: int) -> Image.Image:
    height, width = images.shape[1] * factor, images.shape[2] * factor
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for i, image in enumerate(images):
        sheet.paste(_enlarged(image, factor), ((i % columns) * (width + GAP), (i // columns) * (height + GAP)))
    return sheet


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(TITLE)


def _length(text: str) -> int:
    return math.ceil(_font().getlength(text))


def _write(sheet: Image.Image, text: str, left: int, top: int, *, centred: bool = False) -> None:
    start = left - _length(text) // 2 if centred else left
    ImageDraw.Draw(sheet).text((start, top), text, fill="black", font=_font())


def _save(sheet: Image.Image, out: Path | str) -> None:
    with atomic(out) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
