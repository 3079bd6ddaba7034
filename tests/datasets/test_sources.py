import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dmd2.config import Data
from dmd2.datasets.reader import ShardReader
from dmd2.datasets.sources import SOURCES, Digits, ImageFolder, open_source, write_images
from dmd2.errors import UserError
from dmd2.spec import Spec


def folder_data(path: Path, **over: object) -> Data:
    keys = {"source": "image_folder", "path": str(path), "resolution": 4, "channels": 3, "num_classes": 2, **over}
    return Data.model_validate(keys)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes, named so that their sorted order is not the order of creation."""
    rng = np.random.default_rng(0)
    for name in ("n2/b.png", "n1/c.png", "n1/deep/a.png", "n2/a.png"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).save(path)
    (tmp_path / "tree" / "n1" / "notes.txt").write_text("not an image")
    (tmp_path / "tree" / "n1" / "._c.png").write_text("not an image either")
    (tmp_path / "tree" / ".cache").mkdir()
    return tmp_path / "tree"


def test_digits_are_the_data_set_in_its_order_as_grey_levels(digits: Data) -> None:
    source, truth = Digits(digits), load_digits()
    images, labels = zip(*(source[i] for i in range(len(source))), strict=True)
    assert len(source) == 1797
    assert labels == tuple(truth.target)
    np.testing.assert_array_equal(np.stack(images)[..., 0], np.round(truth.images * 255 / 16))
    np.testing.assert_array_equal(np.round(np.stack(images)[..., 0] / 255 * 16), truth.images)


def test_digits_in_three_channels_are_grey(digits: Data) -> None:
    image, _ = Digits(digits.model_copy(update={"channels": 3}))[5]
    assert image.shape == (8, 8, 3)
    assert (image == image[..., :1]).all()


@pytest.mark.parametrize(("key", "value"), [("resolution", 16), ("num_classes", 9), ("levels", 256)])
def test_digits_refuse_a_configuration_that_is_not_theirs(key: str, value: int, digits: Data) -> None:
    with pytest.raises(UserError, match=rf"data.{key} is {value}"):
        Digits(digits.model_copy(update={key: value}))


def test_every_source_opens_by_its_name_and_others_are_refused(digits: Data, tree: Path) -> None:
    assert set(SOURCES) == {"digits", "image_folder"}
    assert len(open_source(digits)) == 1797
    assert len(open_source(folder_data(tree))) == 4
    with pytest.raises(UserError, match=r"data.source is 'digit'; known: digits, image_folder"):
        open_source(digits.model_copy(update={"source": "digit"}))


def test_classes_are_numbered_in_sorted_order_of_their_folders(tree: Path) -> None:
    source = ImageFolder(folder_data(tree, resolution=6))
    expected = [("n1/c.png", 0), ("n1/deep/a.png", 0), ("n2/a.png", 1), ("n2/b.png", 1)]
    assert len(source) == 4
    for number, (name, label) in enumerate(expected):
        image, found = source[number]
        assert found == label
        # short side 6 of 6x9 at resolution 6: the middle columns, untouched by the resize
        np.testing.assert_array_equal(image, np.asarray(Image.open(tree / name))[:, 1:7])


def test_ids_do_not_depend_on_the_order_in_which_the_disk_lists_files(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {order: [] for order in (False, True)}
    for backwards, found in listed.items():

        def rglob(folder: Path, pattern: str, backwards: bool = backwards) -> list[Path]:
            names = [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names]
            return [Path(name) for name in sorted(names, reverse=backwards)]

        monkeypatch.setattr(Path, "rglob", rglob)
        found += [image.tobytes() for image, _ in ImageFolder(folder_data(tree))]
    assert len(listed[False]) == 4
    assert listed[False] == listed[True]


def test_images_are_cropped_to_the_short_side_and_resized_with_lanczos(tree: Path) -> None:
    path = tree / "n1" / "c.png"
    pixels = np.random.default_rng(1).integers(0, 256, (30, 21, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    image, _ = ImageFolder(folder_data(tree, resolution=8))[0]
    square = Image.fromarray(pixels[4:25])
    np.testing.assert_array_equal(image, np.asarray(square.resize((8, 8), Image.Resampling.LANCZOS)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_8_bit_modes_become_rgb(mode: str, tree: Path) -> None:
    path = tree / "n1" / "c.png"
    path.unlink()
    picture = Image.fromarray(np.full((4, 4, 3), 255, np.uint8)).convert(mode)
    picture.save(tree / "n1" / "c.tiff")
    image, _ = ImageFolder(folder_data(tree))[0]
    np.testing.assert_array_equal(image, np.full((4, 4, 3), 255, np.uint8))


def test_grey_images_are_replicated_or_kept_as_one_channel(tree: Path) -> None:
    grey = np.random.default_rng(2).integers(0, 256, (4, 4), np.uint8)
    Image.fromarray(grey).save(tree / "n1" / "c.png")
    np.testing.assert_array_equal(ImageFolder(folder_data(tree))[0][0], np.stack([grey] * 3, axis=2))
    np.testing.assert_array_equal(ImageFolder(folder_data(tree, channels=1))[0][0], grey[..., None])


def damaged(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def not_an_image(path: Path) -> None:
    path.write_text("hello")


def sixteen_bit(path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [damaged, not_an_image, sixteen_bit, empty])
def test_an_unreadable_image_is_named_and_stops_the_writer(spoil, tree: Path, tmp_path: Path) -> None:
    spoil(tree / "n2" / "a.png")
    data = folder_data(tree)
    with pytest.raises(UserError, match=r"n2/a.png: .*(replace|convert) or remove it"):
        write_images(tmp_path / "out" / "manifest.json", data, Spec.of("shards", "tree", data=data))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_postscript_file_under_an_image_name_is_not_run(tree: Path) -> None:
    (tree / "n1" / "c.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match=r"c.png: not a readable image \(cannot identify"):
        ImageFolder(folder_data(tree))[0]


def test_trees_that_do_not_fit_the_configuration_are_refused(tree: Path) -> None:
    with pytest.raises(UserError, match=r"data.path is not set"):
        ImageFolder(folder_data(tree).model_copy(update={"path": None}))
    with pytest.raises(UserError, match="elsewhere is not a folder"):
        ImageFolder(folder_data(tree / "elsewhere"))
    with pytest.raises(UserError, match=r"2 class folders, but data.num_classes is 3"):
        ImageFolder(folder_data(tree, num_classes=3))
    (tree / "n3").mkdir()
    with pytest.raises(UserError, match="n3: class folder without an image"):
        ImageFolder(folder_data(tree, num_classes=3))


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_shards_hold_the_sources_images_and_labels(image_format: str, tree: Path, tmp_path: Path) -> None:
    data = folder_data(tree, image_format=image_format, shard_size=3)
    manifest = tmp_path / "out" / "manifest.json"
    write_images(manifest, data, Spec.of("shards", "tree", data=data))
    raw, source = ShardReader(manifest).read(range(4)), ImageFolder(data)
    for number in range(4):
        image, label = source[number]
        np.testing.assert_array_equal(raw["image"][number], image)
        assert raw["cls"][number] == label


def test_a_changed_folder_is_written_again_under_the_same_configuration(tree: Path, tmp_path: Path) -> None:
    data, manifest = folder_data(tree), tmp_path / "out" / "manifest.json"
    spec = Spec.of("shards", "tree", data=data)
    write_images(manifest, data, spec)
    (tree / "n1" / "c.png").rename(tree / "n1" / "z.png")  # the order of ids changes, their number does not
    write_images(manifest, data, spec)
    np.testing.assert_array_equal(ShardReader(manifest).read([0])["image"][0], ImageFolder(data)[0][0])
