"""COCO's validation images of 2014, from the official archive."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

from dmd2.config import Data
from dmd2.datasets import coco
from dmd2.datasets.sources.base import EncodedImages, Unreadable, existing, fingerprint_of
from dmd2.datasets.texts import tidy
from dmd2.errors import UserError


class CocoImages(EncodedImages):
    """The images in `val2014.zip`, each with its first caption; `annotations_trainval2014.zip` is beside it."""

    def __init__(self, data: Data):
        self._path = existing(data, "COCO's val2014.zip")
        chosen = self.choose(coco.read_captions(Path(str(data.annotations))))
        self._archive: zipfile.ZipFile | None = None
        members = {member.filename.rpartition("/")[2]: member for member in self._open().infolist()}
        if missing := [row.image for row in chosen if row.image not in members]:
            raise UserError(
                f"{self._path}: has no {missing[0]}, nor {len(missing) - 1} others that the annotations name; fetch it "
                f"again"
            )
        super().__init__(data, [row.image for row in chosen], [tidy(row.caption) for row in chosen], ())
        self._members = [members[row.image].filename for row in chosen]
        listing = (f"{row.image} {row.caption} {members[row.image].CRC}" for row in chosen)
        self.fingerprint = fingerprint_of(listing, [members[row.image].file_size for row in chosen])

    @staticmethod
    def choose(rows: list[coco.Captioned]) -> list[coco.Captioned]:
        """The images of the source, in its order."""
        return coco.first_of_each(rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def read(self, number: int) -> bytes:
        """The member's content, with its CRC-32 checked; Unreadable if damaged."""
        try:
            return self._open().read(self._members[number])
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise Unreadable(f"damaged in the archive ({error})") from None

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None:
            try:
                self._archive = zipfile.ZipFile(self._path)
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(f"{self._path}: not a complete zip archive ({error}); fetch it again") from None
        return self._archive


class Coco10k(CocoImages):
    """The 10,000 images and captions of the released SDXL evaluation, in its order; files as for `CocoImages`."""

    @staticmethod
    def choose(rows: list[coco.Captioned]) -> list[coco.Captioned]:
        """See `coco.subset`."""
        return coco.subset(rows)
