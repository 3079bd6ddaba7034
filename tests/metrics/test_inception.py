"""The TorchScript extractor, with a small network of the same calling convention in place of Inception."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dmd2 import config
from dmd2.errors import UserError
from dmd2.files import sha256
from dmd2.metrics import load_extractor

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

DATA = config.Data(source="noise", resolution=8, channels=1, num_classes=2)


class ChannelMeans(nn.Module):
    """Features: the mean of each channel and the height, so that a test knows what must come out.

    Probabilities: the softmax of the channels' means over 100, with a bias for the first class unless called without.
    """

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        means = img.mean(dim=[2, 3])
        if return_features:
            return torch.cat([means, torch.full([img.shape[0], 1], float(img.shape[2]))], dim=1)
        bias = torch.tensor([0.0, 0.0, 0.0]) if no_output_bias else torch.tensor([5.0, 0.0, 0.0])
        return torch.softmax(means / 100 + bias, dim=1)


class NoProbabilities(nn.Module):
    """A detector with features alone."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        return img.mean(dim=[2, 3])


class Logits(nn.Module):
    """A detector that forgets the softmax."""

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        return img.mean(dim=[2, 3])


def saved(network: nn.Module, path: Path) -> Path:
    torch.jit.script(network).save(str(path))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(ChannelMeans(), tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt")


def named(path: Path, digest: str | None) -> config.Features:
    return config.Features(kind="inception", weights=config.WeightsFile(path=str(path), sha256=digest))


def test_network_gets_grey_levels_of_three_channels_and_returns_float64(weights):
    extractor = load_extractor(named(weights, sha256(weights)), DATA, None)
    images = np.random.default_rng(0).integers(256, size=(130, 8, 8, 1), dtype=np.uint8)
    found, classes, _ = extractor.observe(images)
    assert (extractor.name, extractor.dim, found.dtype) == ("inception", 4, np.float64)
    np.testing.assert_allclose(found[:, :3], images.mean(axis=(1, 2)).repeat(3, axis=1), rtol=1e-6)
    assert (found[:, 3] == 8).all()  # not resized before the network, which does it itself
    assert classes is None


def test_probabilities_are_the_networks_softmax_without_bias(weights):
    extractor = load_extractor(named(weights, sha256(weights)), DATA, None)
    images = np.random.default_rng(0).integers(256, size=(70, 8, 8, 3), dtype=np.uint8)
    means = images.mean(axis=(1, 2)) / 100
    expected = np.exp(means) / np.exp(means).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(extractor.observe(images).probabilities, expected, rtol=1e-5)
    assert extractor.observe(images, detailed=False).probabilities is None


def test_batches_of_any_size_give_the_same(weights):
    images = np.random.default_rng(0).integers(256, size=(70, 8, 8, 3), dtype=np.uint8)
    one, many = (
        load_extractor(named(weights, sha256(weights)), DATA, None, batch_size=size).observe(images) for size in (1, 64)
    )
    np.testing.assert_allclose(one.features, many.features, rtol=1e-6)
    np.testing.assert_allclose(one.probabilities, many.probabilities, rtol=1e-6)


def test_detector_without_class_scores_has_features_alone(tmp_path: Path):
    path = saved(NoProbabilities(), tmp_path / "features.pt")
    found = load_extractor(named(path, sha256(path)), DATA, None).observe(np.zeros((2, 8, 8, 3), np.uint8))
    assert found.features.shape == (2, 3)
    assert found.probabilities is None


def test_detector_that_returns_no_probabilities_is_refused(tmp_path: Path):
    path = saved(Logits(), tmp_path / "logits.pt")
    with pytest.raises(UserError, match=r"logits\.pt: .*no_output_bias=True are not probabilities"):
        load_extractor(named(path, sha256(path)), DATA, None)


def test_colour_channels_keep_their_order(weights):
    extractor = load_extractor(named(weights, sha256(weights)), DATA, None)
    images = np.broadcast_to(np.array([10, 20, 30], np.uint8), (2, 8, 8, 3))
    np.testing.assert_allclose(extractor.observe(images).features[:, :3], [[10, 20, 30]] * 2)


def test_missing_file_says_what_to_put_where(tmp_path: Path):
    with pytest.raises(UserError, match=r"gone\.pt: no such file .* fetch https://.*inception-2015-12-05\.pt"):
        load_extractor(named(tmp_path / "gone.pt", "0" * 64), DATA, None)
    with pytest.raises(UserError, match=r"features\.weights is not set"):
        load_extractor(config.Features(kind="inception"), DATA, None)


def test_file_without_a_checksum_is_never_loaded(weights):
    with pytest.raises(UserError, match=rf"features\.weights\.sha256 is not set.*{sha256(weights)}"):
        load_extractor(named(weights, None), DATA, None)


def test_file_with_another_checksum_is_never_loaded(weights):
    with pytest.raises(UserError, match=rf"its SHA-256 is {sha256(weights)}, expected 00"):
        load_extractor(named(weights, "0" * 64), DATA, None)


def test_file_that_is_no_such_network_is_refused(tmp_path: Path):
    path = tmp_path / "other.pt"
    path.write_bytes(b"not an archive")
    with pytest.raises(UserError, match=r"other\.pt: not a TorchScript network"):
        load_extractor(named(path, sha256(path)), DATA, None)
    torch.jit.script(nn.Flatten()).save(str(path))
    with pytest.raises(UserError, match=r"other\.pt: not a TorchScript network that takes"):
        load_extractor(named(path, sha256(path)), DATA, None)


def test_pickle_in_place_of_the_network_is_not_executed(tmp_path: Path):
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    path = tmp_path / "evil.pt"
    torch.save(Evil(), path)
    with pytest.raises(UserError, match=r"evil\.pt: not a TorchScript network"):
        load_extractor(named(path, sha256(path)), DATA, None)
    assert not marker.exists()
