"""The same captioned images in every container that a source reads."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet
from trees import tar_of

from dmd2.config import Captions, Data

CAPTIONS = ["a red fox", "two ships, one “old”", "", "naïve café\n on a corner "]
TIDY = ["a red fox", "two ships, one “old”", "", "naïve café on a corner"]
"""What a source gives for `CAPTIONS`: the third image has none."""


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image(number)).save(stream, "PNG")
    return stream.getvalue()


def captioned(source: str, path: Path | str, max_missing: int = 1, **over: object) -> Data:
    keys = {"source": source, "path": str(path), "resolution": 4, "captions": Captions(max_missing=max_missing), **over}
    return Data.model_validate({"shard_size": 3, **keys})


def folder_of(root: Path) -> Path:
    """Images in nested folders in sorted order."""
    for number in range(len(CAPTIONS)):
        (root / f"{number // 2:05d}").mkdir(parents=True, exist_ok=True)
        (root / f"{number // 2:05d}" / f"{number:03d}.png").write_bytes(png(number))
    return root


def _texts(root: Path) -> tuple[str, Path | str]:
    folder_of(root / "a")
    for number, caption in enumerate(CAPTIONS):
        if number != 2:  # the third has no file
            (root / "a" / f"{number // 2:05d}" / f"{number:03d}.txt").write_text(caption, encoding="utf-8")
    return "image_folder", root / "a"


def _metadata(kind: str) -> Callable[[Path], tuple[str, Path | str]]:
    def make(root: Path) -> tuple[str, Path | str]:
        folder, key = folder_of(root / "a"), "caption" if kind == "csv" else "text"
        rows = [
            {"file_name": f"{number // 2:05d}/{number:03d}.png", "width": 4, key: text or None}
            for number, text in enumerate(CAPTIONS)
        ]
        path = folder / f"metadata.{kind}"
        if kind == "jsonl":
            path.write_text("".join(f"{json.dumps(row)}\n" for row in reversed(rows)), encoding="utf-8")
        elif kind == "csv":
            lines = [f'{row["file_name"]},4,"{row[key] or ""}"' for row in rows]
            path.write_text("\n".join(["file_name,width,caption", *lines]), encoding="utf-8")
        else:
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return "image_folder", folder

    return make


def _tars(kind: str) -> Callable[[Path], tuple[str, Path | str]]:
    def make(root: Path) -> tuple[str, Path | str]:
        root.mkdir(exist_ok=True)
        for tar in range(2):
            members = []
            for number in (2 * tar, 2 * tar + 1):
                item = {"caption": CAPTIONS[number] or None, "status": "success"}
                members += [(f"{number:05d}.png", png(number)), (f"{number:05d}.json", json.dumps(item).encode())]
                if kind == "txt" and number != 2:  # beside it, another caption in the JSON does not count
                    members[-1] = (f"{number:05d}.json", b'{"caption": "of the page"}')
                    members.append((f"{number:05d}.txt", CAPTIONS[number].encode()))
            (root / f"{tar:05d}.tar").write_bytes(tar_of(members))
        return "webdataset", f"{root}/{{00000..00001}}.tar"

    return make


def _parquet(column: str) -> Callable[[Path], tuple[str, Path | str]]:
    def make(root: Path) -> tuple[str, Path | str]:
        root.mkdir(exist_ok=True)
        for file, rows in enumerate((range(3), range(3, 4))):
            images = [png(number) for number in rows]
            values = [{"bytes": item, "path": "x.png"} for item in images] if column == "image" else images
            content = {"key": list(rows), column: values, "caption": [CAPTIONS[number] or None for number in rows]}
            parquet.write_table(pyarrow.table(content), root / f"{file:05d}.parquet", row_group_size=2)
        return "parquet", f"{root}/*.parquet" if column == "jpg" else root

    return make


CONTAINERS: dict[str, Callable[[Path], tuple[str, Path | str]]] = {
    "texts": _texts,
    "jsonl": _metadata("jsonl"),
    "csv": _metadata("csv"),
    "parquet metadata": _metadata("parquet"),
    "txt in tars": _tars("txt"),
    "json in tars": _tars("json"),
    "parquet of records": _parquet("image"),
    "parquet of bytes": _parquet("jpg"),
}


def coco_files(root: Path, num: int = 30, extra: int = 0) -> tuple[Path, list[dict[str, object]]]:
    """`val2014.zip` of `num` images and the official archive of annotations beside it; the annotations in its order.

    Images are not in the order of their numbers, annotations not in that of the images; image k has 2 + k % 3 captions.
    `extra` further images are annotated but not in the archive.
    """
    rng = np.random.default_rng(0)
    order = rng.permutation(num + extra).tolist()
    images = [{"id": 7 * k, "file_name": f"COCO_val2014_{7 * k:012d}.jpg"} for k in order]
    annotations = [
        {"image_id": 7 * k, "id": 9, "caption": f"{k}  {j}"} for j in range(4) for k in order if j < 2 + k % 3
    ]
    annotations = [annotations[i] for i in rng.permutation(len(annotations))]
    with zipfile.ZipFile(root / "annotations_trainval2014.zip", "w") as archive:
        content = {"info": {}, "images": images, "annotations": annotations}
        archive.writestr("annotations/captions_val2014.json", json.dumps(content))
    with zipfile.ZipFile(root / "val2014.zip", "w") as archive:
        for k in range(num):
            archive.writestr(f"val2014/COCO_val2014_{7 * k:012d}.jpg", png(k))
    return root / "val2014.zip", [*images, *annotations]
