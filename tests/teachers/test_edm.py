"""EDM's preconditioning, the tap, precision and weight files."""

import hashlib
from pathlib import Path

import pytest
import torch
from edm_by_hand import distance, randomised
from safetensors.torch import save_file
from torch import Tensor, nn

from dmd2 import config
from dmd2.errors import UserError
from dmd2.method.denoiser import Teacher
from dmd2.method.losses import critic_weight
from dmd2.teachers import load_teacher
from dmd2.teachers.edm import EDMDenoiser
from dmd2.teachers.weights import load_weights

DATA = config.Data(source="digits", resolution=8, channels=1, num_classes=10, levels=17)
NETWORK = config.Network(
    model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8
)
CONFIG = config.TeacherConfig(kind="edm", network=NETWORK)


def network() -> EDMDenoiser:
    return randomised(load_teacher(CONFIG, DATA).copy_network())


def batch(num: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    sigma = torch.exp(torch.randn(num, generator=rng))
    label = torch.randint(10, (num,), generator=rng)
    return sigma.view(-1, 1, 1, 1) * torch.randn(num, 1, 8, 8, generator=rng), sigma, {"label": label}


def test_preconditioning_at_sigma_80_has_edms_values(monkeypatch: pytest.MonkeyPatch):
    denoiser = load_teacher(CONFIG, DATA).denoiser
    x, sigma, cond = torch.full((2, 1, 8, 8), 80.0), torch.full((2,), 80.0), {"label": torch.tensor([0, 1])}
    seen = {}
    encode = denoiser.model.encode

    def spy(scaled: Tensor, noise: Tensor, label: Tensor):
        seen.update(scaled=scaled, noise=noise)
        return encode(scaled, noise, label)

    monkeypatch.setattr(denoiser.model, "encode", spy)
    without_network = denoiser(x, sigma, cond)  # a fresh network's output is zero
    denoiser.model.out_conv.bias.fill_(1.0)
    c_out = denoiser(x, sigma, cond) - without_network
    torch.testing.assert_close(without_network, torch.full_like(x, 80 * 3.9061e-5), rtol=1e-4, atol=0)
    torch.testing.assert_close(c_out, torch.full_like(x, 0.49999), rtol=1e-5, atol=0)
    torch.testing.assert_close(seen["scaled"], torch.full_like(x, 80 * 0.01249976), rtol=1e-6, atol=0)
    torch.testing.assert_close(seen["noise"], torch.full((2,), 1.09551), rtol=1e-5, atol=0)


def test_preconditioning_keeps_the_input_at_small_noise_and_forgets_it_at_large():
    denoiser, (x, _, cond) = network(), batch(3)
    torch.testing.assert_close(denoiser(x, torch.full((3,), 1e-4), cond), x, rtol=1e-3, atol=2e-3)
    far = denoiser(x, torch.full((3,), 1e4), cond)
    torch.testing.assert_close(far, denoiser(torch.zeros_like(x), torch.full((3,), 1e4), cond), rtol=0, atol=1e-3)


def test_loss_weight_undoes_the_output_scale():
    sigma = torch.tensor([0.002, 0.5, 80.0])
    c_out = sigma * 0.5 / (sigma.square() + 0.25).sqrt()
    torch.testing.assert_close(critic_weight(sigma, 0.5), c_out.pow(-2))
    assert float(critic_weight(sigma, 0.5)[0]) == pytest.approx(250_004, rel=1e-5)


def test_tap_is_the_bottleneck_of_the_full_forward_pass():
    denoiser, (x, sigma, cond) = network(), batch(4)
    caught = []
    list(denoiser.model.enc.values())[-1].register_forward_hook(lambda *args: caught.append(args[-1]))
    _, (features,) = denoiser.denoise_and_tap(x, sigma, cond, 4)
    assert torch.equal(features, caught[0])


def test_taps_are_the_last_encoder_blocks_of_each_level_from_the_coarsest():
    denoiser, (x, sigma, cond) = network(), batch(4)
    caught = {}
    for name, block in denoiser.model.enc.items():
        block.register_forward_hook(lambda *args, name=name: caught.update({name: args[-1]}))
    for num_taps in (0, 1, 2):
        _, features = denoiser.denoise_and_tap(x, sigma, cond, 0, num_taps)
        assert len(features) == num_taps
        for feature, name in zip(features, ("4x4_block0", "8x8_block0"), strict=False):
            assert torch.equal(feature, caught[name])
    assert denoiser.feature_shapes == ((16, 4, 4), (8, 8, 8))
    assert [tuple(feature.shape[1:]) for feature in features] == list(denoiser.feature_shapes)


@pytest.mark.parametrize("kind", ["edm", "mixture"])
def test_more_taps_than_levels_are_refused(kind: str):
    denoiser, (x, sigma, cond) = load_teacher(CONFIG.model_copy(update={"kind": kind}), DATA).denoiser, batch(1)
    with pytest.raises(ValueError, match=r"3 taps requested; this network has [12]"):
        denoiser.denoise_and_tap(x, sigma, cond, 0, num_taps=3)


@pytest.mark.parametrize("num_denoise", [0, 1, 3, 5])
def test_denoising_some_and_tapping_all_equals_separate_calls(num_denoise: int):
    denoiser, (x, sigma, cond) = network(), batch(5)
    x0, (features,) = denoiser.denoise_and_tap(x, sigma, cond, num_denoise)
    assert x0.shape == (num_denoise, 1, 8, 8)
    torch.testing.assert_close(x0, denoiser(x, sigma, cond)[:num_denoise], rtol=1e-5, atol=1e-6)
    for i in range(5):
        alone = denoiser.denoise_and_tap(x[i : i + 1], sigma[i : i + 1], {"label": cond["label"][i : i + 1]}, 0)[1][0]
        torch.testing.assert_close(features[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_without_denoising_the_decoder_gets_no_gradient_and_the_encoder_does():
    denoiser, (x, sigma, cond) = network(), batch(2)
    denoiser.denoise_and_tap(x, sigma, cond, 0)[1][0].square().sum().backward()
    assert all(p.grad is None for p in denoiser.model.dec.parameters())
    assert all(p.grad.abs().sum() > 0 for p in denoiser.model.enc.parameters())


def test_gradients_reach_all_parameters_and_the_input():
    denoiser, (x, sigma, cond) = network(), batch(4)
    x.requires_grad_()
    denoiser(x, sigma, cond).square().sum().backward()
    silent = [name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    assert x.grad.abs().sum() > 0


def test_bf16_computes_inside_alone_and_stays_close():
    denoiser, (x, sigma, cond) = network(), batch(4)
    truth, (tap,) = denoiser.denoise_and_tap(x, sigma, cond, 4)
    denoiser.precision = "bf16"
    x0, (features,) = denoiser.denoise_and_tap(x, sigma, cond, 4)
    assert x0.dtype == features.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in denoiser.parameters())
    assert torch.equal(features, features.bfloat16().float())
    assert 0 < distance(x0, truth) < 0.03
    assert 0 < distance(features, tap) < 0.03
    x0.sum().backward()
    assert denoiser.model.out_conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("arch", ["adm", "ddpmpp"])
def test_bf16_is_of_the_blocks_and_not_of_embedding_and_conditioning(arch: str):
    teacher = CONFIG.model_copy(update={"network": NETWORK.model_copy(update={"arch": arch})})
    denoiser, (x, sigma, cond), dtypes = load_teacher(teacher, DATA).denoiser, batch(2), {}
    denoiser.precision = "bf16"
    for name, module in denoiser.model.named_modules():
        module.register_forward_hook(lambda *call, name=name: dtypes.update({name: getattr(call[-1], "dtype", None)}))
    denoiser(x, sigma, cond)
    single = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert single == {name for name in dtypes if name.startswith("map_") or name.endswith("affine")}
    assert dtypes["enc.4x4_block0.qkv"] == torch.bfloat16


def test_wrong_sample_shape_is_refused():
    with pytest.raises(ValueError, match=r"x is \(2, 3, 8, 8\); this denoiser expects \(B, 1, 8, 8\)"):
        network()(torch.zeros(2, 3, 8, 8), torch.ones(2), {"label": torch.tensor([0, 1])})


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


@pytest.mark.parametrize("kind", ["edm", "mixture"])
def test_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone(kind: str):
    teacher = CONFIG.model_copy(update={"kind": kind})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_teacher(teacher, DATA, seed=3).denoiser
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert states_equal(first, load_teacher(teacher, DATA, seed=3).denoiser)
    assert not states_equal(first, load_teacher(teacher, DATA, seed=4).denoiser)


def test_teacher_is_frozen_and_its_copy_is_not():
    teacher = load_teacher(CONFIG, DATA)
    copied = teacher.copy_network()
    assert not teacher.denoiser.training
    assert not any(p.requires_grad for p in teacher.denoiser.parameters())
    assert copied.training
    assert all(p.requires_grad for p in copied.parameters())
    assert states_equal(copied, teacher.denoiser)
    assert teacher.sample_shape == (1, 8, 8)
    assert teacher.grid.init_scale == 80.0


@pytest.mark.parametrize("kind", ["edm", "mixture"])
def test_weights_written_and_read_give_the_same_outputs(kind: str, tmp_path: Path):
    teacher = CONFIG.model_copy(update={"kind": kind})
    source = randomised(load_teacher(teacher, DATA).denoiser)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    loaded = load_teacher(teacher, DATA, tmp_path / "w.safetensors")
    x, sigma, cond = batch(2)
    assert torch.equal(loaded.denoiser(x, sigma, cond), source(x, sigma, cond))


def configured(path: Path, sha256: str | None) -> config.TeacherConfig:
    return config.TeacherConfig(kind="edm", network=NETWORK, weights=config.WeightsFile(path=str(path), sha256=sha256))


def test_configured_file_is_read_and_its_checksum_kept(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    source = randomised(load_teacher(CONFIG, DATA).denoiser)
    save_file(source.state_dict(), path)
    good = hashlib.sha256(path.read_bytes()).hexdigest()
    assert states_equal(load_teacher(configured(path, good), DATA).denoiser, source)
    bad = configured(path, "0" * 64)
    for weights in (None, path):
        with pytest.raises(UserError, match=rf"w.safetensors: its SHA-256 is {good}, expected 0000"):
            load_teacher(bad, DATA, weights)


def test_weights_of_another_network_are_refused_by_name_and_change_nothing(tmp_path: Path):
    denoiser = load_teacher(CONFIG, DATA).denoiser
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    state = {name: value + 0 for name, value in before.items()}
    del state["model.map_layer0.bias"]
    state["model.extra"] = torch.ones(1)
    state["model.out_norm.weight"] = torch.ones(3)
    state["model.enc.4x4_down.skip.resample_filter"] *= 2
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError) as caught:
        load_weights(denoiser, tmp_path / "w.safetensors")
    reported = str(caught.value)
    assert "1 missing: model.map_layer0.bias" in reported
    assert "1 unexpected: model.extra" in reported
    assert "model.out_norm.weight (3,) for (8,)" in reported
    assert "2 mismatching: model.enc.4x4_down.skip.resample_filter is not the 2x2 box filter" in reported
    assert "\n" not in reported
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())


def test_many_wrong_names_are_counted_and_the_first_reported(tmp_path: Path):
    save_file({"other": torch.ones(1)}, tmp_path / "w.safetensors")
    expected = len(load_teacher(CONFIG, DATA).denoiser.state_dict())
    with pytest.raises(UserError, match=rf"{expected} missing: model.map_layer0.weight, .* and {expected - 3} more"):
        load_teacher(CONFIG, DATA, tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "reported"),
    [
        ("w.safetensors", b"\x10\x00", "not a readable safetensors file"),
        ("w.safetensors", b"", "an empty file, not weights"),
        ("w.npz", b"", "unknown kind of weight file"),
        ("w.bin", b"", "an empty file, not weights"),
        ("w.bin", b"PK", "not a state dict of torch.save, or truncated"),
        ("w.pkl", b"", "an empty file, not weights"),
        ("w.pkl", b"\\x80", "not a pickle in EDM's format, or truncated"),
        (None, b"", "no such weight file"),
    ],
)
def test_unreadable_weight_files_are_user_errors(tmp_path: Path, name: str | None, content: bytes, reported: str):
    path = tmp_path / (name or "absent.safetensors")
    if name:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reported):
        load_teacher(CONFIG, DATA, path)


def test_unknown_kind_comes_with_a_suggestion():
    with pytest.raises(UserError, match=r"teacher\.kind: no teacher 'emd'; did you mean 'edm'\?"):
        load_teacher(CONFIG.model_copy(update={"kind": "emd"}), DATA)
    with pytest.raises(UserError, match="known: diffusers, edm, mixture"):
        load_teacher(CONFIG.model_copy(update={"kind": "zzz"}), DATA)


def test_teacher_moves_as_a_whole():
    teacher: Teacher = load_teacher(CONFIG, DATA).to("meta")
    assert teacher.grid.sigmas.device.type == "meta"
    assert {p.device.type for p in teacher.denoiser.parameters()} == {"meta"}
