"""Class-folder trees of images for tests, and other containers of the same images."""

import io
import json
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from dmd2.config import Data


def data_of(source: str, path: Path | str, **over: object) -> Data:
    keys = {"source": source, "path": str(path), "resolution": 4, "num_classes": 2, "shard_size": 3, **over}
    return Data.model_validate(keys)


def write_tree(root: Path, names: Iterable[str], size: tuple[int, int] = (6, 9)) -> None:
    """Random images of `size` (height, width) under `names`."""
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / name)


def files_of(root: Path) -> list[tuple[str, bytes]]:
    """(path below the root, content) of every file, in an order that no reader wants."""
    found = [(p.relative_to(root).as_posix(), p.read_bytes()) for p in root.rglob("*") if p.is_file()]
    return sorted(found, reverse=True)


def tar_of(members: Iterable[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def imagenet_tar(root: Path, path: Path) -> None:
    """The official layout: a tar of one tar per class folder."""
    files = files_of(root)
    classes = sorted({name.partition("/")[0] for name, _ in files}, reverse=True)
    inner = {c: [(n.rpartition("/")[2], content) for n, content in files if n.startswith(f"{c}/")] for c in classes}
    path.write_bytes(tar_of((f"{c}.tar", tar_of(inner[c])) for c in classes))


def class_zip(root: Path, path: Path, prefix: str = "", method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files_of(root):
            archive.writestr(f"{prefix}{name}", content)


def edm_zip(images: list[tuple[bytes, int]], path: Path) -> None:
    """What EDM's dataset tool writes: numbered images in folders of a thousand, stored, and dataset.json."""
    names = [f"{number // 1000:05d}/img{number:08d}.png" for number in range(len(images))]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, (content, _) in zip(names, images, strict=True):
            archive.writestr(name, content)
        labels = [[name, label] for name, (_, label) in zip(names, images, strict=True)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
