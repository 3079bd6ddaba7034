"""The denoiser around diffusers' U-Net: equal to the stock network, with taps, half passes and exact predictions."""

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_pipelines import KINDS, LATENT, UNETS, WIDTH, tiny_data, tiny_pipeline, tiny_teacher
from torch import Tensor

from dmd2.errors import UserError
from dmd2.method.critic import Critic
from dmd2.method.denoiser import concat
from dmd2.method.noise import NoiseGrid, add_noise, expand
from dmd2.teachers import load_teacher, outline
from dmd2.teachers.diffusers_unet import DiffusersDenoiser, build_unet, stock_unet
from dmd2.teachers.unet_configs import unet_config
from dmd2_kernels import LinearHead

GRID = NoiseGrid.ddpm()
LEVELS = torch.tensor([0, 249, 399, 999])


def conditions(kind: str, num: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    width = WIDTH if kind == "sd15" else 2 * WIDTH
    cond = {"text": torch.randn(num, 8, width, generator=rng, dtype=dtype)}
    if kind == "sdxl":
        cond["pooled"] = torch.randn(num, WIDTH, generator=rng, dtype=dtype)
        cond["time_ids"] = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(num, 1) + torch.arange(num)[:, None]
    return cond


def stock_arguments(cond: dict[str, Tensor]) -> dict[str, Any]:
    added = {"text_embeds": cond.get("pooled"), "time_ids": cond.get("time_ids")}
    return {"encoder_hidden_states": cond["text"], "added_cond_kwargs": added}


def batch(kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    num = len(LEVELS)
    x0, eps = torch.randn(2, num, *LATENT, generator=torch.Generator().manual_seed(2))
    sigma = GRID.sigmas[LEVELS]
    return add_noise(x0, sigma, eps), sigma, conditions(kind, num)


def raw(denoiser: DiffusersDenoiser, x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, LinearHead]:
    """The network's output with its head."""
    assert not denoiser.predicts_x0
    out, head = denoiser.predict_and_tap(x, sigma, cond, len(x), 0)[0]
    assert head is not None
    return out, head


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def stock(kind: str) -> Any:
    return tiny_pipeline(kind).unet.eval()


@pytest.fixture
def denoiser(stock: Any) -> DiffusersDenoiser:
    return DiffusersDenoiser(copy.deepcopy(stock), GRID.sigmas)


def test_the_raw_output_is_the_stock_networks_bit_for_bit(kind: str, stock: Any, denoiser: DiffusersDenoiser) -> None:
    x, sigma, cond = batch(kind)
    out, head = raw(denoiser, x, sigma, cond)
    scaled = expand((1 + sigma.square()).rsqrt(), x) * x
    expected = stock(scaled, LEVELS, **stock_arguments(cond)).sample
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(denoiser(x, sigma, cond), expand(head.a, x) * x + expand(head.k, x) * out)


def test_names_are_the_networks_own(stock: Any, denoiser: DiffusersDenoiser) -> None:
    assert list(denoiser.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in denoiser.named_parameters()] == [name for name, _ in stock.named_parameters()]


def test_every_condition_changes_the_output(kind: str, denoiser: DiffusersDenoiser) -> None:
    x, sigma, cond = batch(kind)
    out = raw(denoiser, x, sigma, cond)[0]
    for name in cond:
        other = raw(denoiser, x, sigma, {**cond, name: cond[name] + 1})[0]
        assert (other - out).abs().flatten(1).amax(1).min() > 1e-5, name


def test_a_half_pass_taps_what_hooks_see(kind: str, stock: Any, denoiser: DiffusersDenoiser) -> None:
    x, sigma, cond = batch(kind)
    seen: list[Tensor] = []
    network = copy.deepcopy(stock)
    network.mid_block.register_forward_hook(lambda module, args, out: seen.append(out))
    network.down_blocks[0].downsamplers[0].register_forward_hook(lambda module, args, out: seen.insert(0, args[0]))
    network(expand((1 + sigma.square()).rsqrt(), x) * x, LEVELS, **stock_arguments(cond))
    fine, bottleneck = seen
    x0, features = denoiser.denoise_and_tap(x, sigma, cond, 0, 2)
    assert x0.shape == (0, *LATENT)
    assert tuple(tuple(feature.shape[1:]) for feature in features) == denoiser.feature_shapes == ((16, 4, 4), (8, 8, 8))
    torch.testing.assert_close(features[0], bottleneck, rtol=0, atol=0)
    torch.testing.assert_close(features[1], fine, rtol=0, atol=0)


def test_the_decoder_does_not_run_in_a_half_pass(kind: str, denoiser: DiffusersDenoiser) -> None:
    runs: list[str] = []
    denoiser.conv_out.register_forward_hook(lambda *_: runs.append("decoder"))
    denoiser.denoise_and_tap(*batch(kind), 0, 1)
    assert not runs
    denoiser.denoise_and_tap(*batch(kind), 1, 1)
    assert runs == ["decoder"]


def test_some_samples_are_denoised_and_all_are_tapped(kind: str, denoiser: DiffusersDenoiser) -> None:
    """Each sample keeps its own conditions, also where only the first are decoded."""
    x, sigma, cond = batch(kind)
    x0, features = denoiser.denoise_and_tap(x, sigma, cond, 2, 1)
    torch.testing.assert_close(x0, denoiser(x, sigma, cond)[:2])
    for index in range(len(x)):
        part = slice(index, index + 1)
        alone = denoiser.denoise_and_tap(x[part], sigma[part], {k: v[part] for k, v in cond.items()}, 0, 1)[1]
        torch.testing.assert_close(features[0][part], alone[0], rtol=1e-4, atol=1e-5)


def test_a_critic_runs_on_it(kind: str, denoiser: DiffusersDenoiser) -> None:
    x, sigma, cond = batch(kind)
    critic = Critic(denoiser, num_taps=2)
    both = torch.cat([x, x]), torch.cat([sigma, sigma]), concat([cond, cond])
    prediction, logits = critic(*both, num_denoise=4, logits_from=4)
    torch.testing.assert_close(prediction.x0(x), denoiser(x, sigma, cond))
    assert logits is not None
    assert logits.shape == (4, 2)


def test_another_shape_of_latents_is_refused(kind: str, denoiser: DiffusersDenoiser) -> None:
    x, sigma, cond = batch(kind)
    with pytest.raises(ValueError, match=r"expects \(B, 4, 8, 8\)"):
        denoiser(x[..., :4], sigma, cond)


def test_bf16_computes_in_bf16_and_keeps_float32_outside(kind: str, denoiser: DiffusersDenoiser) -> None:
    x, sigma, cond = batch(kind)
    exact, dtypes = denoiser(x, sigma, cond), []
    denoiser.mid_block.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    denoiser.precision = "bf16"
    rounded, features = denoiser.denoise_and_tap(x, sigma, cond, len(x), 1)
    assert dtypes == [torch.bfloat16]
    assert rounded.dtype == features[0].dtype == torch.float32
    error = (rounded - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert 1e-5 < error.max() < 0.1
    rounded.sum().backward()
    assert {p.grad.dtype for p in denoiser.parameters() if p.grad is not None} == {torch.float32}


def test_weights_stored_in_bf16_keep_the_noise_levels_exact(kind: str, denoiser: DiffusersDenoiser) -> None:
    x, sigma, cond = batch(kind)
    limits, rounded = denoiser.limits.clone(), copy.deepcopy(denoiser).store("bf16")
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    assert rounded.limits.dtype == torch.float32
    assert torch.equal(rounded.limits, limits)
    out = rounded(x, sigma, cond)  # computes in float32 with rounded weights
    same = copy.deepcopy(denoiser)
    same.load_state_dict({k: v.bfloat16().float() for k, v in denoiser.state_dict().items()})
    torch.testing.assert_close(out, same(x, sigma, cond), rtol=0, atol=0)


def test_recomputed_blocks_give_the_same_gradients(kind: str, denoiser: DiffusersDenoiser) -> None:
    x, sigma, cond = batch(kind)
    other, runs = copy.deepcopy(denoiser), []
    other.prepare(activation_checkpointing=True)
    for network in (denoiser, other):
        network.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: runs.append(1))
        network(x, sigma, cond).square().sum().backward()
    assert len(runs) == 1 + 2
    assert len(denoiser.blocks()) > 10
    for (name, a), (_, b) in zip(denoiser.named_parameters(), other.named_parameters(), strict=True):
        assert a.grad is not None, name
        assert torch.equal(a.grad, b.grad), name


def test_a_copy_is_independent(denoiser: DiffusersDenoiser) -> None:
    other = copy.deepcopy(denoiser)
    with torch.no_grad():
        other.conv_in.weight.add_(1)
    assert not torch.equal(other.conv_in.weight, denoiser.conv_in.weight)
    assert [type(block) for block in other.blocks()] == [type(block) for block in denoiser.blocks()]


def test_the_stock_network_of_a_denoiser_shares_its_weights(kind: str, stock: Any, denoiser: DiffusersDenoiser) -> None:
    x, _, cond = batch(kind)
    unet = stock_unet(denoiser)
    assert unet.conv_in.weight is denoiser.conv_in.weight
    assert {k: v for k, v in unet.config.items() if k[0] != "_"} == {
        k: v for k, v in stock.config.items() if k[0] != "_"
    }
    arguments = stock_arguments(cond)
    torch.testing.assert_close(
        unet(x, LEVELS, **arguments).sample, stock(x, LEVELS, **arguments).sample, rtol=0, atol=0
    )


def test_a_network_without_a_middle_block_taps_its_last_level() -> None:
    network = UNet2DConditionModel(**UNETS["sd15"], mid_block_type=None)
    denoiser, (x, sigma, cond) = DiffusersDenoiser(copy.deepcopy(network), GRID.sigmas), batch("sd15")
    expected = network(expand((1 + sigma.square()).rsqrt(), x) * x, LEVELS, **stock_arguments(cond)).sample
    assert torch.equal(raw(denoiser, x, sigma, cond)[0], expected)
    assert denoiser.denoise_and_tap(x, sigma, cond, 0)[1][0].shape == (4, 16, 4, 4)


@pytest.mark.parametrize(("name", "count", "keys"), [("sd15", 859_520_964, 686), ("sdxl", 2_567_463_684, 1680)])
def test_public_networks_have_their_published_size(name: str, count: int, keys: int) -> None:
    with torch.device("meta"):
        unet = build_unet(unet_config({"like": name}))
        denoiser = DiffusersDenoiser(unet, torch.ones(1000))
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == count
    assert len(denoiser.state_dict()) == keys
    assert denoiser.feature_shapes[0] == {"sd15": (1280, 8, 8), "sdxl": (1280, 32, 32)}[name]


def test_a_plan_needs_no_memory_for_weights() -> None:
    network = outline(tiny_teacher("sdxl"), tiny_data())
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


def test_weights_depend_on_the_seed_alone() -> None:
    state, first = torch.random.get_rng_state(), load_teacher(tiny_teacher("sd15"), tiny_data(), seed=3).denoiser
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(9)
    second, other = (load_teacher(tiny_teacher("sd15"), tiny_data(), seed=seed).denoiser for seed in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"like": "sd51"}, r"teacher.network.like: no U-Net 'sd51'; did you mean 'sd15'"),
        ({"blok_out_channels": [8, 16]}, "no key 'blok_out_channels'.*did you mean 'block_out_channels'"),
        ({"sample_size": 16}, "sample_size: 16, but images of 16 pixels have latents of 8"),
        ({"block_out_channels": [8, 16, 16]}, "diffusers refuses it"),
        ({"class_embed_type": "timestep"}, "class_embed_type: 'timestep' is not supported"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim: 8 is only supported of an imported run"),
        ({"out_channels": 8}, "in_channels 4 and out_channels 8 must be equal"),
        ({"in_channels": 9}, "latent_channels: 4, but the U-Net has in_channels 9"),
    ],
)
def test_unsuitable_networks_are_refused(keys: dict[str, Any], message: str) -> None:
    teacher = tiny_teacher("sd15")
    teacher = teacher.model_copy(update={"network": {**teacher.network, **keys}})
    with pytest.raises(UserError, match=message):
        load_teacher(teacher, tiny_data())
