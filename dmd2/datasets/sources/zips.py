"""Images in a zip archive, read without unpacking."""

from __future__ import annotations

import json
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dmd2.config import Data
from dmd2.datasets.sources.base import EncodedImages, Unreadable, existing, fingerprint_of
from dmd2.datasets.sources.listing import OUTSIDE, REPLACED, TRAINING, PassedOver, is_hidden, taken, training_split
from dmd2.datasets.sources.spans import Spans
from dmd2.errors import UserError

LABELS = "dataset.json"
HEADER = struct.Struct("<4s22xHH")  # local file header: signature, ..., lengths of the name and of the extra field


class ImageZip(EncodedImages):
    """A zip of class folders, or one written by EDM's dataset tool, with the classes in `dataset.json`.

    Class folders are those in the innermost folder that contains all images, or in the folder `train` if there is one
    (as in Kaggle's archive of ImageNet), numbered in the sorted order of their names. Images are in the order of their
    paths.
    """

    def __init__(self, data: Data):
        path = existing(data, "a zip of images")
        try:
            with zipfile.ZipFile(path) as archive:
                members = sorted(archive.infolist(), key=lambda m: m.filename.split("/"))
                stored = _stored_labels(archive, path)
        except UserError:
            raise
        except Exception as error:  # `zipfile` raises many types on damaged files
            raise UserError(f"{path}: not a complete zip archive ({error}); fetch it again") from None
        passed_over = PassedOver()
        files = _files(members, path, passed_over)
        chosen = {name: files[name] for name in taken((n for n in files if n != LABELS), passed_over)}
        labels, classes = (
            _by_folder(list(chosen), passed_over) if stored is None else _by_list(list(chosen), stored, path)
        )
        images = [chosen[name] for name in labels]
        super().__init__(data, list(labels), list(labels.values()), classes, passed_over)
        self._check(path, images)
        self._methods = np.array([m.compress_type for m in images], np.uint8)
        self._crcs = np.array([m.CRC for m in images], np.uint32)
        sizes = [m.compress_size for m in images]
        self._spans = Spans([str(path)], [0] * len(images), [m.header_offset for m in images], sizes)
        listing = (f"{name} {label}" for name, label in labels.items())
        self.fingerprint = fingerprint_of(listing, [m.file_size for m in images])

    def read(self, number: int) -> bytes:
        """The member's content, with its CRC-32 checked; Unreadable if damaged. Not by `zipfile`, which would list 1.28
        million members again in every process."""
        content = self._content(number)
        if self._methods[number] == zipfile.ZIP_DEFLATED:
            try:
                content = zlib.decompress(content, -zlib.MAX_WBITS)
            except zlib.error as error:
                raise Unreadable(f"damaged in the archive ({error})") from None
        if zlib.crc32(content) != self._crcs[number]:
            raise Unreadable("damaged in the archive (its checksum differs)")
        return content

    def _content(self, number: int) -> bytes:
        start = self._spans.offset(number)
        try:
            signature, name, extra = HEADER.unpack(self._spans.read(0, start, HEADER.size))
            content = self._spans.read(0, start + HEADER.size + name + extra, int(self._spans.sizes[number]))
        except UserError:  # the archive is complete: its end was read
            raise Unreadable("damaged in the archive (it would extend beyond the end)") from None
        if signature != b"PK\x03\x04":
            raise Unreadable("damaged in the archive (no header)")
        return content

    @staticmethod
    def _check(path: Path, images: list[zipfile.ZipInfo]) -> None:
        for member in images:
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
                raise UserError(
                    f"{path}: {member.filename} is encrypted or compressed by another method than deflate; unpack it "
                    f"and use source image_folder"
                )


def _files(members: list[zipfile.ZipInfo], path: Path, passed_over: PassedOver) -> dict[str, zipfile.ZipInfo]:
    """The files by name; of one that is there twice, the last, which unpacking leaves. Raises UserError for a link."""
    found: dict[str, zipfile.ZipInfo] = {}
    for member in members:
        if stat.S_ISLNK(member.external_attr >> 16) and not is_hidden(member.filename):
            raise UserError(
                f"{path}: {member.filename} is a symbolic link; pack the files themselves (zip without --symlinks)"
            )
        if member.filename in found:
            passed_over.add(REPLACED, member.filename)
        if not member.is_dir():
            found[member.filename] = member
    return found


def _stored_labels(archive: zipfile.ZipFile, path: Path) -> dict[str, int] | None:
    """The classes that EDM's tool stored, by image path; None if there is no list. Raises UserError if invalid."""
    if LABELS not in archive.namelist():
        return None
    try:
        content: Any = json.loads(archive.read(LABELS))["labels"]
        return {str(name): int(label) for name, label in content}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: its {LABELS} contains no classes; make the archive from class folders") from None


def _by_list(names: list[str], stored: dict[str, int], path: Path) -> tuple[dict[str, int], list[str]]:
    """The class of each image, and the class names, from a stored list. Raises UserError if it is incomplete."""
    if missing := [name for name in names if name not in stored]:
        raise UserError(f"{path}: {LABELS} has no class for {missing[0]}, nor for {len(missing) - 1} more; complete it")
    if lost := sorted(stored.keys() - set(names)):
        raise UserError(
            f"{path}: {LABELS} lists {lost[0]} and {len(lost) - 1} more that are no images in it; pack them"
        )
    labels = {name: stored[name] for name in names}
    if labels and min(labels.values()) < 0:
        raise UserError(f"{path}: {LABELS} has the class {min(labels.values())}; classes count from 0")
    return labels, [str(label) for label in range(max(labels.values(), default=-1) + 1)]


def _by_folder(names: list[str], passed_over: PassedOver) -> tuple[dict[str, int], list[str]]:
    """The class of each image, and the class names, from the images' folders."""
    parts = {name: name.split("/") for name in names}
    if (depth := training_split(list(parts.values()))) is not None:
        parts = {name: p[depth + 1 :] for name, p in parts.items() if p[depth].lower() in TRAINING}
    while parts and len({p[0] for p in parts.values()}) == 1 and all(len(p) > 2 for p in parts.values()):
        parts = {name: p[1:] for name, p in parts.items()}
    folders = {name: p[0] if len(p) > 1 else "" for name, p in parts.items()}
    if any(folders.values()):
        for name in [name for name, folder in folders.items() if not folder]:
            passed_over.add(OUTSIDE, name)
            del folders[name]
    classes = sorted(set(folders.values()))
    numbers = {name: number for number, name in enumerate(classes)}
    return {name: numbers[folder] for name, folder in folders.items()}, classes
