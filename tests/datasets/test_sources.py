"""The sources that need nothing from outside the box, and the list of all."""

import hashlib
import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.datasets import load_digits

from dmd2.config import Captions, Data
from dmd2.datasets.sources import CAPTIONED, SOURCES, open_source
from dmd2.datasets.sources.arrays import Cifar10, Digits
from dmd2.errors import UserError

CATALOGUE = Path(__file__).parents[2] / "workflow" / "downloads.yaml"


def test_digits_are_the_data_set_in_its_order_as_grey_levels(digits: Data) -> None:
    source, truth = Digits(digits), load_digits()
    images = np.stack([source[i] for i in range(len(source))])
    assert len(source) == 1797
    assert source.labels.tolist() == truth.target.tolist()
    assert source.classes == [str(name) for name in truth.target_names]
    np.testing.assert_array_equal(images[..., 0], np.round(truth.images * 255 / 16))
    np.testing.assert_array_equal(np.round(images[..., 0] / 255 * 16), truth.images)


def test_digits_in_three_channels_are_grey(digits: Data) -> None:
    image = Digits(digits.model_copy(update={"channels": 3}))[5]
    assert image.shape == (8, 8, 3)
    assert (image == image[..., :1]).all()


@pytest.mark.parametrize(("key", "value"), [("resolution", 16), ("num_classes", 9), ("levels", 256)])
def test_digits_refuse_a_configuration_that_is_not_theirs(key: str, value: int, digits: Data) -> None:
    with pytest.raises(UserError, match=rf"data.{key} is {value}"):
        Digits(digits.model_copy(update={key: value}))


def test_sources_open_by_their_names_and_others_are_refused(digits: Data) -> None:
    assert set(SOURCES) == {"digits", "cifar10", "image_folder", "image_zip", "imagenet_tar", "webdataset"}
    assert set(CAPTIONED) == {"digit_pairs", "image_folder", "webdataset", "parquet", "coco", "coco10k"}
    assert isinstance(open_source(digits), Digits)
    with pytest.raises(UserError, match=r"data.source is 'digit'; known with classes: cifar10, digits, image_folder"):
        open_source(digits.model_copy(update={"source": "digit"}))
    with pytest.raises(UserError, match=r"data.source is 'digits'; known with captions: coco, coco10k, digit_pairs"):
        open_source(Data(source="digits", resolution=8, captions=Captions()))


READING = [
    *((name, "num_classes") for name in sorted(set(SOURCES) - {"digits"})),
    *((name, "captions") for name in sorted(set(CAPTIONED) - {"digit_pairs"})),
]


@pytest.mark.parametrize(("name", "kind"), READING)
def test_a_source_that_reads_something_says_what_when_it_is_not_set_or_not_there(
    name: str, kind: str, tmp_path: Path
) -> None:
    sizes = {"resolution": 32, kind: 10 if kind == "num_classes" else Captions()}
    with pytest.raises(UserError, match=rf"data.path is not set, but source {name} reads one; set it to "):
        open_source(Data(source=name, **sizes))
    with pytest.raises(UserError, match=r"data.path: .*gone.* does not exist; (put .* there|correct)"):
        open_source(Data(source=name, path=str(tmp_path / "gone"), **sizes))


def record(number: int) -> tuple[bytes, np.ndarray, int]:
    """A record of CIFAR-10's binary files as its page describes it, with the image and the class it holds."""
    rng = np.random.default_rng(number)
    image, label = rng.integers(0, 256, (32, 32, 3), np.uint8), int(rng.integers(10))
    planes = b"".join(
        bytes(image[row, column, channel] for row in range(32) for column in range(32)) for channel in range(3)
    )
    return bytes([label]) + planes, image, label


NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar10_archive(path: Path, per_batch: int = 3, leave_out: str = "") -> Data:
    """An archive of the shape of cifar-10-binary.tar.gz, with a few records a batch."""
    files = {f"data_batch_{batch}.bin": range(batch * per_batch, (batch + 1) * per_batch) for batch in range(1, 6)}
    content = {name: b"".join(record(number)[0] for number in numbers) for name, numbers in files.items()}
    content |= {"batches.meta.txt": "\n".join([*NAMES, "", ""]).encode(), "test_batch.bin": record(999)[0]}
    with tarfile.open(path, "w:gz") as tar:
        for name in reversed(content):  # the order in the archive decides nothing
            if name != leave_out:
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                member.size = len(content[name])
                tar.addfile(member, io.BytesIO(content[name]))
    return Data(source="cifar10", path=str(path), resolution=32, num_classes=10)


def as_published(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `path` pass as the archive that the data set's authors published."""
    monkeypatch.setattr(Cifar10, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())


def test_cifar10_is_read_from_its_binary_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    data = cifar10_archive(path)
    as_published(path, monkeypatch)
    source = open_source(data)
    assert len(source) == 15  # the training batches, without the test batch
    assert source.classes == NAMES
    for position, number in enumerate(range(3, 18)):
        _, image, label = record(number)
        np.testing.assert_array_equal(source[position], image)
        assert source.labels[position] == label


def test_cifar10_takes_no_archive_but_the_published_one(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    data = cifar10_archive(path)
    with pytest.raises(UserError, match=r"its SHA-256 is [0-9a-f]{64}, expected c4a38"):
        open_source(data)
    assert yaml.safe_load(CATALOGUE.read_text())[path.name]["sha256"] == Cifar10.SHA256


@pytest.mark.parametrize("missing", ["data_batch_3.bin", "batches.meta.txt"])
def test_cifar10_without_a_member_is_refused(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = cifar10_archive(tmp_path / "archive.tar.gz", leave_out=missing)
    as_published(tmp_path / "archive.tar.gz", monkeypatch)
    with pytest.raises(UserError, match=rf"has no {re.escape(missing)}"):
        open_source(data)


def test_a_cut_archive_of_cifar10_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "archive.tar.gz"
    data = cifar10_archive(path)
    path.write_bytes(path.read_bytes()[:-5000])
    as_published(path, monkeypatch)
    with pytest.raises(UserError, match=r"not a complete tar.gz archive"):
        open_source(data)


def test_cifar10_refuses_a_configuration_that_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = cifar10_archive(tmp_path / "archive.tar.gz")
    as_published(tmp_path / "archive.tar.gz", monkeypatch)
    for key, value in (("resolution", 64), ("num_classes", 100), ("channels", 1)):
        with pytest.raises(UserError, match=rf"data.{key} is {value}, but source cifar10 has"):
            open_source(data.model_copy(update={key: value}))
