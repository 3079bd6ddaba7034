"""A tree of image files."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dmd2.config import Data
from dmd2.datasets.sources.base import EncodedImages, existing, fingerprint_of, is_image
from dmd2.errors import UserError

LISTERS = 16
"""Threads that list a tree or archive: hides the latency of network disks."""


class ImageFolder(EncodedImages):
    """A folder with one folder of images per class; classes are numbered in the sorted order of the folders' names.

    Hidden files and files without an image suffix are ignored.
    """

    def __init__(self, data: Data):
        self._root = existing(data, "the class-folder tree")
        if not self._root.is_dir():
            raise UserError(f"data.path: {self._root} is not a folder; set it to the class-folder tree")
        classes = sorted(p.name for p in self._root.iterdir() if p.is_dir() and not p.name.startswith("."))
        with ThreadPoolExecutor(LISTERS) as pool:
            listings = list(pool.map(self._images_of, classes))
        names = [name for listing in listings for name, _ in listing]
        labels = [label for label, listing in enumerate(listings) for _ in listing]
        super().__init__(data, names, labels, classes)
        self.fingerprint = fingerprint_of(names, [size for listing in listings for _, size in listing])

    def read(self, number: int) -> bytes:
        path = self._root / self.name(number)
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); was it moved? run again") from error

    def _images_of(self, name: str) -> list[tuple[str, int]]:
        """(path relative to the root, size in bytes) of the images below a class folder, sorted."""
        found = []
        for top, _, files in os.walk(self._root / name):
            below = Path(top).relative_to(self._root).as_posix()
            found += [(f"{below}/{file}", _size(f"{top}/{file}")) for file in files if is_image(file)]
        if not found:
            raise UserError(f"{self._root / name}: class folder without an image; fill or remove it")
        return sorted(found, key=lambda item: item[0].split("/"))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); fix or remove it") from None
