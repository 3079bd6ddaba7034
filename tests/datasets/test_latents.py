from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from dmd2.config import Data, Pairs
from dmd2.datasets.images import write_images
from dmd2.datasets.latents import write_latents, write_pairs
from dmd2.datasets.loader import Loader, PairBatch, to_batch, to_pairs
from dmd2.datasets.reader import ShardReader
from dmd2.datasets.shards import read_manifest
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec
from dmd2.training.rng import SampleNoise


class Levels:
    """The 17 levels of the digits as bytes; `shift` spoils the way back by so many grey levels."""

    def __init__(self, shift: int = 0, min_psnr: float | None = None):
        self.shift, self.min_psnr = shift, min_psnr

    def encode(self, images: np.ndarray, ids: range) -> np.ndarray:
        return np.round(images * (16 / 255)).astype(np.uint8).transpose(0, 3, 1, 2)

    def load(self, stored: np.ndarray) -> Tensor:
        return torch.from_numpy(stored).float() / 8 - 1

    def decode(self, x0: Tensor, *, rounding: str = "round") -> np.ndarray:
        grey = np.round((x0.numpy() + 1) * 8 * (255 / 16)).astype(np.int16) + self.shift
        return grey.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


class Classes:
    """Conditions by two names, one of them a vector, as a text encoder gives."""

    def tokenize(self, labels: Sequence[Any]) -> dict[str, Tensor]:
        label = torch.tensor(labels)
        return {"label": label, "onehot": torch.nn.functional.one_hot(label, 10).half()}

    def draw(self, num: int, rng: torch.Generator) -> dict[str, Tensor]:
        return self.tokenize(torch.randint(10, (num,), generator=rng).tolist())

    def null(self, num: int) -> None:
        return None


def write_digits(folder: Path, data: Data) -> tuple[Path, Spec]:
    manifest, spec = folder / "images" / "manifest.json", Spec.of("shards", "digits", data=data)
    write_images(manifest, data, spec)
    return manifest, spec


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, digits: Data) -> tuple[Path, Spec]:
    return write_digits(tmp_path_factory.mktemp("digits"), digits)


@pytest.fixture
def latents_spec(digits: Data) -> Spec:
    return Spec.of("latents", "digits", {"shards": Spec.of("shards", "digits", data=digits)}, data=digits)


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_batches_of_digits_are_the_data_set(
    image_format: str, digits: Data, latents_spec: Spec, tmp_path: Path
) -> None:
    images = write_digits(tmp_path, digits.model_copy(update={"image_format": image_format}))
    out, codec = tmp_path / "latents" / "manifest.json", Levels()
    write_latents(images[0], out, codec, Classes(), latents_spec, images_digest=images[1].digest)
    truth = load_digits()
    loader = Loader(out, batch_size=64, seed=0, digest=latents_spec.digest)
    for step in range(30):  # into the second epoch
        ids = loader.ids(step)
        x0, cond = to_batch(loader.batch(step), codec)
        assert x0.dtype == torch.float32
        np.testing.assert_array_equal(x0[:, 0].numpy(), truth.images[ids].astype(np.float32) / 8 - 1)
        assert cond.keys() == {"label", "onehot"}
        assert cond["label"].tolist() == truth.target[ids].tolist()
        assert cond["onehot"].dtype == torch.float16
        assert cond["onehot"].argmax(1).tolist() == truth.target[ids].tolist()


def test_the_way_back_is_checked_on_every_shard_and_its_error_recorded(
    images: tuple[Path, Spec], latents_spec: Spec, tmp_path: Path
) -> None:
    manifest = tmp_path / "latents" / "manifest.json"
    write_latents(images[0], manifest, Levels(), Classes(), latents_spec)
    exact = {"decode_error_mean": 0.0, "decode_error_max": 0.0}
    assert [shard["facts"] for shard in read_manifest(manifest)["shards"]] == [exact] * 3


def test_a_codec_that_does_not_come_back_is_refused_above_the_limit(
    images: tuple[Path, Spec], latents_spec: Spec, tmp_path: Path
) -> None:
    manifest = tmp_path / "latents" / "manifest.json"
    with pytest.raises(UserError, match=r"reconstructs samples 0 to 63 .* they must be equal; check that the"):
        write_latents(images[0], manifest, Levels(shift=3), Classes(), latents_spec)
    assert list(manifest.parent.iterdir()) == []
    write_latents(images[0], manifest, Levels(shift=3, min_psnr=30), Classes(), latents_spec)
    facts = read_manifest(manifest)["shards"][0]["facts"]
    assert facts["decode_error_max"] == 3.0
    assert 0 < facts["decode_error_mean"] <= 3.0


def test_images_of_another_configuration_are_refused(
    images: tuple[Path, Spec], latents_spec: Spec, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"images/manifest.json: made with configuration"):
        write_latents(
            images[0], tmp_path / "latents.json", Levels(), Classes(), latents_spec, images_digest=latents_spec.digest
        )


def test_latents_are_made_again_when_the_images_changed(latents_spec: Spec, digits: Data, tmp_path: Path) -> None:
    manifest = tmp_path / "latents" / "manifest.json"
    images, _ = write_digits(tmp_path, digits)
    write_latents(images, manifest, Levels(), Classes(), latents_spec)
    first = (manifest.parent / "shard-00000.tar").stat().st_ino
    write_latents(images, manifest, Levels(), Classes(), latents_spec)
    assert (manifest.parent / "shard-00000.tar").stat().st_ino == first
    write_digits(tmp_path, digits.model_copy(update={"channels": 3}))
    write_latents(images, manifest, Levels(), Classes(), latents_spec)
    assert ShardReader(manifest).read([0])["latent"].shape == (1, 3, 8, 8)


def pairs(dtype: torch.dtype = torch.float32) -> Callable[[range], PairBatch]:
    """A sampler whose image is half its noise."""

    def make(ids: range) -> PairBatch:
        noise = SampleNoise(20_000_000, ids, (1, 4, 4))()
        return PairBatch(noise.to(dtype), (noise / 2).to(dtype), {"label": torch.arange(ids.start, ids.stop) % 10})

    return make


@pytest.fixture
def pairs_spec() -> Spec:
    return Spec.of("pairs", "digits", pairs=Pairs(num_pairs=30))


def test_pairs_come_back_and_do_not_depend_on_the_batch_they_were_made_in(pairs_spec: Spec, tmp_path: Path) -> None:
    small, large = (tmp_path / name / "manifest.json" for name in ("small", "large"))
    write_pairs(small, 30, pairs(), pairs_spec, shard_size=12, batch_size=5)
    write_pairs(large, 30, pairs(), pairs_spec, shard_size=12, batch_size=64)
    assert read_manifest(small)["shards"] == read_manifest(large)["shards"]
    found = to_pairs(ShardReader(small).read(range(30)))
    assert torch.equal(found.noise, SampleNoise(20_000_000, range(30), (1, 4, 4))())
    assert torch.equal(found.x0, found.noise / 2)
    assert found.cond["label"].tolist() == [i % 10 for i in range(30)]


def test_pairs_are_stored_in_the_precision_given(pairs_spec: Spec, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    write_pairs(manifest, 4, pairs(torch.float16), pairs_spec, shard_size=4)
    assert ShardReader(manifest).read([0])["noise"].dtype == np.float16


def test_a_pair_with_nan_is_refused_with_its_number(pairs_spec: Spec, tmp_path: Path) -> None:
    def diverged(ids: range) -> PairBatch:
        batch = pairs()(ids)
        batch.x0[[i == 7 for i in ids], 0, 2, 2] = torch.nan
        return batch

    with pytest.raises(UserError, match=r"sample 7: `x0.npy`: holds NaN"):
        write_pairs(tmp_path / "manifest.json", 30, diverged, pairs_spec, shard_size=12, batch_size=5)


def test_noise_and_image_of_different_shapes_are_refused(pairs_spec: Spec, tmp_path: Path) -> None:
    def odd(ids: range) -> PairBatch:
        batch = pairs()(ids)
        return batch._replace(x0=batch.x0[:, :, :2])

    with pytest.raises(ValueError, match=r"noise has shape \(4, 1, 4, 4\), x0 \(4, 1, 2, 4\)"):
        write_pairs(tmp_path / "manifest.json", 4, odd, pairs_spec, shard_size=4)
