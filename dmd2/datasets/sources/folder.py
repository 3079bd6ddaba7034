"""A tree of image files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dmd2.config import Data
from dmd2.datasets.sources.base import EncodedImages, existing, fingerprint_of, read_image
from dmd2.datasets.sources.listing import HIDDEN, OUTSIDE, SPLITS, TRAINING, PassedOver, is_hidden, is_image, taken
from dmd2.datasets.sources.spans import printable
from dmd2.errors import UserError

LISTERS = 16
"""Threads that list a tree or archive: hides the latency of network disks."""


class ImageFolder(EncodedImages):
    """A folder with one folder of images per class; classes are numbered in the sorted order of the folders' names.

    Below siblings named as splits (train, val, ...) only the training split is read. Links are followed. Hidden files
    and files without an image suffix are passed over and counted.
    """

    def __init__(self, data: Data):
        self._root = existing(data, "the class-folder tree")
        if not self._root.is_dir():
            raise UserError(f"data.path: {self._root} is not a folder; set it to the class-folder tree")
        self._root = _training_folder(self._root)
        classes = _folders(self._root)
        passed_over = _beside(self._root)
        with ThreadPoolExecutor(LISTERS) as pool:
            listed = list(pool.map(self._images_of, classes))
        listings = [listing for listing, _ in listed]
        for _, others in listed:
            taken(others, passed_over)
        names = [name for listing in listings for name, _ in listing]
        labels = [label for label, listing in enumerate(listings) for _ in listing]
        super().__init__(data, names, labels, [printable(name) for name in classes], passed_over)
        self.fingerprint = fingerprint_of(names, [size for listing in listings for _, size in listing])

    def read(self, number: int) -> bytes:
        return read_image(self._root / self._names[number])

    def _images_of(self, name: str) -> tuple[list[tuple[str, int]], list[str]]:
        """(path below the root, size in bytes) of the images in a class folder, sorted; and the other files."""
        found, others = [], []
        for top, files in walk(self._root / name):
            below = Path(top).relative_to(self._root).as_posix()
            for file in files:
                path = f"{below}/{file}"
                if is_image(path):
                    found.append((path, size_of(f"{top}/{file}")))
                else:
                    others.append(path)
                    refuse_lost_link(f"{top}/{file}")
        if not found:
            raise UserError(f"{self._root / printable(name)}: class folder without an image; fill or remove it")
        return sorted(found, key=lambda item: item[0].split("/")), others


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder below `root` with its files; links to folders are followed, once.

    Raises UserError for a folder that cannot be listed, and for a link into a folder above it.
    """

    def stop(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); give yourself read access to it")

    above: dict[str, tuple[str, ...]] = {str(root): (os.path.realpath(root),)}  # the real folders on the way to each
    for top, folders, files in os.walk(root, followlinks=True, onerror=stop):
        way = above.pop(top)
        for name in folders:
            path = os.path.join(top, name)
            target = os.path.realpath(path) if os.path.islink(path) else os.path.join(way[-1], name)
            if any(f"{folder}/".startswith(f"{target}/") for folder in way):
                raise UserError(f"{printable(path)}: a link to a folder above itself; remove it")
            above[path] = (*way, target)
        yield top, files


def _folders(root: Path) -> list[str]:
    """The names of the folders in `root` that are not hidden, sorted. Raises UserError if it cannot be listed."""
    try:
        return sorted(p.name for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))
    except OSError as error:
        raise UserError(f"{root}: cannot be listed ({error.strerror}); give yourself read access to it") from None


def _beside(root: Path) -> PassedOver:
    """What is beside the class folders: files, and hidden folders."""
    passed_over = PassedOver()
    for path in sorted(root.iterdir()):
        if path.is_dir() and is_hidden(path.name):
            passed_over.add(HIDDEN, f"{path.name}/")
        elif not path.is_dir():
            refuse_lost_link(str(path))
            for name in taken([path.name], passed_over):
                passed_over.add(OUTSIDE, name)
    return passed_over


def _training_folder(root: Path) -> Path:
    """The folder with the class folders: `root`, or its training split if all its folders are splits."""
    names = _folders(root)
    training = [name for name in names if name.lower() in TRAINING]
    if training and all(name.lower() in SPLITS for name in names) and _folders(root / training[0]):
        return root / training[0]
    return root


def refuse_lost_link(path: str) -> None:
    """Raises UserError for a link to nothing, which may stand for a folder of images; a hidden one is passed over."""
    if os.path.islink(path) and not os.path.exists(path) and not is_hidden(os.path.basename(path)):
        target = printable(os.readlink(path))
        raise UserError(f"{printable(path)}: a link to {target}, where nothing is; restore that, or correct the link")


def size_of(path: str) -> int:
    """The size of an image's file in bytes. Raises UserError if there is none, or a pipe or device in its place."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be read ({error.strerror}); fix or remove it") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{printable(path)}: not a file but a pipe, socket or device; remove it")
    return found.st_size
