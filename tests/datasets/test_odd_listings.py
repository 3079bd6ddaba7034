"""Odd but usual layouts of trees and archives: nothing is lost, doubled or waited for without a word."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from captioned import captioned, folder_of
from test_listing import names_in, picture, tree, zipped
from trees import data_of, tar_of

from dmd2.datasets import write_images
from dmd2.datasets.origin import is_of_other_data
from dmd2.datasets.sources import open_source
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec

JPEG = picture(1, "JPEG")


def test_tars_packed_from_within_their_folder_are_read(tmp_path: Path):
    """`tar -C folder .` writes ./1.png, whose first part is no hidden name."""
    samples = [("./1.png", picture(1)), ("./1.cls", b"0"), ("./2.png", picture(2)), ("./2.cls", b"1")]
    (tmp_path / "w.tar").write_bytes(tar_of(samples))
    assert open_source(data_of("webdataset", tmp_path / "w.tar")).labels.tolist() == [0, 1]
    inner = tar_of([("./1.JPEG", JPEG), ("./.x.JPEG", JPEG)])
    (tmp_path / "n.tar").write_bytes(tar_of([("./n1.tar", inner), ("./n2.tar", inner)]))
    source = open_source(data_of("imagenet_tar", tmp_path / "n.tar"))
    assert (names_in(source), list(source.classes)) == (["n1.tar/./1.JPEG", "n2.tar/./1.JPEG"], ["n1", "n2"])


def test_what_lies_beside_the_classes_is_told_alike_in_trees_and_archives(tmp_path: Path):
    root = tree(tmp_path / "tree", "a/1.png", "b/2.png", "loose.png", ".git/x.png")
    inner = tar_of([("1.JPEG", JPEG)])
    outer = [("a.tar", inner), ("b.tar", inner), ("._a.tar", b"resource fork"), ("loose.png", JPEG)]
    (tmp_path / "n.tar").write_bytes(tar_of(outer))
    for kind, path in (
        ("image_folder", root),
        ("image_zip", zipped(root, tmp_path / "x.zip")),
        ("imagenet_tar", tmp_path / "n.tar"),
    ):
        source = open_source(data_of(kind, path))
        assert (len(source), list(source.classes)) == (2, ["a", "b"]), kind
        assert "1 outside the class folders (first: loose.png)" in str(source.passed_over), kind
        assert "1 hidden or of a system (first: ." in str(source.passed_over), kind


def test_members_of_tars_that_belong_to_no_sample_are_told(tmp_path: Path):
    image = [("1.png", picture(1)), ("2.png", picture(2))]
    odd = [("._1.png", b"fork"), ("__MACOSX/1.cls", b"9"), ("__MACOSX/1.txt", b"x"), ("notes.md", b"x")]
    classes = [("1.cls", b"0"), ("2.cls", b"1")]
    (tmp_path / "c.tar").write_bytes(tar_of([*image, *classes, *odd]))
    passed_over = str(open_source(data_of("webdataset", tmp_path / "c.tar")).passed_over)
    assert passed_over == (
        "3 hidden or of a system (first: c.tar/._1.png), 1 no image by their suffix (first: c.tar/notes.md)"
    )
    (tmp_path / "t.tar").write_bytes(tar_of([*image, ("1.txt", b"one"), ("2.txt", b"two"), *odd]))
    source = open_source(captioned("webdataset", tmp_path / "t.tar"))
    assert source.labels.tolist() == ["one", "two"]
    assert str(source.passed_over) == passed_over.replace("c.tar", "t.tar")


def test_files_beside_captioned_images_are_told(tmp_path: Path):
    root = folder_of(tmp_path / "a")
    for name in ("00000/000.txt", "00000/000.md", ".cache/x.png", ".cache/metadata.csv", "00000/other.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("a fox")
    source = open_source(captioned("image_folder", root, max_missing=3))
    assert source.labels.tolist() == ["a fox", "", "", ""]
    assert "2 hidden or of a system (first: .cache/metadata.csv)" in str(source.passed_over)
    assert "2 no image by their suffix (first: 00000/000.md)" in str(source.passed_over)


def test_two_links_that_form_a_circle_are_refused_and_a_link_to_a_sibling_is_not(tmp_path: Path):
    root = tree(tmp_path / "tree", "a/1.png", "b/2.png")
    (root / "a/x").symlink_to(root / "b")
    assert names_in(open_source(data_of("image_folder", root))) == ["a/1.png", "a/x/2.png", "b/2.png"]
    (root / "b/y").symlink_to(root / "a")
    with pytest.raises(UserError, match="a link to a folder above itself; remove it"):
        open_source(data_of("image_folder", root))


def test_a_pipe_in_place_of_an_image_is_refused_and_not_read(tmp_path: Path):
    root = tree(tmp_path / "tree", "a/1.png", "b/2.png")
    os.mkfifo(root / "a/3.png")
    with pytest.raises(UserError, match=r"3\.png: not a file but a pipe"):
        open_source(data_of("image_folder", root))


def test_folders_whose_names_are_not_utf8_can_be_classes(tmp_path: Path):
    root = tree(tmp_path / "tree", "a/1.png")
    odd = os.fsencode(root) + b"/caf\xe9"
    os.mkdir(odd)
    Path(os.fsdecode(odd + b"/2.png")).write_bytes(picture(2))
    Path(os.fsdecode(odd + b"/n\xe9.txt")).write_bytes(b"x")
    data = data_of("image_folder", root)
    manifest = write_images(tmp_path / "out" / "manifest.json", data, Spec.of("shards", "x", data=data))
    source = open_source(data)
    assert manifest["facts"]["images_of_class"] == [1, 1]
    assert manifest["facts"]["classes"] == ["a", r"caf\xe9"]
    assert list(source.classes) == ["a", r"caf\xe9"]
    assert str(source.passed_over) == r"1 no image by their suffix (first: caf\xe9/n\xe9.txt)"
    assert source[1].shape == (4, 4, 3)
    assert not is_of_other_data(tmp_path / "out" / "manifest.json", data)
    Path(os.fsdecode(odd + b"/3.png")).write_bytes(picture(3))
    assert is_of_other_data(tmp_path / "out" / "manifest.json", data)


def test_a_bitmap_of_16_bits_a_pixel_has_fewer_than_8_a_channel(tmp_path: Path):
    root = tree(tmp_path / "tree", "b/1.png", "a/0.png")
    pixels = struct.pack("<6H", *[0b0_11111_00000_00000] * 6) * 6  # red
    head = struct.pack("<IiiHHIIiiII", 40, 6, 6, 1, 16, 0, len(pixels), 0, 0, 0, 0)
    (root / "a/0.png").write_bytes(b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + head + pixels)
    image = open_source(data_of("image_folder", root))[0]
    assert np.array_equal(image, np.broadcast_to(np.array([255, 0, 0], np.uint8), (4, 4, 3)))


@pytest.mark.parametrize("folder", ["my[1]", "a{x}", "st*r"])
def test_characters_of_patterns_in_the_names_of_folders_and_files(folder: str, tmp_path: Path):
    samples = [("1.png", picture(1)), ("1.cls", b"0"), ("2.png", picture(2)), ("2.cls", b"1")]
    path = tmp_path / folder / "a[0].tar"
    path.parent.mkdir()
    path.write_bytes(tar_of(samples))
    path.with_name("._a.tar").write_bytes(b"resource fork")
    for given in (path.parent, path):
        assert len(open_source(data_of("webdataset", given))) == 2


@pytest.mark.parametrize("place", ["a/more", "more", "a/3.png"])
def test_a_link_to_nothing_is_refused_and_not_passed_over(place: str, tmp_path: Path):
    """A folder of images on a disk that is not there, in a class folder or as one."""
    root = tree(tmp_path / "tree", "a/1.png", "b/2.png")
    (root / place).symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=rf"{place}: (a link to .*gone, where nothing is|cannot be read)"):
        open_source(data_of("image_folder", root))
    with pytest.raises(UserError, match=rf"{place}: (a link to .*gone, where nothing is|cannot be read)"):
        open_source(captioned("image_folder", root, max_missing=9))
