"""COCO's captions: the released evaluation's list, the images of it, and all of them."""

import hashlib
import json
import logging
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from captioned import captioned, coco_files, image

from dmd2.config import Prompts
from dmd2.config.data import COCO_ANNOTATIONS
from dmd2.datasets import coco
from dmd2.datasets.prompts import load_prompts
from dmd2.datasets.sources import open_source
from dmd2.errors import UserError


def by_pandas_rules(content: list[dict[str, object]], num: int) -> list[tuple[str, str]]:
    """The released recipe, step by step: left merge, shuffle, first of each file, sample, each as pandas does it.

    pandas' `sample(n, random_state=r)` takes `r.choice(len, n, replace=False)`.
    """
    images = [item for item in content if "file_name" in item]
    merged = [
        (str(item["file_name"]), str(other["caption"]))
        for item in images
        for other in content
        if other.get("image_id") == item["id"]
    ]
    state = np.random.RandomState(123)
    shuffled = [merged[i] for i in state.choice(len(merged), len(merged), replace=False)]
    kept = [row for i, row in enumerate(shuffled) if row[0] not in {name for name, _ in shuffled[:i]}]
    return [kept[i] for i in state.choice(len(kept), num, replace=False)]


def test_the_subset_is_that_of_the_released_recipe(tmp_path: Path) -> None:
    _, content = coco_files(tmp_path)
    rows = coco.read_captions(tmp_path / COCO_ANNOTATIONS)
    assert [tuple(row) for row in coco.subset(rows, num=20)] == by_pandas_rules(content, 20)
    (tmp_path / coco.ANNOTATIONS).write_bytes(
        zipfile.ZipFile(tmp_path / COCO_ANNOTATIONS).read(f"annotations/{coco.ANNOTATIONS}")
    )
    assert coco.read_captions(tmp_path / coco.ANNOTATIONS) == rows


def test_the_generators_first_numbers_are_the_legacy_streams() -> None:
    """`RandomState(123).permutation(10)` begins 4, 0, 7, 5: another stream would make another list."""
    rows = [coco.Captioned(f"{i}.jpg", str(i)) for i in range(10)]
    assert [int(row.caption) for row in coco.subset(rows, num=4)] == [5, 3, 8, 7]


def test_the_digest_is_that_of_the_list_as_a_file(tmp_path: Path) -> None:
    captions = ["A man.", " Two\n dogs ", "Café"]
    path = tmp_path / "list.txt"
    path.write_bytes(coco.as_text(captions).encode())
    found = coco.digest(captions)
    assert found == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_prompts(Prompts(path=str(path), sha256=found)) == ("A man.", "Two dogs", "Café")


def test_images_and_prompts_of_the_subset_belong_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images, content = coco_files(tmp_path)
    monkeypatch.setattr(coco.subset, "__defaults__", (20, 123))
    source = open_source(captioned("coco10k", images))
    expected = by_pandas_rules(content, 20)
    captions = [" ".join(caption.split()) for _, caption in expected]
    assert source.labels.tolist() == captions
    with caplog.at_level(logging.INFO):
        assert list(load_prompts(Prompts(source="coco10k", path=str(tmp_path / COCO_ANNOTATIONS)))) == captions
    assert f"the list of 20 has the SHA-256 {coco.digest(captions)}" in caplog.text
    assert [source.name(i) for i in range(20)] == [name for name, _ in expected]
    copy = pickle.loads(pickle.dumps(source))
    for number in range(20):
        which = int(captions[number].split()[0])
        np.testing.assert_array_equal(source[number], image(which))
        np.testing.assert_array_equal(copy[number], image(which))


def test_all_images_have_their_first_caption(tmp_path: Path) -> None:
    images, content = coco_files(tmp_path)
    source = open_source(captioned("coco", images))
    names = {item["id"]: item["file_name"] for item in content if "file_name" in item}
    first = {names[item["image_id"]]: str(item["caption"]) for item in reversed(content) if "caption" in item}
    assert [source.name(i) for i in range(30)] == list(names.values())
    assert source.labels.tolist() == [" ".join(first[source.name(i)].split()) for i in range(30)]


def test_faults_are_reported(tmp_path: Path) -> None:
    images, _ = coco_files(tmp_path, extra=2)
    with pytest.raises(UserError, match=r"val2014.zip: has no COCO_val2014_.*, nor 1 others"):
        open_source(captioned("coco", images))
    with pytest.raises(UserError, match=r"COCO's captions are of 32 images, but 10000 are needed"):
        load_prompts(Prompts(source="coco10k", path=str(tmp_path / COCO_ANNOTATIONS)))
    other = tmp_path / "instances.json"
    other.write_text(json.dumps({"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1}]}))
    with pytest.raises(UserError, match=r"instances.json: not COCO's captions \(KeyError: 'caption'\)"):
        coco.read_captions(other)
    other.write_text("{")
    with pytest.raises(UserError, match=r"instances.json: not COCO's captions"):
        coco.read_captions(other)
    (tmp_path / COCO_ANNOTATIONS).write_bytes(b"PK")
    with pytest.raises(UserError, match=r"annotations_trainval2014.zip: not COCO's captions \(BadZipFile"):
        open_source(captioned("coco", images))
    (tmp_path / COCO_ANNOTATIONS).unlink()
    with pytest.raises(
        UserError, match=r"annotations_trainval2014.zip: no such file; put annotations_trainval2014.zip or"
    ):
        open_source(captioned("coco", images))
    with pytest.raises(UserError, match=r"gone.json: no such file; put"):
        coco.read_captions(tmp_path / "gone.json")
