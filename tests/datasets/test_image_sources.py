"""The same images from a class-folder tree, zips and tars: the same ids, classes and pixels."""

import gzip
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from trees import class_zip, data_of, edm_zip, files_of, imagenet_tar, tar_of, write_tree

from dmd2.datasets.sources import Unreadable, open_source
from dmd2.datasets.sources.folder import ImageFolder
from dmd2.datasets.sources.spans import MAX_OPEN_FILES
from dmd2.errors import UserError

NAMES = ["n2/b.png", "n1/c.jpeg", "n1/a.PNG", "n2/a.webp", "n2/d.png"]
ORDER = [("n1/a.PNG", 0), ("n1/c.jpeg", 0), ("n2/a.webp", 1), ("n2/b.png", 1), ("n2/d.png", 1)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes, named so that their sorted order is not the order of creation."""
    root = tmp_path / "tree"
    write_tree(root, NAMES)
    (root / "n1" / "notes.txt").write_text("not an image")
    (root / "n1" / "._c.png").write_text("not an image either")
    return root


def edm_crop(path: Path, size: int) -> np.ndarray:
    """What EDM's dataset tool does with --transform=center-crop."""
    pixels = np.array(Image.open(path).convert("RGB"))
    height, width = pixels.shape[:2]
    short = min(height, width)
    square = pixels[(height - short) // 2 : (height + short) // 2, (width - short) // 2 : (width + short) // 2]
    return np.array(Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS))


CONTAINERS = ["folder", "zip", "stored zip", "zip in folders", "Kaggle's zip", "tar of tars", "webdataset"]


def container(kind: str, tree: Path, folder: Path) -> tuple[str, Path | str]:
    """(source, path) of the tree's images in a container."""
    if kind == "folder":
        return "image_folder", tree
    if kind == "tar of tars":
        imagenet_tar(tree, folder / "train.tar")
        return "imagenet_tar", folder / "train.tar"
    if kind == "webdataset":
        for number, part in enumerate((ORDER[:2], ORDER[2:])):
            stems = [f"{n:05d}" for n in range(len(part))]
            members = [
                (f"{stem}.{end}", content)
                for stem, (name, label) in zip(stems, part, strict=True)
                for end, content in (("cls", b"%d" % label), (name.rpartition(".")[2], (tree / name).read_bytes()))
            ]
            (folder / f"train-{number}.tar").write_bytes(tar_of(members))
        return "webdataset", f"{folder}/train-{{0..1}}.tar"
    path = folder / "images.zip"
    if kind == "Kaggle's zip":
        class_zip(tree, path, prefix="ILSVRC/Data/CLS-LOC/train/")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG", files_of(tree)[0][1])
    else:
        method = zipfile.ZIP_STORED if kind == "stored zip" else zipfile.ZIP_DEFLATED
        class_zip(tree, path, prefix="some/where/" if kind == "zip in folders" else "", method=method)
    return "image_zip", path


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_gives_the_trees_images_in_sorted_order(kind: str, tree: Path, tmp_path: Path) -> None:
    source = open_source(data_of(*container(kind, tree, tmp_path)))
    assert len(source) == len(ORDER)
    assert source.labels.tolist() == [label for _, label in ORDER]
    assert source.classes == (["0", "1"] if kind == "webdataset" else ["n1", "n2"])
    for number, (name, _) in enumerate(ORDER):
        np.testing.assert_array_equal(source[number], edm_crop(tree / name, 4))
        if kind != "webdataset":
            assert Path(name).name in source.name(number)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_pickled_source_reads_the_same_images(kind: str, tree: Path, tmp_path: Path) -> None:
    source = open_source(data_of(*container(kind, tree, tmp_path)))
    before = [source[number].tobytes() for number in range(len(source))]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[number].tobytes() for number in range(len(copy))] == before


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_changed_listing_changes_the_fingerprint_and_nothing_else_does(kind: str, tree: Path, tmp_path: Path) -> None:
    data = data_of(*container(kind, tree, tmp_path))
    first = open_source(data).fingerprint
    assert open_source(data).fingerprint == first
    path = tree / "n2" / "b.png"
    path.write_bytes(path.read_bytes() + b"\0")
    container(kind, tree, tmp_path)
    assert open_source(data).fingerprint != first


@pytest.mark.parametrize("kind", CONTAINERS)
def test_another_number_of_classes_is_refused(kind: str, tree: Path, tmp_path: Path) -> None:
    where = container(kind, tree, tmp_path)
    with pytest.raises(UserError, match=r"2 classes, but data.num_classes is 1|'1' is not a class of 0 to 0"):
        open_source(data_of(*where, num_classes=1))


def test_the_zip_of_edms_dataset_tool_passes_unchanged(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (1002, 4, 4, 3), np.uint8)
    labels = [*rng.permutation(1000).tolist(), 7, 7]

    def png(image: np.ndarray) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        return stream.getvalue()

    edm_zip([(png(image), label) for image, label in zip(pixels, labels, strict=True)], tmp_path / "edm.zip")
    source = open_source(data_of("image_zip", tmp_path / "edm.zip", num_classes=1000))
    assert source.labels.tolist() == labels
    np.testing.assert_array_equal(np.stack([source[number] for number in range(len(source))]), pixels)


def test_ids_do_not_depend_on_the_order_in_which_the_disk_lists_files(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk, listed = os.walk, {}
    for backwards in (False, True):

        def ordered(top: Path, backwards: bool = backwards, **options: Any):
            return [(folder, names, sorted(files, reverse=backwards)) for folder, names, files in walk(top, **options)]

        monkeypatch.setattr(os, "walk", ordered)
        source = open_source(data_of("image_folder", tree))
        listed[backwards] = [source.name(number) for number in range(len(source))]
    assert listed[False] == listed[True] == [name for name, _ in ORDER]


def test_images_below_a_class_folder_count_and_hidden_folders_do_not(tree: Path) -> None:
    write_tree(tree, ["n1/deep/a.png", ".cache/x.png"])
    source = open_source(data_of("image_folder", tree))
    assert [source.name(number) for number in range(3)] == ["n1/a.PNG", "n1/c.jpeg", "n1/deep/a.png"]
    assert source.classes == ["n1", "n2"]


def test_trees_that_do_not_fit_the_configuration_are_refused(tree: Path) -> None:
    with pytest.raises(UserError, match=r"a.PNG is not a folder; set it to the class-folder tree"):
        ImageFolder(data_of("image_folder", tree / "n1" / "a.PNG"))
    (tree / "n3").mkdir()
    with pytest.raises(UserError, match="n3: class folder without an image"):
        ImageFolder(data_of("image_folder", tree, num_classes=3))


def test_a_link_to_nowhere_does_not_vanish(tree: Path) -> None:
    (tree / "n1" / "x.png").symlink_to(tree / "gone.png")
    with pytest.raises(UserError, match=r"n1/x.png: cannot be read \(No such file or directory\); fix or remove it"):
        open_source(data_of("image_folder", tree))


def test_a_file_that_is_gone_stops_the_reading_instead_of_counting_as_unreadable(tree: Path) -> None:
    source = open_source(data_of("image_folder", tree))
    (tree / "n1" / "a.PNG").unlink()
    with pytest.raises(UserError, match=r"n1/a.PNG: cannot be read \(No such file or directory\)"):
        source[0]


@pytest.mark.parametrize("kind", ["tar of tars", "webdataset"])
def test_a_damaged_head_in_a_tar_lets_no_image_vanish(kind: str, tree: Path, tmp_path: Path) -> None:
    name, path = container(kind, tree, tmp_path)
    file = tmp_path / "train-1.tar" if kind == "webdataset" else Path(path)
    whole = file.read_bytes()
    heads = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    assert len(heads) >= 6
    for head in heads:
        for field in (0, 100, 124, 135, 148, 156):  # name, mode, size, checksum, kind
            content = bytearray(whole)
            content[head + field] ^= 1
            file.write_bytes(content)
            with pytest.raises(UserError, match=r"(train|train-1).tar: (damaged or truncated|not a complete)"):
                open_source(data_of(name, path))


@pytest.mark.parametrize("kind", ["zip", "tar of tars", "webdataset"])
def test_whatever_damage_does_to_an_archive_is_reported(kind: str, tree: Path, tmp_path: Path) -> None:
    name, path = container(kind, tree, tmp_path)
    file = tmp_path / "train-1.tar" if kind == "webdataset" else Path(path)
    whole, rng, reported = file.read_bytes(), np.random.default_rng(7), []
    for _ in range(120):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 4)):  # most of it at the end, where a zip has its list
            content[-1 - int(len(content) * rng.random() ** 2)] = rng.integers(256)
        file.write_bytes(content)
        try:
            source = open_source(data_of(name, path))
            for number in range(len(source)):
                assert source[number].shape == (4, 4, 3)
        except (UserError, Unreadable) as error:
            reported.append(str(error))
    assert len(reported) >= 30
    assert not any("\n" in line for line in reported)


@pytest.mark.parametrize("kind", ["zip", "tar of tars", "webdataset"])
@pytest.mark.parametrize("left", [0.98, 0.5, 0.02])
def test_a_truncated_archive_is_refused(kind: str, left: float, tree: Path, tmp_path: Path) -> None:
    name, path = container(kind, tree, tmp_path)
    file = tmp_path / "train-1.tar" if kind == "webdataset" else Path(path)
    content = file.read_bytes().rstrip(b"\0")  # without the padding that tars end with
    file.write_bytes(content[: int(len(content) * left)])
    with pytest.raises(UserError, match=r"truncated|not a complete|no tar of a class|has no image|no image \("):
        open_source(data_of(name, path))


def test_a_compressed_tar_is_refused_for_it_has_no_random_access(tree: Path, tmp_path: Path) -> None:
    imagenet_tar(tree, tmp_path / "train.tar")
    (tmp_path / "train.tgz").write_bytes(gzip.compress((tmp_path / "train.tar").read_bytes()))
    with pytest.raises(UserError, match=r"train.tgz: not a complete uncompressed tar"):
        open_source(data_of("imagenet_tar", tmp_path / "train.tgz"))


def test_a_member_damaged_in_a_zip_is_unreadable(tree: Path, tmp_path: Path) -> None:
    class_zip(tree, tmp_path / "images.zip", method=zipfile.ZIP_STORED)
    content = bytearray((tmp_path / "images.zip").read_bytes())
    content[content.index((tree / "n1/a.PNG").read_bytes()) + 60] ^= 1
    (tmp_path / "images.zip").write_bytes(content)
    source = open_source(data_of("image_zip", tmp_path / "images.zip"))
    with pytest.raises(Unreadable, match="its checksum differs"):
        source[0]
    np.testing.assert_array_equal(source[1], edm_crop(tree / "n1/c.jpeg", 4))


@pytest.mark.parametrize("labels", [None, [["n1/a.PNG", 0]], "no list"])
def test_a_zip_whose_list_of_classes_does_not_fit_is_refused(labels: object, tree: Path, tmp_path: Path) -> None:
    class_zip(tree, tmp_path / "images.zip")
    with zipfile.ZipFile(tmp_path / "images.zip", "a") as archive:
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    with pytest.raises(
        UserError, match=r"dataset.json (contains no classes|has no class for n1/c.jpeg, nor for 3 more)"
    ):
        open_source(data_of("image_zip", tmp_path / "images.zip"))


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ([("a.jpg", b"x")], r"sample a has no class \(.cls\)"),
        ([("a.cls", b"1")], "sample a has no image"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"1")], "sample a has two images, a.jpg and a.png"),
        ([("a.jpg", b"x"), ("a.cls", b"two")], "a.cls: 'two' is not a class of 0 to 1"),
        ([("a.jpg", b"x"), ("a.cls", b"2")], "a.cls: '2' is not a class of 0 to 1"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "a.cls: '-1' is not a class of 0 to 1"),
    ],
)
def test_webdataset_samples_that_are_not_an_image_and_a_class_are_refused(
    members: list[tuple[str, bytes]], complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    with pytest.raises(UserError, match=complaint):
        open_source(data_of("webdataset", tmp_path / "a.tar"))


def test_more_tars_than_may_be_open_at_once_are_read(tree: Path, tmp_path: Path) -> None:
    image, num = (tree / "n1/a.PNG").read_bytes(), MAX_OPEN_FILES + 3
    for number in range(num):
        (tmp_path / f"{number:03d}.tar").write_bytes(tar_of([("x/1.image.png", image), ("x/1.cls", b"0\n")]))
    source = open_source(data_of("webdataset", f"{tmp_path}/*.tar"))
    assert [source.name(number) for number in range(3)] == [f"00{n}.tar/x/1.image.png" for n in range(3)]
    for number in [*range(num), 0]:
        np.testing.assert_array_equal(source[number], edm_crop(tree / "n1/a.PNG", 4))
