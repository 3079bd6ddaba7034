"""The U-Net against EDM's published key list and against a second writing of its formulas."""

from pathlib import Path
from typing import Any

import edm_by_hand
import pytest
import torch
from edm_by_hand import distance, randomised
from torch import Tensor, nn

from dmd2 import config
from dmd2.errors import UserError
from dmd2.teachers.edm import build_denoiser
from dmd2.teachers.edm_blocks import Block
from dmd2.teachers.edm_layers import num_groups
from dmd2.teachers.edm_unet import UNet

ADM64_KEYS = Path(__file__).parents[1] / "data" / "adm64_keys.txt"
SMALL = config.Network(
    model_channels=8, channel_mult=(1, 2, 3), num_blocks=2, attn_resolutions=(8, 4), channels_per_head=8
)


def small_unet() -> UNet:
    return randomised(UNet(SMALL, resolution=16, num_channels=3, num_classes=5))


def inputs(num: int, seed: int = 1, resolution: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 3, resolution, resolution, generator=rng)
    return x, torch.randn(num, generator=rng), torch.randint(5, (num,), generator=rng)


def full_size() -> nn.Module:
    data = config.Data(source="imagenet", resolution=64, num_classes=1000)
    with torch.device("meta"):
        return build_denoiser(config.TeacherConfig(kind="edm"), data)


def test_full_size_state_dict_is_that_of_the_published_network():
    expected = ADM64_KEYS.read_text().splitlines()
    found = [
        f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        for name, value in full_size().state_dict().items()
    ]
    assert found == expected
    assert len(found) == 553


def test_full_size_parameter_counts_are_the_published_ones():
    network = full_size()
    assert sum(p.numel() for p in network.parameters()) == 295_899_267
    assert sum(p.numel() for p in network.model.enc.parameters()) == 90_298_560
    assert network.feature_shapes == ((768, 8, 8), (576, 16, 16), (384, 32, 32), (192, 64, 64))


@pytest.mark.parametrize(("channels", "groups"), [(192, 32), (1344, 32), (16, 4), (48, 12), (144, 24), (2, 1), (20, 5)])
def test_num_groups_is_edms_or_the_largest_divisor_below(channels: int, groups: int):
    assert num_groups(channels) == groups


@pytest.mark.parametrize(
    ("name", "num_in", "num_out", "options"),
    [
        ("enc.8x8_block1", 16, 16, {}),
        ("enc.8x8_block0", 12, 16, {}),
        ("enc.8x8_block0", 12, 16, {"num_heads": 2}),
        ("dec.8x8_in0", 16, 16, {"num_heads": 1}),
        ("enc.8x8_down", 16, 16, {"resampling": "down"}),
        ("dec.8x8_up", 16, 16, {"resampling": "up"}),
    ],
)
def test_each_kind_of_block_equals_its_formula(name: str, num_in: int, num_out: int, options: dict):
    block = randomised(Block(num_in, num_out, 24, **options))
    x, emb = torch.randn(2, num_in, 8, 8), torch.randn(2, 24)
    state = {f"{name}.{key}": value.double() for key, value in block.state_dict().items()}
    per_head = num_out // options.get("num_heads", 1)
    truth = edm_by_hand.block(state, name, x.double(), emb.double(), per_head)
    assert distance(block(x, emb), truth) < 1e-5


SIZES = [  # resolution, then the network; the last has the full one's depth and resolutions
    (16, {"model_channels": 8, "channel_mult": (1, 2, 3), "num_blocks": 2, "attn_resolutions": (8, 4)}),
    (8, {"model_channels": 16, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}),
    (8, {"model_channels": 48, "channel_mult": (2, 1), "num_blocks": 1, "attn_resolutions": (8,)}),
    (64, {"model_channels": 8}),
]


@pytest.mark.parametrize(("resolution", "sizes"), SIZES)
def test_output_and_taps_equal_the_formulas_of_the_whole_network(resolution: int, sizes: dict[str, Any]):
    network = config.Network(channels_per_head=8, **sizes)
    unet = randomised(UNet(network, resolution, num_channels=3, num_classes=5))
    x, noise, label = inputs(2, resolution=resolution)
    out, outputs = edm_by_hand.unet(unet.state_dict(), x, noise, label, channels_per_head=8)
    encoding = unet.encode(x, noise, label)
    assert distance(unet.decode(encoding), out) < 1e-5
    ends = outputs[:: -network.num_blocks - 1]  # of each level, from the coarsest
    for found, truth, shape in zip(unet.levels(encoding), ends, unet.feature_shapes, strict=True):
        assert distance(found, truth) < 1e-5
        assert found.shape[1:] == shape


def test_gradients_equal_those_of_the_formulas():
    unet = small_unet()
    x, noise, label = inputs(2)
    state = {name: value.detach().double().requires_grad_() for name, value in unet.state_dict().items()}
    edm_by_hand.unet(state, x, noise, label, channels_per_head=8)[0].square().sum().backward()
    unet(x, noise, label).square().sum().backward()
    for name, parameter in unet.named_parameters():
        assert distance(parameter.grad, state[name].grad) < 1e-4, name


def test_decoding_reads_the_label_and_the_noise_level():
    unet = small_unet()
    x, noise, label = inputs(2)
    out = unet(x, noise, label)
    assert distance(unet(x, noise + 0.5, label), out) > 1e-3
    assert distance(unet(x, noise, (label + 1) % 5), out) > 1e-3


def test_initial_network_has_edms_ranges_and_outputs_zero():
    unet = UNet(SMALL, resolution=16, num_channels=3, num_classes=5)
    unet.reset(torch.Generator().manual_seed(0))
    weight = unet.enc["16x16_block0"].conv0.weight.detach()
    assert 0.95 / 72**0.5 < float(weight.abs().max()) <= 1 / 72**0.5
    assert float(unet.map_label.weight.detach().std()) == pytest.approx(1, rel=0.15)
    assert not unet.enc["8x8_block0"].proj.weight.any()
    assert not unet(*inputs(2)).any()


def test_dropout_acts_in_training_alone():
    unet = randomised(UNet(SMALL.model_copy(update={"dropout": 0.5}), resolution=16, num_channels=3, num_classes=5))
    args = inputs(2)
    assert distance(unet.train()(*args), unet(*args)) > 1e-3
    assert torch.equal(unet.eval()(*args), unet(*args))


def test_sizes_that_cannot_be_built_are_named():
    with pytest.raises(UserError, match=r"resolution 18 .*multiple of 4"):
        UNet(SMALL, resolution=18, num_channels=3, num_classes=5)
    with pytest.raises(UserError, match="channels_per_head 7 does not divide the 16 channels of a block with"):
        UNet(SMALL.model_copy(update={"channels_per_head": 7}), resolution=16, num_channels=3, num_classes=5)
    with pytest.raises(UserError, match="model_channels 9 is odd"):
        UNet(SMALL.model_copy(update={"model_channels": 9}), resolution=16, num_channels=3, num_classes=5)
