"""Latents: the stock autoencoder's, in any batch, with a posterior sample that the id alone determines."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipelines import LATENT, RESOLUTION, tiny_data, tiny_vae

from dmd2.errors import UserError
from dmd2.teachers import autoencoder
from dmd2.teachers.autoencoder import AutoencoderCodec
from dmd2.training.rng import step_rng


@pytest.fixture(scope="module")
def vae() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_vae().eval().requires_grad_(False)


@pytest.fixture
def codec(vae: Any) -> AutoencoderCodec:
    return AutoencoderCodec(vae, tiny_data(), posterior_seed=5)


def images(num: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)


def test_latents_are_scaled_samples_of_the_posterior(vae: Any, codec: AutoencoderCodec) -> None:
    stored = codec.encode(images(), range(5))
    assert stored.dtype == np.float16
    assert stored.shape == (5, *LATENT)
    pixels = torch.from_numpy(images()).permute(0, 3, 1, 2) / 127.5 - 1
    for index in (0, 3):
        posterior = vae.encode(pixels[index : index + 1]).latent_dist
        expected = posterior.sample(step_rng(5, index)) * vae.config.scaling_factor
        np.testing.assert_allclose(stored[index], expected[0].half().numpy(), atol=2e-3)
        assert not np.allclose(stored[index], (posterior.mode() * vae.config.scaling_factor)[0], atol=1e-2)


def test_the_posteriors_sample_depends_on_id_and_seed_alone(
    vae: Any, codec: AutoencoderCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = codec.encode(images(), range(10, 15))
    np.testing.assert_allclose(codec.encode(images()[3:], [13, 14]), whole[3:], atol=1e-3)
    monkeypatch.setattr(autoencoder, "PIXELS_AT_ONCE", 2 * RESOLUTION**2)
    np.testing.assert_allclose(codec.encode(images(), range(10, 15)), whole, atol=1e-3)
    assert np.abs(codec.encode(images(), range(5)) - whole).max() > 0.01
    other = AutoencoderCodec(vae, tiny_data(), posterior_seed=6)
    assert np.abs(other.encode(images(), range(10, 15)) - whole).max() > 0.01


def test_decoding_is_the_stock_pipelines(vae: Any, codec: AutoencoderCodec) -> None:
    x0 = codec.load(codec.encode(images(), range(5)))
    assert x0.dtype == torch.float32
    decoded = codec.decode(x0)
    assert decoded.dtype == np.uint8
    stock = (vae.decode(x0 / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    expected = (stock.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    assert np.abs(decoded.astype(int) - expected).max() <= 1  # a tie may go the other way
    assert (decoded == expected).mean() > 0.999
    assert (codec.decode(x0, rounding="truncate") <= decoded).all()


def test_decoding_in_parts_gives_the_same_images(codec: AutoencoderCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    x0, sizes = codec.load(codec.encode(images(), range(5))), []
    whole = codec.decode(x0)
    monkeypatch.setattr(autoencoder, "PIXELS_AT_ONCE", 2 * RESOLUTION**2)
    network = codec._network()
    decode = network.decode
    monkeypatch.setattr(network, "decode", lambda z: sizes.append(len(z)) or decode(z))
    assert np.abs(codec.decode(x0).astype(int) - whole).max() <= 1
    assert sizes == [2, 2, 1]


def test_a_shift_is_taken_off_before_scaling(vae: Any, codec: AutoencoderCodec) -> None:
    shifted = copy.deepcopy(vae)
    shifted.register_to_config(shift_factor=0.5)
    other = AutoencoderCodec(shifted, tiny_data(), posterior_seed=5)
    stored, moved = codec.encode(images(), range(5)), other.encode(images(), range(5))
    np.testing.assert_allclose(moved, stored - 0.5 * vae.config.scaling_factor, atol=2e-3)
    assert np.abs(other.decode(other.load(moved)).astype(int) - codec.decode(codec.load(stored))).max() <= 1


def test_grey_levels_are_those_of_the_data(vae: Any) -> None:
    codec = AutoencoderCodec(vae, tiny_data().model_copy(update={"levels": 2}))
    decoded = codec.decode(torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(0)))
    assert set(np.unique(decoded)) == {0, 255}
    with pytest.raises(UserError, match="is not one of 2 grey levels"):
        codec.encode(images(), range(5))


def test_unsuitable_images_and_latents_are_refused(vae: Any, codec: AutoencoderCodec) -> None:
    with pytest.raises(UserError, match=r"expected uint8 \(B, H, W, 3\)"):
        codec.encode(images()[..., :1], range(5))
    with pytest.raises(UserError, match="samples contain NaN"):
        codec.decode(torch.full((1, *LATENT), torch.nan))
    huge = copy.deepcopy(vae)
    huge.register_to_config(scaling_factor=1e9)
    with pytest.raises(UserError, match="not finite in float16"):
        AutoencoderCodec(huge, tiny_data()).encode(images(), range(5))
    with pytest.raises(UserError, match="loaded without its autoencoder"):
        AutoencoderCodec(None, tiny_data()).encode(images(), range(5))


def test_an_empty_batch_stays_empty(codec: AutoencoderCodec) -> None:
    assert len(codec.encode(images(0), range(0))) == 0
    assert len(codec.decode(torch.empty(0, *LATENT))) == 0


def test_the_facts_tell_autoencoders_apart_by_what_latents_depend_on(vae: Any, codec: AutoencoderCodec) -> None:
    facts = codec.facts
    assert facts == {
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": 0.0,
        "posterior_seed": 5,
        "encoder_sha256": facts["encoder_sha256"],
    }
    for part, same in (("decoder", True), ("encoder", False), ("quant_conv", False)):
        other = copy.deepcopy(vae)
        with torch.no_grad():
            next(getattr(other, part).parameters()).add_(1e-3)
        assert (AutoencoderCodec(other, tiny_data(), posterior_seed=5).facts == facts) == same, part
