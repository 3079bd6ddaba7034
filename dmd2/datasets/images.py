"""Writes the images of a source as shards."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dmd2 import files
from dmd2.config import Data
from dmd2.datasets import members, origin
from dmd2.datasets.shards import Batch, LeftOut, write_shards
from dmd2.datasets.sources import Source, Unreadable, open_source
from dmd2.datasets.sources.listing import PassedOver
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec

log = logging.getLogger(__name__)
BATCH = 64
BEYOND = 100
"""How many unreadable images above the limit are listed before the job stops."""
NAMED = 3
"""How many of them the error message names."""
NO_CAPTION = "no caption"
PROBED = 32
"""Number of images encoded to estimate the size of all."""


def write_images(
    manifest_path: Path | str,
    data: Data,
    spec: Spec,
    *,
    workers: int = 1,
    progress: Callable[[int], Callable[[int], object]] | None = None,
) -> dict[str, Any]:
    """Writes the images of a source as shards with the fields `image` and `cls` or `txt`; returns the manifest.

    The result does not depend on `workers`, the number of processes. `progress(total)` returns a function that is
    called with the number of images of each shard. Images that cannot be read are skipped and listed, with the
    reasons, in `unreadable.json` next to the manifest; images without a caption in `missing_captions.json`.

    Raises UserError if more than `data.max_unreadable` images cannot be read (finished shards are kept, so a higher
    limit resumes from them), and before the start if more than `data.max_passed_over` files that may be images are not
    taken, more than `data.captions.max_missing` images have no caption, or the disk has too little space.
    """
    manifest_path = Path(manifest_path)
    log.info("shards: listing %s", data.path or data.source)  # a minute for ImageNet's archive
    sight = origin.seen(data)
    source = open_source(data)
    check_passed_over(getattr(source, "passed_over", PassedOver()), data)
    labels = f"{len(source.classes)} classes" if data.captions is None else "captions"
    log.info("shards: %d images with %s, %d processes", len(source), labels, workers)
    check_classes(source.labels, source.classes, "has no image")
    make = ImageMaker(source, f"image.{data.image_format}", data.label_field)
    missing = check_captions(source, data, manifest_path.with_name("missing_captions.json"))
    check_room(make, manifest_path.parent)
    report = _Unreadable(source, data.max_unreadable, manifest_path.with_name("unreadable.json"), missing)
    manifest = write_shards(
        manifest_path,
        len(source),
        data.shard_size,
        make,
        spec,
        batch_size=BATCH,
        inputs=source.fingerprint,
        workers=workers,
        progress=progress(len(source)) if progress is not None else None,
        left_out=report.add,
        facts=report.facts,
    )
    origin.remember(manifest_path, source.fingerprint, sight)
    return manifest


@dataclass(frozen=True)
class ImageMaker:
    """The images of a source as fields of samples."""

    source: Source
    image: str
    label: str

    def __call__(self, positions: range | Sequence[int]) -> Batch:
        images, labels, left_out = [], [], []
        for position in positions:
            if self.label == "txt" and not self.source.labels[position]:
                left_out.append(LeftOut(position, self.source.name(position), NO_CAPTION))
                continue
            try:
                images.append(self.source[position])
                labels.append(self.source.labels[position])
            except Unreadable as reason:
                left_out.append(LeftOut(position, self.source.name(position), str(reason)))
        return Batch({self.image: images, self.label: labels}, left_out)


@dataclass
class _Unreadable:
    """Counts and lists skipped images; raises UserError if there are too many."""

    source: Source
    limit: int
    path: Path
    missing: Sequence[int]
    """Positions of the images without a caption, which were counted before."""
    found: list[LeftOut] = field(default_factory=list)

    def add(self, items: Sequence[LeftOut]) -> None:
        """Adds skipped images. Raises UserError if there are more than `limit` + BEYOND unreadable ones."""
        self.found += [item for item in items if item.reason != NO_CAPTION]
        if len(self.found) > self.limit + BEYOND:
            self._stop("at least ")

    def facts(self) -> dict[str, Any]:
        """Facts about the whole set for the manifest. Raises UserError if more than `limit` images were skipped."""
        if len(self.found) > self.limit:
            self._stop("")
        self._write()
        kept = np.delete(self.source.labels, [*self.missing, *(item.position for item in self.found)])
        classes = list(self.source.classes)
        if not len(kept):
            raise UserError("none of the images can be read; check data.path")
        if kept.dtype.kind in "OU":
            captions = {"captions": len(set(kept.tolist())), "missing_captions": len(self.missing)}
            return {**captions, "unreadable": len(self.found)}
        check_classes(kept, classes, "has no readable image")
        return {
            "classes": classes,
            "images_of_class": np.bincount(kept, minlength=len(classes)).tolist(),
            "unreadable": len(self.found),
        }

    def _stop(self, at_least: str) -> None:
        self._write()
        ordered = sorted(self.found)
        names = "; ".join(f"{item.name}: {item.reason}" for item in ordered[:NAMED])
        more = f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else ""
        raise UserError(
            f"{at_least}{len(ordered)} of {len(self.source)} images cannot be read, data.max_unreadable is "
            f"{self.limit}: {names}{more} (all in {self.path}); replace or remove them, or raise data.max_unreadable: "
            f"finished shards are kept"
        )

    def _write(self) -> None:
        """Writes the list of skipped images in the order of the source; removes it if there are none."""
        if self.found:
            files.write_json(self.path, {"unreadable": [item._asdict() for item in sorted(self.found)]})
        else:
            self.path.unlink(missing_ok=True)


def check_passed_over(passed_over: PassedOver, data: Data) -> None:
    """Logs what a source passes over. Raises UserError if more than `data.max_passed_over` of it may be images."""
    if passed_over:
        log.info("shards: passed over: %s", passed_over)
    if len(doubtful := passed_over.doubtful) > data.max_passed_over:
        raise UserError(
            f"{data.path}: {len(doubtful)} files that may be images are not taken, data.max_passed_over is "
            f"{data.max_passed_over}: {doubtful}; rename, move or remove them, or raise data.max_passed_over"
        )


def check_classes(labels: np.ndarray, classes: Sequence[str], what: str) -> None:
    """Raises UserError if a class has no image: samples of every class are compared with the images."""
    if labels.dtype.kind in "OU":
        return
    counts = np.bincount(labels, minlength=len(classes))
    if len(empty := np.flatnonzero(counts == 0)):
        named = ", ".join(f"{number} ({classes[number]})" for number in empty[:NAMED])
        more = f" and {len(empty) - NAMED} more" if len(empty) > NAMED else ""
        raise UserError(
            f"data.num_classes is {len(classes)}, but class {named}{more} {what}; correct data.num_classes, number the "
            f"classes without gaps, or add images"
        )


def check_captions(source: Source, data: Data, path: Path) -> list[int]:
    """The positions of the images without a caption, which are listed in `path`; empty for a set with classes.

    Raises UserError if there are more than `data.captions.max_missing`.
    """
    limit = 0 if data.captions is None else data.captions.max_missing
    missing = [] if data.captions is None else [i for i, caption in enumerate(source.labels) if not caption]
    if not missing:
        path.unlink(missing_ok=True)
        return []
    names = [source.name(position) for position in missing]
    files.write_json(path, {"missing_captions": names})
    if len(missing) > limit or len(missing) == len(source):
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise UserError(
            f"{len(missing)} of {len(source)} images have no caption, data.captions.max_missing is {limit}: "
            f"{', '.join(names[:NAMED])}{more} (all in {path}); caption them, or raise the limit to leave them out"
        )
    log.warning("shards: %d of %d images have no caption and are left out: %s", len(missing), len(source), path)
    return missing


def check_room(make: ImageMaker, folder: Path) -> None:
    """Raises UserError if the disk of `folder` has less free space than the estimated size of the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    num = len(make.source)
    probe = make(np.linspace(0, num - 1, PROBED).astype(int).tolist())
    encoded = [
        len(members.encode(name, np.asarray(value))) for name, values in probe.fields.items() for value in values
    ]
    mean = sum(map(_in_tar, encoded)) / max(PROBED - len(probe.left_out), 1)
    needed = num * mean - sum(file.stat().st_size for file in folder.glob("shard-*.tar"))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: the shards of {num} images need about {needed / 1e9:.1f} GB more, but {free / 1e9:.1f} GB are "
            f"free; make room, or make {folder} a link to a larger disk"
        )


def _in_tar(size: int) -> int:
    """The size in a tar, in bytes, of a member of `size` bytes, including its header."""
    return 512 + -(-size // 512) * 512
