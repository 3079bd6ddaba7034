"""Training of the autoencoder and the text encoder of a small text-to-image teacher."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from pydantic import ValidationError
from transformers import CLIPTextModel, CLIPTokenizer

from dmd2 import config
from dmd2.config.digit_pairs import composition, prompts
from dmd2.datasets.sources.digit_pairs import DigitPairs
from dmd2.errors import UserError
from dmd2.teachers.fit_autoencoder import fit_autoencoder
from dmd2.teachers.fit_text_encoder import build_tokenizer, fit_text_encoder

DATA = config.Data(source="digit_pairs", resolution=16, channels=1, captions=config.Captions())
AUTOENCODER = {
    "latent_channels": 4,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TARGETS = {text: composition(text) for text in prompts("training")}
UNSEEN = {text: composition(text) for text in prompts() if text not in TARGETS}


def settings(**changes) -> config.ComponentsTraining:
    base = {
        "autoencoder": AUTOENCODER,
        "autoencoder_iterations": 2,
        "autoencoder_batch_size": 8,
        "text_encoder": TEXT,
        "text_iterations": 2,
        "text_batch_size": 32,
    }
    return config.ComponentsTraining.model_validate({**base, **changes})


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    source = DigitPairs(DATA)
    return np.stack([source[i] for i in range(400)])


def weights(folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


def test_autoencoder_learns_and_its_latents_have_unit_variance(images, tmp_path):
    untrained = fit_autoencoder(images, settings(), tmp_path)
    training = settings(autoencoder_iterations=60, autoencoder_batch_size=32, autoencoder_learning_rate=5e-3)
    facts = fit_autoencoder(images, training, tmp_path)
    assert facts["psnr"] > untrained["psnr"] + 5
    assert facts["latent_shape"] == [4, 8, 8]
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae", use_safetensors=True, local_files_only=True)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
        latents = posterior.sample(torch.Generator().manual_seed(5))
        decoded = vae.decode(latents[19::20]).sample.clamp(-1, 1)
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.03)
    error = 127.5**2 * (decoded - x[19::20]).double().square().mean()
    assert 10 * torch.log10(255**2 / error).item() == pytest.approx(facts["psnr"], abs=0.5)


def test_autoencoder_is_a_function_of_seed_and_images(images, tmp_path):
    torch.rand(7)
    before = torch.get_rng_state()
    for name, training in {"first": settings(), "again": settings(), "other": settings(seed=1)}.items():
        fit_autoencoder(images, training, tmp_path / name)
    assert torch.equal(torch.get_rng_state(), before)
    assert weights(tmp_path / "first", VAE_FILE) == weights(tmp_path / "again", VAE_FILE)
    assert weights(tmp_path / "first", VAE_FILE) != weights(tmp_path / "other", VAE_FILE)


def test_psnr_is_of_images_that_were_not_trained_on(images, tmp_path):
    changed = images.copy()
    changed[19::20] = 255 - changed[19::20]
    training = settings(autoencoder_iterations=10)
    first, second = (fit_autoencoder(x, training, tmp_path / str(i)) for i, x in enumerate((images, changed)))
    assert weights(tmp_path / "0", VAE_FILE) == weights(tmp_path / "1", VAE_FILE)
    assert first["psnr"] != second["psnr"]


def test_kl_weight_pulls_the_posterior_to_the_standard_normal(images, tmp_path):
    quick = {"autoencoder_iterations": 60, "autoencoder_batch_size": 32, "autoencoder_learning_rate": 5e-3}
    free, bound = (fit_autoencoder(images, settings(**quick, kl_weight=kl), tmp_path / str(kl)) for kl in (0.0, 100.0))
    assert abs(bound["latent_std"] - 1) < 0.1
    assert bound["psnr"] < free["psnr"] - 2  # little is left of the images


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 3}, "in_channels and out_channels must be 1"),
        ({"norm_num_groups": 5}, "components.autoencoder"),
        ({"nonsense": 1}, "nonsense"),
        ({"down_block_types": ["Nothing"] * 2}, "Nothing"),
        (
            {
                "block_out_channels": [8] * 6,
                "down_block_types": ["DownEncoderBlock2D"] * 6,
                "up_block_types": ["UpDecoderBlock2D"] * 6,
            },
            "cannot be halved 5 times",
        ),
    ],
)
def test_unsuitable_autoencoders_are_refused_before_training(images, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        fit_autoencoder(images, settings(autoencoder={**AUTOENCODER, **changes}), tmp_path)
    assert not any(tmp_path.iterdir())


def test_unsuitable_images_are_refused(images, tmp_path):
    for bad in (images.astype(np.float32), images[:10], images[..., 0]):
        with pytest.raises(UserError, match="uint8 images"):
            fit_autoencoder(bad, settings(), tmp_path)


def test_divergence_is_an_error_and_writes_nothing(images, tmp_path):
    training = settings(autoencoder_iterations=20, autoencoder_learning_rate=1e18)
    with pytest.raises(UserError, match="not finite"):
        fit_autoencoder(images, training, tmp_path)
    with pytest.raises(UserError, match="not finite"):
        fit_text_encoder(TARGETS, settings(text_iterations=20, text_learning_rate=1e18), tmp_path)
    assert not any(tmp_path.iterdir())


def test_every_word_is_a_token_and_captions_have_one_length():
    tokenizer = build_tokenizer(list(TARGETS))
    assert tokenizer.model_max_length == 8
    ids = tokenizer(["a three left of an eight", ""], padding="max_length", truncation=True).input_ids
    assert len(set(ids[0])) == 8
    assert ids[1] == [tokenizer.bos_token_id] + 7 * [tokenizer.eos_token_id]
    assert tokenizer.tokenize("an eight cat") == ["an</w>", "eight</w>", "c", "a", "t</w>"]
    assert tokenizer.unk_token_id not in tokenizer("ÄÖ 9 猫", add_special_tokens=False).input_ids


def test_words_that_share_letters_are_tokens_too():
    words = ["b", "ab", "aab", "abab", "aa", "aaa", "aaaa", "bab", "abba", "straße", "x9", "a-b"]
    tokenizer = build_tokenizer(words)
    pieces = dict.fromkeys(words, 1) | {"x9": 2, "a-b": 3}  # CLIP splits at digits and punctuation
    assert {word: len(tokenizer.tokenize(word)) for word in words} == pieces


def test_tokenizers_of_the_same_captions_are_equal():
    captions = list(TARGETS)
    assert build_tokenizer(captions[::-1]).get_vocab() == build_tokenizer(captions).get_vocab()


def test_text_encoder_learns_what_captions_describe(tmp_path):
    training = settings(
        text_iterations=300, text_batch_size=64, text_encoder={**TEXT, "hidden_size": 64, "intermediate_size": 128}
    )
    facts = fit_text_encoder(TARGETS, training, tmp_path, unseen=UNSEEN)
    assert facts["accuracy"] > 0.95
    assert 0.4 < facts["unseen_accuracy"] <= 1  # chance: 0.01
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    encoder = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", use_safetensors=True, local_files_only=True)
    assert (tokenizer.model_max_length, len(tokenizer)) == (facts["length"], facts["num_tokens"])
    same = ["a three left of a seven", "a seven right of a three", "a seven left of a three"]
    ids = torch.tensor(tokenizer(same, padding="max_length", truncation=True).input_ids)
    with torch.no_grad():
        end = encoder(ids).pooler_output
        states = encoder(ids).last_hidden_state
    assert torch.equal(end, states[:, -1])  # these captions end at the last token
    assert (end[0] - end[1]).norm() < 0.5 * (end[0] - end[2]).norm()


def test_text_encoder_is_a_function_of_seed_and_captions(tmp_path):
    before = torch.get_rng_state()
    for name, training in {"first": settings(), "again": settings(), "other": settings(seed=1)}.items():
        fit_text_encoder(TARGETS, training, tmp_path / name)
    assert torch.equal(torch.get_rng_state(), before)
    for file in (TEXT_FILE, "tokenizer/tokenizer.json", "text_encoder/config.json"):
        assert weights(tmp_path / "first", file) == weights(tmp_path / "again", file)
    assert weights(tmp_path / "first", TEXT_FILE) != weights(tmp_path / "other", TEXT_FILE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 10}, "vocab_size are the tokenizer's"),
        ({"hiden_size": 10}, "no hiden_size"),
        ({"num_attention_heads": 3}, "components.text_encoder"),
    ],
)
def test_unsuitable_text_encoders_are_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        fit_text_encoder(TARGETS, settings(text_encoder={**TEXT, **changes}), tmp_path)
    assert not any(tmp_path.iterdir())


def test_captions_need_targets(tmp_path):
    for bad in ({}, {"a one left of a two": (1, 2), "a two": (2,)}):
        with pytest.raises(UserError, match="targets"):
            fit_text_encoder(bad, settings(), tmp_path)


NETWORK = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 32}
TEACHER = {"kind": "diffusers", "network": NETWORK, "latent_factor": 2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_factor": 8}, "latent_factor is 8"),
        ({"latent_channels": 8}, "latent_channels is 8"),
        ({"network": {**NETWORK, "out_channels": 8}}, "network.out_channels is 8"),
        ({"network": {**NETWORK, "cross_attention_dim": 64}}, "cross_attention_dim is 64"),
    ],
)
def test_parts_of_a_teacher_must_fit_together(changes, words):
    training = {"iterations": 1, "batch_size": 2, "components": settings().model_dump()}
    config.DiffusersTeacherConfig.model_validate({**TEACHER, "training": training})
    config.DiffusersTeacherConfig.model_validate({**TEACHER, **changes})  # components come from a folder
    with pytest.raises(ValidationError, match=words):
        config.DiffusersTeacherConfig.model_validate({**TEACHER, "training": training, **changes})
