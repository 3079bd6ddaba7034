"""Data sets that fit into memory."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dmd2 import files
from dmd2.config import Data
from dmd2.datasets.sources.base import existing, insist
from dmd2.errors import UserError


class InMemory:
    """A source over arrays: images uint8 (N, H, W, C) and labels (N,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: list[str], fingerprint: str):
        self._images, self.labels = images, labels.astype(np.int64)
        self.classes: Sequence[str] = classes
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> np.ndarray:
        return np.asarray(self._images[number])

    def name(self, number: int) -> str:
        return f"image {number}"


class Digits(InMemory):
    """Scikit-learn's handwritten digits: 1,797 grey 8x8 images with 17 levels, in the order of the data set.

    Level k of 0..16 is stored as round(k * 255 / 16).
    """

    def __init__(self, data: Data):
        from sklearn.datasets import load_digits

        insist(data, resolution=8, num_classes=10, levels=17)
        levels, labels = load_digits(return_X_y=True)
        pixels = np.round(levels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        fingerprint = hashlib.sha256(levels.tobytes() + labels.tobytes()).hexdigest()
        super().__init__(
            np.repeat(pixels, data.channels, axis=3), labels, [str(digit) for digit in range(10)], fingerprint
        )


class Cifar10(InMemory):
    """CIFAR-10's 50,000 training images from the official archive `cifar-10-binary.tar.gz`, in its order.

    The binary version, because the Python version is pickled. A record is one class byte and 3,072 bytes of pixels,
    the red, green and blue 32x32 planes (www.cs.toronto.edu/~kriz/cifar.html).
    """

    SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"  # see workflow/downloads.yaml
    BATCHES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
    NAMES = "batches.meta.txt"
    RECORD = 1 + 3 * 32 * 32

    def __init__(self, data: Data):
        insist(data, resolution=32, num_classes=10, channels=3, levels=256)
        path = existing(data, "the data set's archive cifar-10-binary.tar.gz")
        remedy = "fetch the published cifar-10-binary.tar.gz again (the Python and Matlab versions are not read)"
        files.check_sha256(path, self.SHA256, remedy)
        content = self._members(path)
        rows = np.concatenate(
            [np.frombuffer(content[name], np.uint8).reshape(-1, self.RECORD) for name in self.BATCHES]
        )
        images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        super().__init__(np.ascontiguousarray(images), rows[:, 0], content[self.NAMES].decode().split(), self.SHA256)

    def _members(self, path: Path) -> dict[str, bytes]:
        wanted = {*self.BATCHES, self.NAMES}
        try:
            with tarfile.open(path, "r:gz") as tar:
                found = {Path(m.name).name: tar.extractfile(m) for m in tar if Path(m.name).name in wanted}
                content = {name: file.read() for name, file in found.items() if file is not None}
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path}: not a complete tar.gz archive ({error}); fetch it again") from None
        if missing := sorted(wanted - content.keys()):
            raise UserError(f"{path}: has no {', '.join(missing)}; fetch it again")
        return content
