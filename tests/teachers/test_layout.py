"""The networks in channels_last, which a GPU runs them in: the same numbers, and no way back to the plain layout."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from edm_by_hand import distance, randomised
from torch import Tensor, nn

from dmd2 import config
from dmd2.teachers import load_teacher
from dmd2.teachers.ddpmpp_unet import DDPMPlusPlus
from dmd2.teachers.edm_blocks import Block, UNetBase
from dmd2.teachers.edm_layers import Conv, Resample
from dmd2.teachers.edm_unet import UNet
from dmd2_kernels import GroupNormSiLU

SIZES: dict[str, Any] = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
NETWORKS = {"adm": UNet, "ddpmpp": DDPMPlusPlus}


def unet(arch: str) -> UNetBase:
    network = config.Network(arch=arch, channels_per_head=8, **SIZES)
    return randomised(NETWORKS[arch](network, resolution=8, num_channels=3, num_classes=5))


def passed(network: UNetBase, layout: torch.memory_format) -> dict[str, Tensor]:
    """Output, features and all gradients of a pass on an input of that layout."""
    network.zero_grad()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(memory_format=layout).requires_grad_()
    encoding = network.encode(x, torch.tensor([0.3, -1.0]), torch.tensor([1, 4]))
    out = network.decode(encoding)
    (out.square().sum() + encoding.bottleneck.square().sum()).backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    return {"out": out.detach(), "tap": encoding.bottleneck.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("arch", NETWORKS)
def test_network_computes_the_same_in_both_layouts(arch: str):
    network = unet(arch)
    truth, found = passed(network, torch.contiguous_format), passed(network, torch.channels_last)
    assert {name for name in truth if distance(found[name], truth[name]) > 1e-5} == set()
    assert found["tap"].is_contiguous(memory_format=torch.channels_last)
    assert not found["tap"].is_contiguous()


def plain(tensor: Any) -> bool:
    """Whether a tensor of images has another layout than channels_last."""
    if not isinstance(tensor, Tensor) or tensor.ndim != 4:
        return False
    return tensor.shape[1] > 1 and math.prod(tensor.shape[2:]) > 1 and tensor.stride(1) != 1


@pytest.mark.parametrize("arch", NETWORKS)
def test_no_layer_gives_or_is_given_the_plain_layout(arch: str, monkeypatch: pytest.MonkeyPatch):
    network, wrong, convolve = unet(arch), [], F.conv2d

    def forward(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        wrong.extend(f"{name} forward" for tensor in (*inputs, output) if plain(tensor))

    def backward(name: str, grads: tuple[Any, ...]) -> None:
        wrong.extend(f"{name} backward" for tensor in grads if plain(tensor))

    def conv2d(x: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        wrong.extend("weight" for tensor in (x, weight) if plain(tensor))
        return convolve(x, weight, *args, **options)

    monkeypatch.setattr(F, "conv2d", conv2d)
    for name, module in network.named_modules():
        if isinstance(module, Block | Conv | GroupNormSiLU | Resample):
            module.register_forward_hook(lambda _, inputs, output, name=name: forward(name, inputs, output))
            module.register_full_backward_hook(lambda _, given, got, name=name: backward(name, got))
    passed(network, torch.channels_last)
    assert wrong == []


def test_cpu_keeps_the_plain_layout():
    denoiser = denoiser_of("fp32")
    seen = []
    denoiser.model.enc["8x8_block0"].register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    denoiser(torch.ones(2, 3, 8, 8), torch.ones(2), {"label": torch.tensor([0, 1])})
    assert all(tensor.is_contiguous() for tensor in seen)


def denoiser_of(precision: str) -> nn.Module:
    data = config.Data(source="digits", resolution=8, channels=3, num_classes=5)
    teacher = config.TeacherConfig(kind="edm", network=config.Network(channels_per_head=8, **SIZES))
    denoiser = randomised(load_teacher(teacher, data).copy_network().eval())
    denoiser.precision = precision
    return denoiser


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "within"), [("fp32", 2e-3), ("bf16", 3e-2)])  # fp32 by TF32 units
def test_cuda_runs_in_channels_last_and_equals_the_cpu(precision: str, within: float):
    denoiser, seen = denoiser_of(precision), []
    inputs = torch.ones(2, 3, 8, 8), torch.ones(2), {"label": torch.tensor([0, 1])}
    truth = denoiser_of("fp32")(*inputs)
    denoiser.cuda()
    denoiser.model.enc["8x8_block0"].register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    x0 = denoiser(inputs[0].cuda(), inputs[1].cuda(), {"label": inputs[2]["label"].cuda()})
    assert distance(x0.cpu(), truth) < within
    assert not any(plain(tensor) for tensor in seen)
