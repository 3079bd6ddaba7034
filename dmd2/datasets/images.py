"""From a source of images to shards of them."""

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
from dmd2.datasets import members
from dmd2.datasets.shards import Batch, LeftOut, write_shards
from dmd2.datasets.sources import Source, Unreadable, open_source
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec

log = logging.getLogger(__name__)
BATCH = 64
BEYOND = 100
"""How many unreadable images over the limit are still listed before the rest is left alone."""
NAMED = 3
"""How many of them the error names."""
PROBED = 32
"""Images encoded to estimate how much room all take."""


def write_images(
    manifest_path: Path | str,
    data: Data,
    spec: Spec,
    *,
    workers: int = 1,
    progress: Callable[[int], Callable[[int], object]] | None = None,
) -> dict[str, Any]:
    """Writes the images of a source as shards with the fields `image` and `cls`; returns the manifest.

    `workers` processes share the work; the result does not depend on their number. `progress(total)` gives what is
    called with the number of images of each shard. Images that cannot be read are left out and listed, with the
    reasons, in `unreadable.json` beside the manifest.

    Raises UserError when more than `data.max_unreadable` cannot be read (finished shards stay: a higher limit goes on
    from them), and before the start when the disk has too little room.
    """
    manifest_path = Path(manifest_path)
    log.info("shards: listing %s", data.path or data.source)  # a minute for ImageNet's archive
    source = open_source(data)
    log.info("shards: %d images of %d classes, %d processes", len(source), len(source.classes), workers)
    make = ImageMaker(source, f"image.{data.image_format}")
    check_room(make, manifest_path.parent)
    report = _Unreadable(source, data.max_unreadable, manifest_path.with_name("unreadable.json"))
    return write_shards(
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


@dataclass(frozen=True)
class ImageMaker:
    """The images of a source as fields of samples."""

    source: Source
    image: str

    def __call__(self, positions: range | Sequence[int]) -> Batch:
        images, labels, left_out = [], [], []
        for position in positions:
            try:
                images.append(self.source[position])
                labels.append(int(self.source.labels[position]))
            except Unreadable as reason:
                left_out.append(LeftOut(position, self.source.name(position), str(reason)))
        return Batch({self.image: images, "cls": labels}, left_out)


@dataclass
class _Unreadable:
    """Counts and lists what was left out, and stops when it is too much."""

    source: Source
    limit: int
    path: Path
    found: list[LeftOut] = field(default_factory=list)

    def add(self, items: Sequence[LeftOut]) -> None:
        """Notes some; raises UserError when there are so many that the rest need not be looked at."""
        self.found += items
        if len(self.found) > self.limit + BEYOND:
            self._stop("at least ")

    def facts(self) -> dict[str, Any]:
        """What the manifest tells of the whole set; raises UserError when more is left out than the limit allows."""
        if len(self.found) > self.limit:
            self._stop("")
        self._write()
        kept = np.delete(self.source.labels, [item.position for item in self.found])
        classes = list(self.source.classes)
        if not len(kept):
            raise UserError("none of the images can be read; check data.path")
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
        """Lists what was left out in the order of the source; no list where nothing was."""
        if self.found:
            files.write_json(self.path, {"unreadable": [item._asdict() for item in sorted(self.found)]})
        else:
            self.path.unlink(missing_ok=True)


def check_room(make: ImageMaker, folder: Path) -> None:
    """Raises UserError when the disk of `folder` has less room than the shards are estimated to take."""
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
            f"{folder}: the shards of {num} images take about {needed / 1e9:.1f} GB more, but {free / 1e9:.1f} GB are "
            f"free; make room, or make {folder} a link to a larger disk"
        )


def _in_tar(size: int) -> int:
    """The room that a member of `size` bytes takes, its header included."""
    return 512 + -(-size // 512) * 512
