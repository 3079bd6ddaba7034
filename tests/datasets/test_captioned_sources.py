"""Images with captions: every container gives the same images and captions; what is missing or damaged is reported."""

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from captioned import CAPTIONS, CONTAINERS, TIDY, captioned, folder_of, image, png
from pyarrow import parquet
from trees import tar_of

from dmd2.datasets.images import write_images
from dmd2.datasets.reader import ShardReader
from dmd2.datasets.sources import Unreadable, open_source
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec

ORDERS = [[0, 1, 2, 3], [3, 0, 2, 1, 0]]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_gives_the_images_and_their_captions(kind: str, tmp_path: Path) -> None:
    source = open_source(captioned(*CONTAINERS[kind](tmp_path / "set")))
    assert source.labels.tolist() == TIDY
    assert len(set(map(source.name, range(4)))) == len(source) == 4
    copy = pickle.loads(pickle.dumps(source))
    for order in ORDERS:
        for number in order:
            np.testing.assert_array_equal(source[number], image(number))
            np.testing.assert_array_equal(copy[number], image(number))


@pytest.mark.parametrize("kind", CONTAINERS)
def test_another_caption_changes_the_fingerprint(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = captioned(*CONTAINERS[kind](tmp_path / "set"))
    first = open_source(data).fingerprint
    assert open_source(data).fingerprint == first
    monkeypatch.setattr("captioned.CAPTIONS", ["a red box", *CAPTIONS[1:]])
    CONTAINERS[kind](tmp_path / "set")
    assert open_source(data).fingerprint != first


@pytest.mark.parametrize("kind", CONTAINERS)
def test_images_without_a_caption_are_left_out_counted_and_listed(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, out = captioned(*CONTAINERS[kind](tmp_path / "set")), tmp_path / "out" / "manifest.json"
    with caplog.at_level(logging.WARNING):
        manifest = write_images(out, data, Spec.of("shards", "shards", data=data))
    assert "1 of 4 images have no caption and are left out" in caplog.text
    assert manifest["facts"] == {"captions": 3, "missing_captions": 1, "unreadable": 0}
    listed = json.loads(out.with_name("missing_captions.json").read_text())
    assert listed == {"missing_captions": [open_source(data).name(2)]}
    found = ShardReader(out).read(range(3))
    assert found["txt"].tolist() == [TIDY[0], TIDY[1], TIDY[3]]
    np.testing.assert_array_equal(found["image"], np.stack([image(0), image(1), image(3)]))
    assert not out.with_name("unreadable.json").exists()


@pytest.mark.parametrize("kind", CONTAINERS)
def test_more_missing_captions_than_allowed_are_refused_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    data, out = captioned(*CONTAINERS[kind](tmp_path / "set"), max_missing=0), tmp_path / "out" / "manifest.json"
    with pytest.raises(
        UserError, match=r"^1 of 4 images have no caption, data.captions.max_missing is 0: .*; caption them, or raise"
    ):
        write_images(out, data, Spec.of("shards", "shards", data=data))
    assert [path.name for path in out.parent.iterdir()] == ["missing_captions.json"]


def test_captions_that_were_completed_leave_no_list_behind(tmp_path: Path) -> None:
    data, out = captioned(*CONTAINERS["texts"](tmp_path / "set")), tmp_path / "out" / "manifest.json"
    spec = Spec.of("shards", "shards", data=data)
    write_images(out, data, spec)
    (tmp_path / "set" / "a" / "00001" / "002.txt").write_text("found")
    assert write_images(out, data, spec)["num_samples"] == 4
    assert not out.with_name("missing_captions.json").exists()


def test_an_unreadable_image_and_one_without_a_caption_are_counted_apart(tmp_path: Path) -> None:
    data = captioned(*CONTAINERS["texts"](tmp_path / "set"), max_unreadable=1)
    (tmp_path / "set" / "a" / "00000" / "000.png").write_bytes(b"damaged")
    out = tmp_path / "out" / "manifest.json"
    facts = write_images(out, data, Spec.of("shards", "shards", data=data))["facts"]
    assert facts == {"captions": 2, "missing_captions": 1, "unreadable": 1}
    assert [item["position"] for item in json.loads(out.with_name("unreadable.json").read_text())["unreadable"]] == [0]


FOLDER_FAULTS = [
    ({"metadata.jsonl": '{"file_name": "00000/000.png"}\n'}, r"metadata.jsonl: row 1 lacks `file_name`, or `caption`"),
    (
        {"metadata.jsonl": '{"file_name": "00000/000.png", "text": 3}'},
        r"row 1: the caption 3 is not a text; correct it",
    ),
    ({"metadata.jsonl": '{"file_name": '}, r"metadata.jsonl: not JSONL in UTF-8"),
    ({"metadata.jsonl": '["00000/000.png", "a fox"]'}, r"metadata.jsonl: row 1 lacks"),
    ({"metadata.csv": 'file_name,text\n00000/000.png,"a fox'}, r"metadata.csv: not CSV in UTF-8"),
    ({"metadata.csv": "file_name,text\ngone.png,a fox\n"}, r"gone.png has a caption in the metadata, but is not there"),
    (
        {"00000/metadata.csv": "file_name,text\n000.png,a fox\n./000.png,a dog\n"},
        r"metadata.csv: ./000.png is listed twice; keep one",
    ),
    ({"metadata.parquet": "PAR1"}, r"metadata.parquet: not a readable Parquet file"),
    (
        {"metadata.csv": "file_name,text\n", "metadata.jsonl": ""},
        r"metadata.jsonl: there is metadata.csv as well; keep one of the two",
    ),
]


@pytest.mark.parametrize(("files", "message"), FOLDER_FAULTS)
def test_faults_of_metadata_are_reported_with_the_row(files: dict[str, str], message: str, tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set")
    for name, text in files.items():
        (root / name).write_text(text)
    with pytest.raises(UserError, match=message):
        open_source(captioned("image_folder", root))


def test_metadata_in_a_subfolder_names_files_relative_to_it_and_the_rest_has_no_caption(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set")
    (root / "00001" / "metadata.csv").write_text("file_name,text\n003.png,a fox\n002.png,a dog\n")
    (root / ".cache").mkdir()
    (root / ".cache" / "metadata.csv").write_text("not looked at")
    assert open_source(captioned("image_folder", root)).labels.tolist() == ["", "", "a dog", "a fox"]


def test_a_text_that_is_not_utf8_is_refused_with_its_name(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set")
    (root / "00000" / "000.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"000.txt: not a readable text in UTF-8"):
        open_source(captioned("image_folder", root))


def test_a_folder_means_its_tars_in_sorted_order(tmp_path: Path) -> None:
    _, pattern = CONTAINERS["txt in tars"](tmp_path / "set")
    (tmp_path / "set" / "00000.json").write_text("img2dataset writes statistics beside a tar")
    whole, by_folder = (open_source(captioned("webdataset", path)) for path in (pattern, tmp_path / "set"))
    assert by_folder.labels.tolist() == whole.labels.tolist()
    assert by_folder.fingerprint == whole.fingerprint
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"data.path: .*empty/\*.tar does not exist; correct the path"):
        open_source(captioned("webdataset", tmp_path / "empty"))


def test_half_a_surrogate_pair_does_not_stop_the_listing(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of([("1.png", png(1)), ("1.json", b'{"caption": "a \\ud83e"}')]))
    data = captioned("webdataset", tmp_path / "a.tar")
    write_images(tmp_path / "out" / "manifest.json", data, Spec.of("shards", "shards", data=data))
    assert ShardReader(tmp_path / "out" / "manifest.json").read([0])["txt"].tolist() == ["a ?"]


TAR_FAULTS = [
    ([("1.png", b""), ("2.txt", b"a fox")], r"sample 2 has a caption but no image; complete or remove it"),
    ([("1.png", b""), ("1.jpg", b""), ("1.txt", b"a fox")], r"sample 1 has two images, 1.png and 1.jpg"),
    ([("1.png", b""), ("1.json", b"{")], r"1.json: not json in UTF-8"),
    ([("1.png", b""), ("1.json", b"[]")], r"1.json: not a JSON object"),
    ([("1.png", b""), ("1.json", b'{"caption": ["a"]}')], r"1.json: the caption \['a'\] is not a text"),
    ([("1.png", b""), ("1.txt", b"caf\xe9")], r"1.txt: not txt in UTF-8"),
]


@pytest.mark.parametrize(("members", "message"), TAR_FAULTS)
def test_faults_of_tars_are_reported_with_the_member(
    members: list[tuple[str, bytes]], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    with pytest.raises(UserError, match=message):
        open_source(captioned("webdataset", tmp_path / "a.tar"))


PARQUET_FAULTS = [
    ({"image": [b""]}, r"has no column `caption` or `text`, only image; rename it"),
    ({"caption": ["a"]}, r"has no column image, jpg, jpeg, png, webp, only caption; rename it"),
    ({"image": ["a.png"], "caption": ["a"]}, r"column image holds string, not the bytes of image files"),
    ({"image": [{"path": "a.png"}], "caption": ["a"]}, r"column image holds struct.*, not the bytes of image files"),
    ({"image": [b""], "caption": [3]}, r"the caption 3 is not a text; correct it"),
]


@pytest.mark.parametrize(("columns", "message"), PARQUET_FAULTS)
def test_unsuitable_parquet_files_are_refused(columns: dict[str, list[object]], message: str, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        open_source(captioned("parquet", tmp_path / "a.parquet"))


def test_damaged_parquet_files_and_rows_without_an_image_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"jpg": [None, *(png(i) for i in range(200))], "text": ["a"] * 201})
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    source = open_source(captioned("parquet", path))
    with pytest.raises(Unreadable, match="the row has no image"):
        source[0]
    np.testing.assert_array_equal(source[200], image(199))
    content = path.read_bytes()
    path.write_bytes(b"PAR1" + bytes(10_000) + content[10_004:])
    with pytest.raises(UserError, match=r"a.parquet: damaged or changed"):
        pickle.loads(pickle.dumps(source))[1]
    path.write_bytes(content[:-20])
    with pytest.raises(UserError, match=r"a.parquet: not a readable Parquet file"):
        open_source(captioned("parquet", path))
    path.unlink()
    with pytest.raises(UserError, match=r"has no Parquet file; correct it"):
        open_source(captioned("parquet", tmp_path))
