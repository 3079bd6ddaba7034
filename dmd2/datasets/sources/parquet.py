"""Images with captions in Parquet files."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from dmd2.config import Data
from dmd2.datasets.sources.base import EncodedImages, Unreadable, existing, fingerprint_of
from dmd2.datasets.sources.listing import is_hidden
from dmd2.datasets.texts import CAPTION_KEYS, tidy
from dmd2.errors import UserError

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
ROWS = 32
"""Images that are held in memory at a time."""
BUFFER = 2**20
"""Bytes that are read at a time; without it a whole column of a row group, which may be gigabytes."""


class ParquetImages(EncodedImages):
    """Parquet files of encoded images and captions: one file, a folder of them, or a pattern, in the order of names.

    The image is in the column `image` (bytes, or Hugging Face's record of `bytes` and `path`) or in `jpg`, `jpeg`,
    `png` or `webp` (img2dataset), the caption in `caption` or `text`. Images are read in the order of the rows with a
    few in memory; another order decodes a row group up to the row.
    """

    def __init__(self, data: Data):
        self._paths = _expand(data)
        captions: list[str] = []
        names: list[str] = []
        sizes: list[int] = []
        starts = [0]  # of the row groups, in rows of all files
        self._groups: list[tuple[int, int]] = []  # file and number in it
        self._columns: list[str] = []
        for number, path in enumerate(self._paths):
            column, texts, counts = _outline(path)
            captions += texts
            names += [f"{Path(path).name} row {row}" for row in range(len(texts))]
            sizes += [Path(path).stat().st_size] * len(texts)
            starts += (starts[-1] + np.cumsum(counts)).tolist()
            self._groups += [(number, group) for group in range(len(counts))]
            self._columns.append(column)
        super().__init__(data, names, captions, ())
        self._starts = np.asarray(starts[:-1], np.int64)
        self.fingerprint = fingerprint_of((f"{n} {text}" for n, text in zip(names, captions, strict=True)), sizes)
        self._rows = _Rows()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": _Rows()}

    def read(self, number: int) -> bytes:
        group = int(np.searchsorted(self._starts, number, side="right")) - 1  # the last of equal starts is not empty
        file, in_file = self._groups[group]
        path = self._paths[file]
        try:
            value = self._rows.get(path, self._columns[file], in_file, number - int(self._starts[group]))
        except (pyarrow.ArrowException, OSError, StopIteration) as error:
            raise UserError(f"{path}: damaged or changed ({error}); fetch it again") from None
        if isinstance(value, dict):
            value = value["bytes"]
        if value is None:
            raise Unreadable("the row has no image")
        return bytes(value)


class _Rows:
    """The rows of one column of a row group, read forwards."""

    def __init__(self) -> None:
        self._of: tuple[str, int] | None = None
        self._file: parquet.ParquetFile | None = None
        self._batches: Iterator[pyarrow.RecordBatch] = iter(())
        self._first, self._values = 0, pyarrow.array([])

    def get(self, path: str, column: str, group: int, row: int) -> Any:
        """Row `row` of a row group."""
        if self._of != (path, group) or row < self._first:
            self._begin(path, column, group)
        while row >= self._first + len(self._values):
            self._first += len(self._values)
            self._values = next(self._batches).column(0)
        return self._values[row - self._first].as_py()

    def _begin(self, path: str, column: str, group: int) -> None:
        if self._file is None or self._of is None or self._of[0] != path:
            if self._file is not None:
                self._file.close()
            self._file = parquet.ParquetFile(path, buffer_size=BUFFER)
        self._batches = self._file.iter_batches(ROWS, row_groups=[group], columns=[column], use_threads=False)
        self._of, self._first, self._values = (path, group), 0, pyarrow.array([])


def _outline(path: str) -> tuple[str, list[str], list[int]]:
    """Column of the images, captions, and rows of each row group of a file. Raises UserError for an unsuitable one."""
    try:
        with parquet.ParquetFile(path) as file:
            schema, footer = file.schema_arrow, file.metadata
            image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
            text = next((name for name in CAPTION_KEYS if name in schema.names), None)
            if image is None or text is None:
                wanted = "`caption` or `text`" if text is None else ", ".join(IMAGE_COLUMNS)
                raise UserError(f"{path}: has no column {wanted}, only {', '.join(schema.names)}; rename it")
            kind = schema.field(image).type
            if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                image, kind = f"{image}.bytes", kind.field("bytes").type
            if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
                raise UserError(f"{path}: column {image} holds {kind}, not the bytes of image files; store those")
            captions = [tidy(value) for value in file.read(columns=[text])[text].to_pylist()]
            return image, captions, [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    except TypeError as error:
        raise UserError(f"{path}: the caption {error}; correct it") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); fetch it again") from None


def _expand(data: Data) -> list[str]:
    """The files of a path, folder or pattern, sorted. Raises UserError if there is none."""
    if data.path is not None and "*" in data.path and not Path(data.path).exists():
        found = sorted(glob.glob(data.path))
    else:
        path = existing(data, "Parquet files of images and captions")
        inside = [item for item in path.glob("*.parquet") if not is_hidden(item.name)] if path.is_dir() else [path]
        found = sorted(map(str, inside))
    if not found:
        raise UserError(f"data.path: {data.path} has no Parquet file; correct it")
    return found
