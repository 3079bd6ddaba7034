"""Reads byte ranges of large files."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping, Sequence
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmd2.config.data import is_url
from dmd2.datasets.remote import open_location
from dmd2.errors import UserError

MAX_OPEN_FILES, MAX_OPEN_REMOTE = 64, 8


class Spans:
    """Byte ranges (offset, size) in files, read by number. A pickled copy reopens the files.

    Files may be URLs; `sha256` has the checksums of those for which one is known.
    """

    def __init__(
        self,
        files: Sequence[str],
        file_of: Sequence[int],
        offsets: Sequence[int],
        sizes: Sequence[int],
        sha256: Mapping[str, str] | None = None,
    ):
        self._files, self._sha256 = list(files), dict(sha256 or {})
        self._file_of, self._offsets = np.asarray(file_of, np.int32), np.asarray(offsets, np.int64)
        self.sizes = np.asarray(sizes, np.int64)
        self._open: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, number: int) -> bytes:
        return self.read(int(self._file_of[number]), self.offset(number), int(self.sizes[number]))

    def offset(self, number: int) -> int:
        """The offset of range `number` in its file."""
        return int(self._offsets[number])

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Reads `size` bytes of file `file` at `offset`. Raises UserError if the file ends before."""
        descriptor = self._descriptor(file)
        inside = 0 <= offset <= offset + size <= os.fstat(descriptor).st_size
        content = os.pread(descriptor, size, offset) if inside else b""
        if not inside or len(content) != size:
            raise UserError(f"{self._files[file]}: ends within a member; it is truncated: fetch or copy it again")
        return content

    def _descriptor(self, file: int) -> int:
        if file not in self._open:
            while len(self._open) >= (MAX_OPEN_REMOTE if is_url(self._files[file]) else MAX_OPEN_FILES):
                os.close(self._open.pop(next(iter(self._open))))
            with open_location(self._files[file], self._sha256.get(self._files[file])) as opened:
                self._open[file] = os.dup(opened.fileno())
        return self._open[file]


class Member(NamedTuple):
    """A regular file in a tar: its name, and the offset and size of its content in the outermost file."""

    name: str
    offset: int
    size: int


def tar_members(path: Path | str, offset: int = 0, size: int | None = None, sha256: str | None = None) -> list[Member]:
    """The files of the uncompressed tar in `path`, or of a tar in it; links stand for the files that they point to.

    Raises UserError for a damaged one, and for a link to nothing in it.
    """
    with open_location(str(path), sha256) as file:
        end = os.fstat(file.fileno()).st_size
        window = _Window(file.fileno(), offset, end - offset if size is None else size)
        try:
            with tarfile.open(fileobj=window, mode="r:") as tar:
                members = [_followed(tar, m, offset, str(path)) for m in tar if m.isfile() or m.islnk() or m.issym()]
                window.seek(tar.offset)
        except tarfile.TarError as error:
            raise UserError(f"{path}: not a complete uncompressed tar ({error}); fetch or unpack it again") from None
        mark = window.read(tarfile.BLOCKSIZE)
    if mark != bytes(tarfile.BLOCKSIZE):  # `tarfile` treats a damaged header, or the end of the file, like the end mark
        last = f" after {members[-1].name}" if members else ""
        raise UserError(f"{path}: damaged or truncated{last} (no end mark); fetch or copy it again")
    return members


def _followed(tar: tarfile.TarFile, member: tarfile.TarInfo, offset: int, path: str) -> Member:
    """A file, or under a link's name the file that it points to."""
    target = member
    try:
        for _ in range(LINKS):
            if target.isfile():
                return Member(printable(member.name), offset + target.offset_data, target.size)
            target = tar._find_link_target(target)  # type: ignore[attr-defined]
    except KeyError:
        pass
    raise UserError(f"{path}: {printable(member.name)} is a link to nothing in this tar; pack the files themselves")


def printable(name: str) -> str:
    """A name that is not UTF-8 with its odd bytes as `\\xNN`, so that it can be written and shown."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


LINKS = 20
"""Most links that point to one another."""


class _Window(RawIOBase):
    """A byte range of a file as a file object."""

    def __init__(self, descriptor: int, offset: int, size: int):
        self._descriptor, self._offset, self._size, self._position = descriptor, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._position, 0)
        content = os.pread(self._descriptor, left if size < 0 else min(size, left), self._offset + self._position)
        self._position += len(content)
        return content
