"""Images in tar files, read without unpacking."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

from dmd2.config import Data
from dmd2.datasets.sources.base import EncodedImages, existing, fingerprint_of
from dmd2.datasets.sources.folder import LISTERS
from dmd2.datasets.sources.listing import (
    OTHER,
    OUTSIDE,
    REPLACED,
    PassedOver,
    is_hidden,
    is_image,
    reason,
    taken,
)
from dmd2.datasets.sources.spans import Member, Spans, tar_members
from dmd2.errors import UserError


class ImageNetTar(EncodedImages):
    """The official `ILSVRC2012_img_train.tar`: a tar of one tar per class, neither of them unpacked.

    Classes are numbered in the sorted order of the inner tars' names (n01440764.tar is class 0), images within a class
    by name.
    """

    def __init__(self, data: Data):
        path = existing(data, "ILSVRC2012_img_train.tar, a tar of one tar per class")
        passed_over, outer = PassedOver(), sorted(tar_members(path))
        inner = [member for member in outer if member.name.endswith(".tar") and not is_hidden(member.name)]
        for name in taken((member.name for member in sorted(set(outer) - set(inner))), passed_over):
            passed_over.add(OUTSIDE, name)
        if not inner:
            raise UserError(f"{path}: contains no tar of a class; is it ILSVRC2012_img_train.tar?")
        with ThreadPoolExecutor(LISTERS) as pool:
            contents = list(pool.map(lambda member: tar_members(path, member.offset, member.size), inner))
        found = []
        for label, members in enumerate(contents):
            by_name = {member.name: member for member in sorted(members)}
            for name in (Counter(member.name for member in members) - Counter(by_name.keys())).elements():
                passed_over.add(REPLACED, name)
            found += [(label, by_name[name]) for name in taken(by_name, passed_over)]
        classes = [Path(member.name).stem for member in inner]
        names = [f"{classes[label]}.tar/{member.name}" for label, member in found]
        super().__init__(data, names, [label for label, _ in found], classes, passed_over)
        offsets, sizes = [m.offset for _, m in found], [m.size for _, m in found]
        self._spans = Spans([str(path)], [0] * len(found), offsets, sizes)
        self.fingerprint = fingerprint_of(names, sizes)

    def read(self, number: int) -> bytes:
        return self._spans[number]


class WithImage(Protocol):
    """A sample of a WebDataset with its image."""

    @property
    def image(self) -> Member: ...


class _Sample(NamedTuple):
    """One sample of a WebDataset: its image and class."""

    image: Member
    label: int


class WebDatasetTars(EncodedImages):
    """WebDataset tars: samples of an image and its class (`KEY.jpg`, `KEY.cls`), in the order of the tars.

    The path is one tar or a pattern: `shards/train-{0000..1023}.tar`, `shards/*.tar`. The tars must be uncompressed,
    since compressed ones have no random access. Class names are the class numbers.
    """

    def __init__(self, data: Data):
        tars = expand(data)
        with ThreadPoolExecutor(LISTERS) as pool:
            contents = list(pool.map(_samples, tars, [data.classes] * len(tars)))
        found = [(file, sample) for file, (samples, _) in enumerate(contents) for sample in samples]
        images = [sample.image for _, sample in found]
        names = [f"{Path(tars[file]).name}/{sample.image.name}" for file, sample in found]
        classes = [str(label) for label in range(data.classes)]
        super().__init__(data, names, [sample.label for _, sample in found], classes, passed_by(tars, contents))
        sizes = [image.size for image in images]
        self._spans = Spans(tars, [file for file, _ in found], [image.offset for image in images], sizes)
        self.fingerprint = fingerprint_of((f"{n} {label}" for n, label in zip(names, self.labels, strict=True)), sizes)

    def read(self, number: int) -> bytes:
        return self._spans[number]


def expand(data: Data) -> list[str]:
    """The tars of a path or pattern, in its order; matches of `*`, or those in a folder, are sorted.

    Raises UserError if one is missing.
    """
    from webdataset.shardlists import expand_urls

    if data.path is None:
        raise UserError("data.path is not set, but source webdataset reads one; set it to the tars, {0000..0099} or *")
    if Path(data.path).is_file():  # its name may have the characters of patterns
        return [data.path]
    if Path(data.path).is_dir():
        pattern = f"{data.path}/*.tar"
        tars = sorted(str(item) for item in Path(data.path).glob("*.tar") if not is_hidden(item.name))
    else:
        pattern = data.path
        tars = [tar for part in expand_urls(pattern) for tar in (sorted(glob.glob(part)) if "*" in part else [part])]
    missing = [tar for tar in tars if not Path(tar).is_file()]
    if missing or not tars:
        raise UserError(f"data.path: {(missing or [pattern])[0]} does not exist; correct the path {data.path}")
    return tars


def passed_by(tars: list[str], contents: Sequence[tuple[Sequence[WithImage], list[str]]]) -> PassedOver:
    """The members of tars that are not read, from the samples and other members in `contents`."""
    found = PassedOver()
    for tar, (samples, others) in zip(tars, contents, strict=True):
        keys = {split_name(sample.image.name)[0] for sample in samples}
        for name in others:
            field = not is_hidden(name) and split_name(name)[0] in keys
            found.add(OTHER if field else reason(name), f"{Path(tar).name}/{name}")
    return found


def _samples(path: str, num_classes: int) -> tuple[list[_Sample], list[str]]:
    """The samples of one tar, in its order, and its other members.

    Raises UserError naming a sample without an image or a valid class.
    """
    members = tar_members(path)
    spans = Spans([path], [0] * len(members), [m.offset for m in members], [m.size for m in members])
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    others: list[str] = []
    for number, member in enumerate(members):
        key, kind = split_name(member.name)
        if is_image(member.name):
            add_image(images, key, member, path)
        elif kind == "cls" and not is_hidden(member.name):
            labels[key] = _label(spans[number], num_classes, f"{path}: {member.name}")
        else:
            others.append(member.name)
    if odd := sorted(images.keys() ^ labels.keys()):
        lacks = "class (.cls)" if odd[0] in images else "image"
        raise UserError(f"{path}: sample {odd[0]} has no {lacks}; complete or remove it")
    return [_Sample(image, labels[key]) for key, image in images.items()], others


def add_image(images: dict[str, Member], key: str, member: Member, path: str) -> None:
    """Adds the image of sample `key` of the tar at `path`. Raises UserError if the sample has one already."""
    if key in images:
        raise UserError(f"{path}: sample {key} has two images, {images[key].name} and {member.name}")
    images[key] = member


def split_name(name: str) -> tuple[str, str]:
    """Key and field of a member, as in WebDataset: the parts before and after the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    return f"{folder}{slash}{stem}", kind


def _label(content: bytes, num_classes: int, where: str) -> int:
    text = content.decode("ascii", "replace").strip()
    if not text.isdigit() or int(text) >= num_classes:
        raise UserError(f"{where}: {text[:40]!r} is not a class of 0 to {num_classes - 1}; check data.num_classes")
    return int(text)
