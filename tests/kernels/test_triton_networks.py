"""Networks whose biases and additions are folded into the ops equal those of the reference, with all gradients."""

from collections.abc import Callable

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

import dmd2_kernels as dk
from dmd2.method.critic import RealismHead
from dmd2.teachers.diffusers_layers import FusedResnet, replace_layers
from dmd2.teachers.edm_blocks import Block
from dmd2.teachers.edm_layers import ADM, DDPMPP, Conv, Linear


def edm(num_in: int, num_out: int, **settings: object) -> nn.Module:
    block = Block(num_in, num_out, 6, **settings)  # type: ignore[arg-type]
    for module in block.modules():
        if isinstance(module, Conv | Linear):
            module.reset(torch.Generator().manual_seed(0))
    return block


def resnet(num_in: int, num_out: int, **settings: object) -> nn.Module:
    block = ResnetBlock2D(in_channels=num_in, out_channels=num_out, temb_channels=6, groups=2, **settings)  # type: ignore[arg-type]
    names = list(block.state_dict())
    replace_layers(block)
    assert isinstance(block, FusedResnet)
    assert list(block.state_dict()) == names
    return block


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ADM": lambda: edm(8, 8, style=ADM),
    "ADM with attention and a projected skip": lambda: edm(8, 16, style=ADM, num_heads=2),
    "ADM down": lambda: edm(8, 8, style=ADM, resampling="down"),
    "DDPM++ with attention": lambda: edm(8, 8, style=DDPMPP, num_heads=1),
    "DDPM++ up": lambda: edm(8, 16, style=DDPMPP, resampling="up"),
    "diffusers": lambda: resnet(8, 8, output_scale_factor=2.0),
    "diffusers with a shortcut": lambda: resnet(8, 12),
    "diffusers with scale and shift, up": lambda: resnet(8, 8, time_embedding_norm="scale_shift", up=True),
    "realism head": lambda: RealismHead((8, 8, 8)),
}


@pytest.fixture(params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    built = NETWORKS[request.param]().eval()
    with torch.no_grad():
        for p in built.parameters():  # norms and biases too: each must matter
            p += 0.1 * torch.randn_like(p)
    return built


def run(network: nn.Module, x: Tensor, device: str) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    emb = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    network.zero_grad()
    out = network(x) if isinstance(network, RealismHead) else network(x, emb)
    (out * torch.linspace(0.5, 1.5, out.numel(), device=device).reshape(out.shape)).sum().backward()
    grads = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    assert grads.keys() == dict(network.named_parameters()).keys()
    return {"out": out.detach(), "x": x.grad, **({} if emb.grad is None else {"emb": emb.grad}), **grads}


def test_folded_networks_are_the_reference_with_all_gradients(network: nn.Module, device: str) -> None:
    network = network.to(device)
    x = torch.randn(2, 8, 8, 8).to(device)
    with dk.use("reference"):
        expected = run(network, x, device)
    ways = [(torch.contiguous_format, True), (torch.channels_last, True)]
    ways += [(torch.contiguous_format, False)] if isinstance(network, FusedResnet) else []  # the others: as ever
    for layout, fold in ways:
        with dk.use("triton", fold=fold):
            found = run(network, x.contiguous(memory_format=layout), device)
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), (name, layout, fold)
