"""The DDPM++ U-Net against a key list and a second writing of its formulas, and its way from a pickle to a teacher."""

from pathlib import Path

import ddpmpp_by_hand
import pytest
import torch
from edm_by_hand import distance, randomised
from edm_pickles import edm_pickle
from torch import Tensor, nn

from dmd2 import config
from dmd2.teachers import load_teacher
from dmd2.teachers.ddpmpp_unet import DDPMPlusPlus
from dmd2.teachers.edm import EDMDenoiser, build_denoiser
from dmd2.teachers.edm_blocks import Block
from dmd2.teachers.edm_layers import DDPMPP

KEYS = Path(__file__).parents[1] / "data" / "ddpmpp32_keys.txt"
CIFAR10 = config.Network(
    arch="ddpmpp", model_channels=128, channel_mult=(2, 2, 2), num_blocks=4, attn_resolutions=(16,), augment_dim=9
)
SMALL = config.Network(
    arch="ddpmpp", model_channels=8, channel_mult=(2, 1, 3), num_blocks=2, attn_resolutions=(8,), augment_dim=9
)
DATA = config.Data(source="cifar10", resolution=16, num_classes=5)


def small_unet() -> DDPMPlusPlus:
    return randomised(DDPMPlusPlus(SMALL, resolution=16, num_channels=3, num_classes=5))


def inputs(num: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 3, 16, 16, generator=rng)
    return x, torch.randn(num, generator=rng), torch.randint(5, (num,), generator=rng)


def full_size() -> EDMDenoiser:
    with torch.device("meta"):
        return build_denoiser(
            config.TeacherConfig(kind="edm", network=CIFAR10),
            config.Data(source="cifar10", resolution=32, num_classes=10),
        )


def test_full_size_state_dict_has_the_names_and_shapes_of_the_definition():
    found = [
        f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        for name, value in full_size().state_dict().items()
    ]
    assert sorted(found) == sorted(KEYS.read_text().splitlines())
    assert len(found) == 427


def test_full_size_has_edms_55_7_million_parameters_of_which_the_augmentations_are_fixed():
    network = full_size()
    trained = sum(p.numel() for p in network.parameters())
    assert trained + network.model.map_augment.weight.numel() == 55_735_299
    assert trained == 55_735_299 - 9 * 128
    assert network.feature_shapes == ((256, 8, 8), (256, 16, 16), (256, 32, 32))


@pytest.mark.parametrize(
    ("name", "num_in", "num_out", "options"),
    [
        ("enc.8x8_block1", 16, 16, {}),
        ("enc.8x8_block0", 12, 16, {}),
        ("enc.8x8_block0", 12, 16, {"num_heads": 1}),
        ("enc.8x8_down", 16, 16, {"resampling": "down"}),
        ("dec.8x8_up", 16, 16, {"resampling": "up"}),
    ],
)
def test_each_kind_of_block_equals_its_formula(name: str, num_in: int, num_out: int, options: dict):
    block = randomised(Block(num_in, num_out, 24, style=DDPMPP, **options))
    x, emb = torch.randn(2, num_in, 8, 8), torch.randn(2, 24)
    state = {f"{name}.{key}": value.double() for key, value in block.state_dict().items()}
    truth = ddpmpp_by_hand.block(state, name, x.double(), emb.double())
    assert distance(block(x, emb), truth) < 1e-5


def test_output_and_taps_equal_the_formulas_of_the_whole_network():
    unet = small_unet()
    x, noise, label = inputs(3)
    out, outputs = ddpmpp_by_hand.unet(unet.state_dict(), x, noise, label)
    encoding = unet.encode(x, noise, label)
    assert distance(unet.decode(encoding), out) < 1e-5
    for found, truth in zip(unet.levels(encoding), [outputs[8], outputs[5], outputs[2]], strict=True):
        assert distance(found, truth) < 1e-5
    assert unet.feature_shapes == ((24, 4, 4), (8, 8, 8), (16, 16, 16))


def test_gradients_equal_those_of_the_formulas():
    unet = small_unet()
    x, noise, label = inputs(2)
    state = {name: value.detach().double().requires_grad_() for name, value in unet.state_dict().items()}
    ddpmpp_by_hand.unet(state, x, noise, label)[0].square().sum().backward()
    unet(x, noise, label).square().sum().backward()
    for name, parameter in unet.named_parameters():
        assert distance(parameter.grad, state[name].grad) < 1e-4, name


def test_attention_is_where_edm_has_it():
    attending = [name for part in ("enc", "dec") for name in with_attention(getattr(full_size().model, part))]
    encoder = [f"16x16_block{i}" for i in range(4)]
    assert attending == [*encoder, "8x8_in0", "16x16_block4"]


def with_attention(part: nn.ModuleDict) -> list[str]:
    return [name for name, block in part.items() if isinstance(block, Block) and block.num_heads]


def test_initial_network_is_nearly_silent_and_its_biases_are_zero():
    unet = DDPMPlusPlus(SMALL, resolution=16, num_channels=3, num_classes=5)
    unet.reset(torch.Generator().manual_seed(0))
    assert 0 < float(unet(*inputs(2)).detach().abs().max()) < 1e-3
    bound = (6 / (9 * 8 + 9 * 16)) ** 0.5  # xavier_uniform of a 3x3 convolution from 8 to 16 channels
    assert 0.95 * bound < float(unet.enc["16x16_block0"].conv0.weight.detach().abs().max()) <= bound
    bound = (0.2 * 6 / (8 + 24)) ** 0.5
    assert 0.8 * bound < float(unet.enc["8x8_block1"].qkv.weight.detach().abs().max()) <= bound
    assert not any(p.any() for name, p in unet.named_parameters() if name.endswith("bias"))
    assert not unet.map_augment.weight.any()


def test_pickle_of_edms_format_becomes_a_teacher_with_the_same_outputs(tmp_path: Path):
    teacher = config.TeacherConfig(kind="edm", network=SMALL)
    source = randomised(load_teacher(teacher, DATA).denoiser)
    path = tmp_path / "edm-cifar10.pkl"
    path.write_bytes(edm_pickle(source))
    loaded = load_teacher(teacher, DATA, path).denoiser
    (x, _, label), sigma = inputs(2), torch.tensor([0.1, 30.0])
    assert torch.equal(loaded(x, sigma, {"label": label}), source(x, sigma, {"label": label}))


def test_precision_is_that_of_the_preconditioned_network():
    denoiser = EDMDenoiser(small_unet(), (3, 16, 16), 0.5)
    (x, _, label), sigma = inputs(4), torch.tensor([0.1, 1.0, 5.0, 30.0])
    truth = denoiser(x, sigma, {"label": label})
    denoiser.precision = "bf16"
    x0 = denoiser(x, sigma, {"label": label})
    assert x0.dtype == torch.float32
    assert 0 < distance(x0, truth) < 0.03
