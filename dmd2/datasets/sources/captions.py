"""Images with captions, in a tree of files or in WebDataset tars."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from dmd2.config import Data
from dmd2.datasets.sources.base import EncodedImages, existing, fingerprint_of, read_image
from dmd2.datasets.sources.folder import LISTERS, refuse_lost_link, size_of, walk
from dmd2.datasets.sources.listing import PassedOver, is_hidden, is_image, taken
from dmd2.datasets.sources.spans import Member, Spans, tar_members
from dmd2.datasets.sources.tars import add_image, expand, passed_by, split_name
from dmd2.datasets.texts import CAPTION_KEYS, tidy
from dmd2.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def caption_in(item: Mapping[str, Any], where: str) -> str:
    """The caption of a JSON object or row, "" if it is null. Raises UserError if it is not a text."""
    try:
        return tidy(next((item[key] for key in CAPTION_KEYS if key in item), None))
    except TypeError as error:
        raise UserError(f"{where}: the caption {error}; correct it") from None


class CaptionedFolder(EncodedImages):
    """A tree of images with captions, in the order of their paths.

    Where there is a `metadata.jsonl`, `.csv` or `.parquet` (Hugging Face's image folders), it has the captions: rows of
    `file_name`, relative to it, and `caption` or `text`. Otherwise the caption of `NAME.jpg` is the text of `NAME.txt`
    beside it. Hidden files and folders are ignored.
    """

    def __init__(self, data: Data):
        self._root = existing(data, "a folder of images with captions")
        if not self._root.is_dir():
            raise UserError(f"data.path: {self._root} is not a folder; set it to the images with captions")
        names, tables, passed_over = self._list()
        names.sort(key=lambda name: name.split("/"))
        with ThreadPoolExecutor(LISTERS) as pool:
            sizes = list(pool.map(lambda name: size_of(str(self._root / name)), names))
            captions = self._listed(names, tables) if tables else list(pool.map(self._beside, names))
        super().__init__(data, names, captions, (), passed_over)
        self.fingerprint = fingerprint_of((f"{n} {text}" for n, text in zip(names, captions, strict=True)), sizes)

    def read(self, number: int) -> bytes:
        return read_image(self._root / self._names[number])

    def _list(self) -> tuple[list[str], list[Path], PassedOver]:
        """The images of the tree, relative to its root, its tables of metadata, and the files that are neither."""
        names: list[str] = []
        tables: list[Path] = []
        others: list[str] = []
        for top, files in walk(self._root):
            below = Path(top).relative_to(self._root)
            hidden = is_hidden(below.as_posix())
            paths = [(below / file).as_posix() for file in files]
            names += [path for path in paths if is_image(path)]
            found = [Path(top, name) for name in METADATA if name in files and not hidden]
            others += [path for path in paths if not is_image(path) and (hidden or not path.endswith(METADATA))]
            if len(found) > 1:
                raise UserError(f"{found[0]}: there is {found[1].name} as well; keep one of the two")
            tables += found
        for name in others:
            refuse_lost_link(str(self._root / name))
        stems = set() if tables else {name.rpartition(".")[0] for name in names}  # whose captions are in .txt
        passed_over = PassedOver()
        taken((name for name in others if not (name.endswith(".txt") and name[:-4] in stems)), passed_over)
        return names, tables, passed_over

    def _listed(self, names: list[str], tables: list[Path]) -> list[str]:
        """The captions of the images in tables; "" for an image that none of them lists."""
        captions: dict[str, str] = {}
        for table in tables:
            below = table.parent.relative_to(self._root)
            for file, caption in read_table(table):
                name = os.path.normpath((below / file).as_posix())
                if name in captions:
                    raise UserError(f"{table}: {file} is listed twice; keep one caption of each image")
                captions[name] = caption
        if absent := captions.keys() - set(names):
            raise UserError(
                f"{self._root}: {min(absent)} has a caption in the metadata, but is not there or not an image, nor are "
                f"{len(absent) - 1} others; complete the folder or remove their rows"
            )
        return [captions.get(name, "") for name in names]

    def _beside(self, name: str) -> str:
        path = (self._root / name).with_suffix(".txt")
        try:
            return tidy(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a readable text in UTF-8 ({error}); correct or remove it") from None


def read_table(path: Path) -> Iterator[tuple[str, str]]:
    """`file_name` and caption of every row of a table of metadata. Raises UserError for a damaged or incomplete one."""
    where = f"{path}: row "
    for number, row in enumerate(_rows(path), start=1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row.keys() & {*CAPTION_KEYS}:
            raise UserError(f"{where}{number} lacks `file_name`, or `caption` or `text`; complete it")
        yield row["file_name"], caption_in(row, f"{where}{number}")


def _rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            names = parquet.read_schema(path).names
            columns = [name for name in ("file_name", *CAPTION_KEYS) if name in names]
            yield from parquet.read_table(path, columns=columns).to_pylist()
        except (ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({error}); fetch it again") from None
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file, strict=True)
            else:
                yield from (json.loads(line) for line in file if line.strip())
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: not {path.suffix[1:].upper()} in UTF-8 ({error}); correct it") from None


class _Sample(NamedTuple):
    """One sample of a WebDataset: its image and caption."""

    image: Member
    caption: str


class CaptionedTars(EncodedImages):
    """WebDataset tars of images and captions (`KEY.jpg` with `KEY.txt` or `KEY.json`), in the order of the tars.

    A sample's `.txt` counts if it has one, otherwise `caption` or `text` in its `.json`, as img2dataset writes them.
    Paths: see `WebDatasetTars`.
    """

    def __init__(self, data: Data):
        tars = expand(data)
        with ThreadPoolExecutor(LISTERS) as pool:
            contents = list(pool.map(_samples, tars))
        found = [(file, sample) for file, (samples, _) in enumerate(contents) for sample in samples]
        images = [sample.image for _, sample in found]
        names = [f"{Path(tars[file]).name}/{sample.image.name}" for file, sample in found]
        captions = [sample.caption for _, sample in found]
        super().__init__(data, names, captions, (), passed_by(tars, contents))
        sizes = [image.size for image in images]
        self._spans = Spans(tars, [file for file, _ in found], [image.offset for image in images], sizes)
        self.fingerprint = fingerprint_of((f"{n} {text}" for n, text in zip(names, captions, strict=True)), sizes)

    def read(self, number: int) -> bytes:
        return self._spans[number]


def _samples(path: str) -> tuple[list[_Sample], list[str]]:
    """The samples of one tar, in its order, and its other members.

    Raises UserError naming a caption without an image or a damaged one.
    """
    members = tar_members(path)
    spans = Spans([path], [0] * len(members), [m.offset for m in members], [m.size for m in members])
    images: dict[str, Member] = {}
    texts: dict[str, dict[str, int]] = {"txt": {}, "json": {}}
    others: list[str] = []
    for number, member in enumerate(members):
        key, kind = split_name(member.name)
        if is_image(member.name):
            add_image(images, key, member, path)
        elif kind in texts and not is_hidden(member.name):
            texts[kind][key] = number
        else:
            others.append(member.name)
    if odd := sorted((texts["txt"].keys() | texts["json"].keys()) - images.keys()):
        raise UserError(f"{path}: sample {odd[0]} has a caption but no image; complete or remove it")
    found = []
    for key, image in images.items():
        held = [(kind, numbers[key]) for kind, numbers in texts.items() if key in numbers]
        captions = [_caption(spans[number], kind, f"{path}: {members[number].name}") for kind, number in held[:1]]
        found.append(_Sample(image, captions[0] if captions else ""))
    return found, others


def _caption(content: bytes, kind: str, where: str) -> str:
    try:
        text = content.decode("utf-8-sig")
        item = {"caption": text} if kind == "txt" else json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not {kind} in UTF-8 ({error}); correct or remove it") from None
    if not isinstance(item, dict):
        raise UserError(f"{where}: not a JSON object; correct or remove it")
    return caption_in(item, where)
