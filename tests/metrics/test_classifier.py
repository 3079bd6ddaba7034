"""The classifier: deterministic, good, and read back strictly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from dmd2 import config
from dmd2.errors import UserError
from dmd2.metrics import load_extractor, train_classifier

DATA = config.Data(source="digits", resolution=8, channels=1, num_classes=10, levels=17)
FEATURES = config.Features(kind="classifier", epochs=1)


def test_held_out_digits_are_recognised(trained, digits):
    facts = trained[1]
    assert facts["held_out_accuracy"] > 0.96
    assert facts["num_train"] + facts["num_held_out"] == len(digits.images)
    assert facts["num_held_out"] == round(0.2 * len(digits.images))


def test_mean_variance_of_the_features_on_the_data_is_one(extractor, digits):
    assert extractor.observe(digits.images).features.var(axis=0, ddof=1).mean() == pytest.approx(1, rel=1e-5)


def test_same_seed_gives_the_same_weights_whatever_the_global_generator_did(digits):
    images, labels = digits.images[:200], digits.labels[:200]
    first, _ = train_classifier(images, labels, FEATURES, DATA)
    torch.rand(7)
    before = torch.get_rng_state()
    again, _ = train_classifier(images, labels, FEATURES, DATA)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    other, _ = train_classifier(images, labels, FEATURES.model_copy(update={"seed": 1}), DATA)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_features_are_the_hidden_layer_before_its_activation(trained, extractor, digits):
    w = {key: value.double() for key, value in trained[0].items()}
    x = torch.from_numpy(digits.images[:3]).permute(0, 3, 1, 2).double() / 127.5 - 1
    for block in ((1, 2), (3, 4)):
        for i in block:
            x = F.silu(F.conv2d(x, w[f"conv{i}.weight"], w[f"conv{i}.bias"], padding=1))
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(4, 5))
    hidden = x.flatten(1) @ w["fc1.weight"].T + w["fc1.bias"]
    np.testing.assert_allclose(extractor.observe(digits.images[:3]).features, (hidden / w["scale"]).numpy(), atol=1e-5)
    logits = F.silu(hidden) @ w["fc2.weight"].T + w["fc2.bias"]
    np.testing.assert_array_equal(extractor.observe(digits.images[:3]).classes, logits.argmax(1).numpy())


def test_weights_read_from_a_file_give_the_same_features(trained, extractor, digits, tmp_path: Path):
    save_file(trained[0], tmp_path / "weights.safetensors")
    loaded = load_extractor(FEATURES, DATA, tmp_path / "weights.safetensors")
    assert (loaded.name, loaded.dim) == ("classifier", 64)
    np.testing.assert_array_equal(
        loaded.observe(digits.images[:300]).features, extractor.observe(digits.images[:300]).features
    )


@pytest.mark.parametrize(("resolution", "channels"), [(9, 1), (16, 3), (30, 3)])
def test_other_sizes_train_too(resolution, channels):
    data = config.Data(source="noise", resolution=resolution, channels=channels, num_classes=2)
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(40, resolution, resolution, channels), dtype=np.uint8)
    state, facts = train_classifier(images, np.arange(40) % 2, FEATURES, data)
    assert facts["num_parameters"] + 1 == sum(value.numel() for value in state.values())


def test_images_of_another_shape_than_the_preset_says_are_refused(digits):
    with pytest.raises(UserError, match=r"data\.resolution and data\.channels require \(16, 16, 1\)"):
        train_classifier(digits.images, digits.labels, FEATURES, DATA.model_copy(update={"resolution": 16}))


def test_label_beyond_the_classes_is_refused(digits):
    with pytest.raises(UserError, match=r"data\.num_classes is 5 but labels reach 9"):
        train_classifier(digits.images, digits.labels, FEATURES, DATA.model_copy(update={"num_classes": 5}))


def test_too_small_images_are_refused():
    data = DATA.model_copy(update={"resolution": 4})
    with pytest.raises(UserError, match=r"data\.resolution 4 is below 8"):
        train_classifier(np.zeros((10, 4, 4, 1), np.uint8), np.zeros(10, np.int64), FEATURES, data)


def test_unknown_extractor_gets_a_suggestion():
    with pytest.raises(UserError, match="no extractor 'inceptoin'; did you mean 'inception'"):
        load_extractor(config.Features(kind="inceptoin"), DATA, None)


def test_missing_damaged_and_foreign_weights_are_named(trained, tmp_path: Path):
    with pytest.raises(UserError, match="needs the weights that the rule `features` writes"):
        load_extractor(FEATURES, DATA, None)
    with pytest.raises(UserError, match=r"gone\.safetensors: no such file"):
        load_extractor(FEATURES, DATA, tmp_path / "gone.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(UserError, match=r"bad\.safetensors: not a safetensors file"):
        load_extractor(FEATURES, DATA, tmp_path / "bad.safetensors")
    save_file(trained[0], tmp_path / "digits.safetensors")
    with pytest.raises(
        UserError, match=r"`fc1\.weight` has shape \(64, 256\), this data's classifier has \(64, 1024\)"
    ):
        load_extractor(FEATURES, DATA.model_copy(update={"resolution": 16}), tmp_path / "digits.safetensors")
