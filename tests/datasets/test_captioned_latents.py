"""Latents of images with captions: which are left out, and what the manifest says about an inexact codec."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dmd2 import files
from dmd2.config import Captions, Data
from dmd2.config.digit_pairs import composition, is_held_out
from dmd2.datasets.images import write_images
from dmd2.datasets.latents import held_out, write_latents
from dmd2.datasets.loader import Loader
from dmd2.datasets.reader import ShardReader
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec
from dmd2.teachers.pixels import PixelCodec

DATA = Data(source="digit_pairs", resolution=16, channels=1, captions=Captions(), shard_size=1000, image_format="png")
TRAINING = DATA.model_copy(update={"captions": Captions(subset="training")})


class Rounded(PixelCodec):
    """Keeps every fourth grey level; the ids are hidden in the first pixel. Refuses empty batches."""

    def __init__(self, min_psnr: float):
        super().__init__(256, 1)
        self.min_psnr, self.facts = min_psnr, {"posterior_seed": 3}

    def encode(self, images: np.ndarray, ids: Sequence[int] | range = ()) -> np.ndarray:
        assert len(images) == len(ids) > 0
        stored = (images // 4 * 4).transpose(0, 3, 1, 2).astype(np.float16)
        stored[:, 0, 0, 0] = np.asarray(ids) % 256
        return stored

    def load(self, stored: np.ndarray) -> Tensor:
        return torch.tensor(stored, dtype=torch.float32) / 127.5 - 1


class Words:
    """Captions as the lengths of their words."""

    def tokenize(self, labels: Sequence[str]) -> dict[str, Tensor]:
        return {"tokens": torch.tensor([[len(word) for word in text.split()] for text in labels], dtype=torch.int16)}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    manifest = tmp_path_factory.mktemp("pairs") / "images" / "manifest.json"
    write_images(manifest, DATA, Spec.of("shards", "shards", data=DATA))
    return manifest


def latents_spec(data: Data) -> Spec:
    return Spec.of("latents", "latents", {"shards": Spec.of("shards", "shards", data=DATA)}, data=data)


@pytest.mark.parametrize("batch_size", [3, 64])  # with 3 some batches keep none
def test_held_out_captions_get_no_latents_and_the_others_theirs(images: Path, batch_size: int, tmp_path: Path) -> None:
    out = tmp_path / "latents" / "manifest.json"
    manifest = write_latents(images, out, Rounded(24.0), Words(), latents_spec(TRAINING), batch_size=batch_size)
    assert (manifest["num_samples"], manifest["facts"]["held_out"]) == (4800, 1200)
    found, whole = ShardReader(out).read(range(4800)), ShardReader(images).read(range(6000))
    ids = [i for i, text in enumerate(whole["txt"].tolist()) if not is_held_out(*composition(text))]
    assert found["txt"].tolist() == whole["txt"][ids].tolist()
    assert found["latent"][:, 0, 0, 0].tolist() == [i % 256 for i in ids]
    np.testing.assert_array_equal(found["latent"][:, 0, 8:], whole["image"][ids][:, 8:, :, 0] // 4 * 4)
    assert found["cond.tokens"].tolist() == [[len(word) for word in text.split()] for text in found["txt"].tolist()]


def test_the_manifest_has_the_psnr_and_what_the_codec_tells_and_the_provenance_the_speed(
    images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "latents" / "manifest.json"
    manifest = write_latents(images, out, Rounded(25.0), Words(), latents_spec(DATA))
    each = [shard["facts"]["decode_psnr"] for shard in manifest["shards"]]
    assert 25 < min(each) < max(each) < 50
    assert manifest["facts"] == {"posterior_seed": 3, "decode_psnr": pytest.approx(np.mean(each))}
    assert manifest["fields"]["latent.npy"]["dtype"] == "float16"
    speed = files.read_json(out.with_name("provenance.json"))["encoding"]
    assert speed["images"] == 6000
    assert speed["images_per_second"] > 0
    again = write_latents(images, out, Rounded(25.0), Words(), latents_spec(DATA))
    assert again == manifest
    assert "encoding" not in files.read_json(out.with_name("provenance.json"))


def test_too_low_a_psnr_is_refused_with_both_figures(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"samples 0 to 63 .* dB\), but at least 60.0 dB are required; check that"):
        write_latents(images, tmp_path / "manifest.json", Rounded(60.0), Words(), latents_spec(DATA))


def test_only_data_that_hold_captions_out_have_a_training_subset() -> None:
    spec = latents_spec(TRAINING.model_copy(update={"source": "image_folder"}))
    with pytest.raises(UserError, match=r"captions.subset is training, but source image_folder holds no captions out"):
        held_out(spec)
    assert held_out(latents_spec(DATA)) is None


def test_batches_for_training_have_the_tokens_and_not_the_captions(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents" / "manifest.json"
    write_latents(images, out, Rounded(25.0), Words(), latents_spec(DATA))
    for cache_bytes in (0, 2**28):
        loader = Loader(out, batch_size=8, seed=0, cache_bytes=cache_bytes)
        assert loader.batch(3).keys() == {"latent", "cond.tokens"}
        loader.close()
