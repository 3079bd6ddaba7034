"""What is taken from a source and what is passed over: equally in trees, zips and tars, and never without a word."""

import io
import logging
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import data_of

from dmd2.datasets import write_images
from dmd2.datasets.sources import open_source
from dmd2.datasets.sources.base import Unreadable
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec


def picture(seed: int, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)).save(stream, form)
    return stream.getvalue()


def tree(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed, "JPEG" if path.suffix in (".jfif", ".pjpeg") else "PNG"))
    return folder


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return path


def names_in(source: object) -> list[str]:
    return [source.name(i) for i in range(len(source))]


JUNK = ("a/.ipynb_checkpoints/1-checkpoint.png", "__MACOSX/a/1.png", "a/@eaDir/1.png", "b/.hidden.png", ".git/x.png")


def test_hidden_and_system_names_are_judged_on_every_part_of_a_path(tmp_path: Path):
    root = tree(tmp_path / "tree", "a/1.png", "b/2.png", *JUNK)
    for kind, path in (("image_folder", root), ("image_zip", zipped(root, tmp_path / "x.zip"))):
        source = open_source(data_of(kind, path))
        assert names_in(source) == ["a/1.png", "b/2.png"], kind
        assert "hidden or of a system" in str(source.passed_over)


def test_usual_suffixes_of_jpeg_are_read_and_other_formats_count_as_unreadable(tmp_path: Path):
    root = tree(tmp_path / "tree", "a/1.jfif", "a/2.pjpeg", "b/3.PNG", "b/4.heic", "b/notes.md")
    source = open_source(data_of("image_folder", root))
    assert names_in(source) == ["a/1.jfif", "a/2.pjpeg", "b/3.PNG", "b/4.heic"]
    assert source[0].shape == (4, 4, 3)
    assert str(source.passed_over) == "1 no image by their suffix (first: b/notes.md)"
    (root / "b/4.heic").write_bytes(b"\0\0\0\x18ftypheic")
    data = data_of("image_folder", root)
    with pytest.raises(UserError, match=r"1 of 4 images cannot be read, data\.max_unreadable is 0: b/4\.heic"):
        write_images(tmp_path / "out" / "manifest.json", data, Spec.of("shards", "x", data=data))


def test_what_is_passed_over_is_reported_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    root = tree(tmp_path / "tree", "a/1.png", "b/2.png", "a/.x.png", "b/notes.md", "b/more.md")
    data = data_of("image_folder", root)
    with caplog.at_level(logging.INFO):
        write_images(tmp_path / "out" / "manifest.json", data, Spec.of("shards", "x", data=data))
    (line,) = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert "1 hidden or of a system (first: a/.x.png)" in line
    assert "2 no image by their suffix (first: b/more.md)" in line


def test_linked_folders_are_followed_and_circles_refused(tmp_path: Path):
    elsewhere = tree(tmp_path / "elsewhere", "3.png", "4.png")
    root = tree(tmp_path / "tree", "a/1.png", "b/2.png")
    (root / "a/more").symlink_to(elsewhere)
    assert names_in(open_source(data_of("image_folder", root))) == [
        "a/1.png",
        "a/more/3.png",
        "a/more/4.png",
        "b/2.png",
    ]
    (root / "a/circle").symlink_to(root)
    with pytest.raises(UserError, match="circle: a link to a folder above itself; remove it"):
        open_source(data_of("image_folder", root))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path):
    root = tree(tmp_path / "tree", "a/1.png", "a/closed/3.png", "b/2.png")
    (root / "a/closed").chmod(0)
    try:
        with pytest.raises(UserError, match=r"closed: cannot be listed .* read access"):
            open_source(data_of("image_folder", root))
    finally:
        (root / "a/closed").chmod(0o755)


def linked_tar(path: Path, link: bytes, target: str) -> Path:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        for name in ("1.JPEG", "2.JPEG"):
            info, content = tarfile.TarInfo(name), picture(int(name[0]), "JPEG")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo("3.JPEG")
        info.type, info.linkname = link, target
        tar.addfile(info)
    with tarfile.open(path, "w") as tar:
        for name in ("n1.tar", "n2.tar"):
            info = tarfile.TarInfo(name)
            info.size = len(inner.getvalue())
            tar.addfile(info, io.BytesIO(inner.getvalue()))
    return path


@pytest.mark.parametrize("link", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_in_tars_stand_for_their_files(link: bytes, tmp_path: Path):
    source = open_source(data_of("imagenet_tar", linked_tar(tmp_path / "x.tar", link, "2.JPEG")))
    assert names_in(source)[:3] == ["n1.tar/1.JPEG", "n1.tar/2.JPEG", "n1.tar/3.JPEG"]
    assert np.array_equal(source[1], source[2])
    with pytest.raises(UserError, match=r"3\.JPEG is a link to nothing in this tar"):
        open_source(data_of("imagenet_tar", linked_tar(tmp_path / "y.tar", link, "9.JPEG")))


def test_names_that_are_not_utf8_are_shown_with_their_bytes(tmp_path: Path):
    path = tmp_path / "x.tar"
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        info, content = tarfile.TarInfo("caf\xe9.JPEG"), picture(1, "JPEG")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with tarfile.open(path, "w") as tar:
        for name in ("n1.tar", "n2.tar"):
            info = tarfile.TarInfo(name)
            info.size = len(inner.getvalue())
            tar.addfile(info, io.BytesIO(inner.getvalue()))
    source = open_source(data_of("imagenet_tar", path))
    assert names_in(source) == [r"n1.tar/caf\xe9.JPEG", r"n2.tar/caf\xe9.JPEG"]
    assert source[0].shape == (4, 4, 3)


CLASSES = ("bus/1.png", "car/2.png", "train/3.png")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (CLASSES, CLASSES),
        ([f"train/{name}" for name in CLASSES], CLASSES),
        ([f"{split}/{name}" for split in ("train", "val") for name in CLASSES], CLASSES),
        (["train/a/1.png", "train/b/2.png", "test/9.png"], ["a/1.png", "b/2.png"]),
    ],
    ids=["a class called train", "one split", "two splits", "images in a split itself"],
)
def test_a_split_is_one_where_all_siblings_are(names: list[str], found: list[str], tmp_path: Path):
    root = tree(tmp_path / "tree", *names)
    classes = sorted({name.split("/")[0] for name in found})
    for kind, path in (("image_folder", root), ("image_zip", zipped(root, tmp_path / "x.zip"))):
        source = open_source(data_of(kind, path, num_classes=len(classes)))
        assert list(source.classes) == classes, kind
        assert [name.removeprefix("train/") if len(name.split("/")) > 2 else name for name in names_in(source)] == list(
            found
        ), kind


def test_classes_without_images_are_refused(tmp_path: Path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate((0, 2)):
            for name, content in ((f"{number}.png", picture(number)), (f"{number}.cls", b"%d" % label)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    data = data_of("webdataset", path, num_classes=3)
    with pytest.raises(UserError, match=r"data\.num_classes is 3, but class 1 \(1\) has no image"):
        write_images(tmp_path / "out" / "manifest.json", data, Spec.of("shards", "x", data=data))


def test_a_class_whose_images_are_all_unreadable_is_refused(tmp_path: Path):
    root = tree(tmp_path / "tree", "a/1.png", "b/2.png")
    (root / "b/2.png").write_bytes(b"nothing")
    data = data_of("image_folder", root, max_unreadable=5)
    with pytest.raises(UserError, match=r"class 1 \(b\) has no readable image"):
        write_images(tmp_path / "out" / "manifest.json", data, Spec.of("shards", "x", data=data))


def deep_png(path: Path) -> None:
    """A PNG of 16 bits per channel in colour, written by hand: Pillow cannot save one."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + bytes(6 * 6) for _ in range(6))
    head = struct.pack(">IIBBBBB", 6, 6, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_sixteen_bits_per_channel_are_refused_and_not_cut(tmp_path: Path):
    root = tree(tmp_path / "tree", "a/1.png", "b/2.png")
    deep_png(root / "a/1.png")
    (root / "b/3.ppm").write_bytes(b"P6 6 6 65535\n" + bytes(2 * 3 * 36))
    source = open_source(data_of("image_folder", root))
    for name in ("a/1.png", "b/3.ppm"):
        with pytest.raises(Unreadable, match="16 bits per channel"):
            source[names_in(source).index(name)]


def in_class_tars(root: Path, path: Path) -> Path:
    """The tree as a tar of one tar per class."""
    with tarfile.open(path, "w") as outer:
        for folder in sorted(p for p in root.iterdir() if p.is_dir()):
            inner = path.with_name(f"{folder.name}.tar")
            with tarfile.open(inner, "w") as tar:
                for file in sorted(folder.iterdir()):
                    tar.add(file, file.name)
            outer.add(inner, inner.name)
    return path


@pytest.mark.parametrize("odd", ["a/img0001", "b/x.png.part", "b/3.jpg_large"])
def test_files_that_may_be_images_are_refused_above_a_limit_in_every_source(odd: str, tmp_path: Path):
    root = tree(tmp_path / "tree", "a/1.png", "b/2.png", odd)
    for name in ("a/notes.txt", "b/README", "b/labels.npy"):
        (root / name).write_text("no image")
    paths = {
        "image_folder": root,
        "image_zip": zipped(root, tmp_path / "x.zip"),
        "imagenet_tar": in_class_tars(root, tmp_path / "x.tar"),
    }
    for kind, path in paths.items():
        data = data_of(kind, path)
        refusal = r"1 files that may be images are not taken, data\.max_passed_over is 0: 1 of an unknown suffix"
        with pytest.raises(UserError, match=rf"{path}: {refusal} \(first: .*{Path(odd).name}\); rename, move or"):
            write_images(tmp_path / kind / "manifest.json", data, Spec.of("shards", "x", data=data))
        raised = data.model_copy(update={"max_passed_over": 1})
        assert Spec.of("shards", "x", data=raised).digest == Spec.of("shards", "x", data=data).digest
        manifest = write_images(tmp_path / kind / "manifest.json", raised, Spec.of("shards", "x", data=raised))
        assert manifest["facts"]["images_of_class"] == [1, 1]


def test_other_fields_of_samples_are_passed_over_and_lone_members_are_refused(tmp_path: Path):
    members = {"0.png": picture(0), "0.cls": b"0", "0.depth": b"x", "1.png": picture(1), "1.cls": b"1"}

    def packed(**more: bytes) -> object:
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name, content in {**members, **more}.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return open_source(data_of("webdataset", tmp_path / "x.tar")).passed_over

    assert (str(packed()), len(packed().doubtful)) == ("1 no image by their suffix (first: x.tar/0.depth)", 0)
    assert str(packed(**{"2.jxr": b"x"}).doubtful) == "1 of an unknown suffix (first: x.tar/2.jxr)"
