"""Images that are not plain RGB: read as EDM's dataset tool reads them, or left out, listed and counted."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import data_of, write_tree

from dmd2.config import Data
from dmd2.datasets.images import BEYOND, write_images
from dmd2.datasets.reader import ShardReader
from dmd2.datasets.sources import Unreadable, open_source
from dmd2.datasets.sources.base import decode
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec

GREY = np.random.default_rng(2).integers(0, 256, (4, 4), np.uint8)
COLOUR = np.random.default_rng(3).integers(0, 256, (4, 4, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(("height", "width"), [(30, 21), (21, 30), (9, 9), (5, 100)])
def test_images_are_cropped_to_the_short_side_and_resized_with_lanczos(height: int, width: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(pixels).crop((left, top, left + side, top + side))
    truth = np.asarray(square.resize((8, 8), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels)), 8, 3), truth)


def test_an_image_of_the_right_size_stays_as_it_is() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels)), 64, 3), pixels)


def test_grey_images_are_replicated_or_kept_as_one_channel() -> None:
    content = encoded(Image.fromarray(GREY))
    np.testing.assert_array_equal(decode(content, 4, 3), np.stack([GREY] * 3, axis=2))
    np.testing.assert_array_equal(decode(content, 4, 1), GREY[..., None])


def test_transparency_is_dropped() -> None:
    alpha = np.random.default_rng(4).integers(0, 256, (4, 4, 1), np.uint8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(np.dstack([COLOUR, alpha]))), 4, 3), COLOUR)
    grey = decode(encoded(Image.fromarray(np.dstack([GREY, alpha[..., 0]]))), 4, 3)
    np.testing.assert_array_equal(grey, np.stack([GREY] * 3, axis=2))


def test_palettes_are_looked_up() -> None:
    picture = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), "P")
    picture.putpalette(COLOUR.reshape(-1).tolist())
    np.testing.assert_array_equal(decode(encoded(picture), 4, 3), COLOUR)
    np.testing.assert_array_equal(decode(encoded(picture, transparency=3), 4, 3), COLOUR)


def test_black_and_white_is_0_and_255() -> None:
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(GREY > 99)), 4, 3)[..., 1], 255 * (GREY > 99))


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    cyan = np.zeros((4, 4, 4), np.uint8)
    cyan[..., 0] = 255  # all the cyan ink and no other: no red, full green and blue
    found = decode(encoded(Image.fromarray(cyan, "CMYK"), kind), 4, 3)
    assert np.abs(found.astype(int) - [0, 255, 255]).max() <= 2


def test_of_an_animation_the_first_picture_counts() -> None:
    frames = [Image.fromarray(np.full((4, 4), level, np.uint8)) for level in (10, 200)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(content, 4, 3) == 10).all()


def test_rotation_in_the_exif_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(COLOUR), exif=exif), 4, 3), COLOUR)


def test_one_pixel_becomes_a_plain_image() -> None:
    assert (decode(encoded(Image.fromarray(COLOUR[:1, :1])), 8, 3) == COLOUR[0, 0]).all()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
PNG = encoded(Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), np.uint8)))
JPEG = encoded(Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
BAD = {
    "cut PNG": (PNG[: len(PNG) // 2], "not a readable image"),
    "cut JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "PNG with a wrong byte": (PNG[:300] + bytes([PNG[300] ^ 1]) + PNG[301:], "not a readable image"),
    "no image": (b"hello", "not an image of a known format"),
    "nothing": (b"", "not an image of a known format"),
    "PostScript, which would be run": (POSTSCRIPT, "not an image of a known format"),
    "16 bits": (encoded(Image.fromarray(np.full((4, 4), 40_000, np.uint16))), "mode I;16 is not 8 bits"),
    "floats": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "mode F is not 8 bits"),
    "more pixels than Pillow's limit": (encoded(Image.new("1", (20_000, 20_000))), "decompression bomb"),
}


@pytest.mark.parametrize(("content", "reason"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_read_is_reported_with_its_reason(content: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        decode(content, 4, 3)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_whatever_damage_does_to_a_file_it_is_an_image_or_unreadable(kind: str) -> None:
    rng = np.random.default_rng(6)
    whole = encoded(Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)), kind)
    reasons = []
    for _ in range(150):
        content = bytearray(whole[: rng.integers(1, len(whole) + 1) if rng.random() < 0.3 else None])
        for _ in range(rng.integers(1, 6)):  # most of it in the head, where the sizes are
            content[int(rng.integers(len(content)) * rng.random() ** 3)] = rng.integers(256)
        try:
            found = decode(bytes(content), 4, 3)
            assert found.shape == (4, 4, 3)
            assert found.dtype == np.uint8
        except Unreadable as reason:
            reasons.append(str(reason))
    assert len(reasons) >= 30
    assert not any("\n" in reason for reason in reasons)


NAMES = [f"n{label}/{number:02d}.png" for label in (1, 2) for number in range(10)]
SPOILT = {2: "n1/02.png", 3: "n1/03.png", 4: "n1/04.png", 5: "n1/05.png", 19: "n2/09.png"}  # positions 3 to 5: a shard


@pytest.fixture
def spoilt(tmp_path: Path) -> Data:
    """A tree of 20 images, five of them damaged: all of one shard of three, and the last of all."""
    write_tree(tmp_path / "tree", NAMES)
    for name in SPOILT.values():
        path = tmp_path / "tree" / name
        path.write_bytes(path.read_bytes()[:70])
    return data_of("image_folder", tmp_path / "tree", max_unreadable=5)


def test_ids_count_on_over_images_that_are_left_out(spoilt: Data, tmp_path: Path) -> None:
    out, source = tmp_path / "out", open_source(spoilt)
    spec = Spec.of("shards", "tree", data=spoilt)
    manifest = write_images(out / "manifest.json", spoilt, spec)
    kept = [position for position in range(20) if position not in SPOILT]
    assert manifest["num_samples"] == len(kept) == 15
    assert [(s["start"], s["count"]) for s in manifest["shards"]] == [
        (0, 2),
        (2, 0),
        (2, 3),
        (5, 3),
        (8, 3),
        (11, 3),
        (14, 1),
    ]
    assert manifest["facts"] == {"classes": ["n1", "n2"], "images_of_class": [6, 9], "unreadable": 5}
    reader = ShardReader(out / "manifest.json", spec.digest)
    reader.verify()
    order = np.random.default_rng(0).permutation(15)
    raw = reader.read(order)
    for row, sample in enumerate(order):
        np.testing.assert_array_equal(raw["image"][row], source[kept[sample]])
        assert raw["cls"][row] == source.labels[kept[sample]]


def test_webdataset_reads_the_kept_images_with_their_positions_as_keys(spoilt: Data, tmp_path: Path) -> None:
    import webdataset

    manifest = write_images(tmp_path / "out" / "manifest.json", spoilt, Spec.of("shards", "tree", data=spoilt))
    urls = [str(tmp_path / "out" / shard["name"]) for shard in manifest["shards"] if shard["count"]]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert keys == [f"{position:09d}" for position in range(20) if position not in SPOILT]


def test_what_is_left_out_is_listed_by_name_and_reason(spoilt: Data, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_images(out / "manifest.json", spoilt, Spec.of("shards", "tree", data=spoilt))
    listed = json.loads((out / "unreadable.json").read_text())["unreadable"]
    assert {item["position"]: item["name"] for item in listed} == SPOILT
    assert all("not a readable image" in item["reason"] for item in listed)


@pytest.mark.parametrize(("min_side", "kept"), [(None, 15), (6, 15), (7, 0)])
def test_images_with_too_short_a_side_are_left_out_as_unreadable(
    min_side: int | None, kept: int, spoilt: Data, tmp_path: Path
) -> None:
    """The images are 6x9 pixels."""
    source = open_source(spoilt.model_copy(update={"min_side": min_side}))
    reasons = []
    for number in range(20):
        try:
            source[number]
        except Unreadable as reason:
            reasons.append(str(reason))
    assert 20 - len(reasons) == kept
    assert ("9x6 pixels, data.min_side is 7" in reasons) == (min_side == 7)


def test_over_the_limit_the_writing_fails_with_count_and_names_and_a_higher_limit_goes_on(
    spoilt: Data, tmp_path: Path
) -> None:
    out, strict = tmp_path / "out", spoilt.model_copy(update={"max_unreadable": 4})
    spec = Spec.of("shards", "tree", data=spoilt)
    with pytest.raises(
        UserError, match=r"^5 of 20 images cannot be read, data.max_unreadable is 4: n1/02.png: not .*; "
    ):
        write_images(out / "manifest.json", strict, spec)
    assert not (out / "manifest.json").exists()
    assert len(json.loads((out / "unreadable.json").read_text())["unreadable"]) == 5
    before = {path.name: path.stat().st_ino for path in out.glob("shard-*")}
    assert len(before) == 14
    write_images(out / "manifest.json", spoilt, spec)
    assert {path.name: path.stat().st_ino for path in out.glob("shard-*")} == before


def test_a_set_that_is_repaired_leaves_no_list_behind(spoilt: Data, tmp_path: Path) -> None:
    out, spec = tmp_path / "out", Spec.of("shards", "tree", data=spoilt)
    write_images(out / "manifest.json", spoilt, spec)
    write_tree(tmp_path / "tree", NAMES)
    assert write_images(out / "manifest.json", spoilt, spec)["num_samples"] == 20
    assert not (out / "unreadable.json").exists()


def test_far_over_the_limit_the_rest_is_not_looked_at(tmp_path: Path) -> None:
    num = 2 * BEYOND + 10
    (tmp_path / "tree" / "n1").mkdir(parents=True)
    for number in range(num):
        (tmp_path / "tree" / "n1" / f"{number:04d}.jpg").write_bytes(b"no image")
    data = data_of("image_folder", tmp_path / "tree", num_classes=1, shard_size=10)
    with pytest.raises(UserError, match=rf"^at least 110 of {num} images cannot be read.* and 107 more \(all in "):
        write_images(tmp_path / "out" / "manifest.json", data, Spec.of("shards", "tree", data=data))


def test_a_set_without_a_readable_image_is_refused_whatever_the_limit(tmp_path: Path) -> None:
    (tmp_path / "tree" / "n1").mkdir(parents=True)
    (tmp_path / "tree" / "n1" / "a.jpg").write_bytes(b"no image")
    data = data_of("image_folder", tmp_path / "tree", num_classes=1, max_unreadable=9)
    with pytest.raises(UserError, match=r"none of the images can be read"):
        write_images(tmp_path / "out" / "manifest.json", data, Spec.of("shards", "tree", data=data))
