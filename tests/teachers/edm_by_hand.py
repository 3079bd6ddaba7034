"""EDM's ADM network written a second time, plainly and in float64, straight from its formulas and state-dict names.

Nothing here is shared with `dmd2.teachers`: resampling convolves with the box filter, attention is einsum and softmax,
labels are one-hot vectors, norms are torch's.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def num_groups(channels: int) -> int:
    """EDM's groups, lowered to a divisor."""
    groups = max(1, min(32, channels // 4))
    while channels % groups:
        groups -= 1
    return groups


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, num_groups(x.shape[1]), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def conv(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Resampling by depthwise convolution if the name says up or down and a filter is there; then the weight."""
    if f"{name}.resample_filter" in state:
        box = state[f"{name}.resample_filter"].repeat(x.shape[1], 1, 1, 1)
        if "_down" in name:
            x = F.conv2d(x, box, stride=2, groups=x.shape[1])
        else:
            x = F.conv_transpose2d(x, 4 * box, stride=2, groups=x.shape[1])
    if f"{name}.weight" in state:
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)
    return x


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def attention(state: dict[str, Tensor], name: str, h: Tensor, channels_per_head: int) -> Tensor:
    batch, channels, height, width = h.shape
    qkv = conv(state, f"{name}.qkv", norm(state, f"{name}.norm2", h)).reshape(batch, channels, 3, height * width)
    out = torch.empty(batch, channels, height * width, dtype=h.dtype)
    for start in range(0, channels, channels_per_head):
        q, k, v = (qkv[:, start : start + channels_per_head, i] for i in range(3))  # channel (head, c, q|k|v)
        weight = torch.einsum("bcq,bck->bqk", q, k) / channels_per_head**0.5
        out[:, start : start + channels_per_head] = torch.einsum("bqk,bck->bcq", weight.softmax(2), v)
    return conv(state, f"{name}.proj", out.reshape(h.shape))


def block(state: dict[str, Tensor], name: str, x: Tensor, emb: Tensor, channels_per_head: int) -> Tensor:
    h = conv(state, f"{name}.conv0", F.silu(norm(state, f"{name}.norm0", x)))
    affine = linear(state, f"{name}.affine", emb)[:, :, None, None]
    scale, shift = affine[:, : h.shape[1]], affine[:, h.shape[1] :]
    h = F.silu(shift + norm(state, f"{name}.norm1", h) * (1 + scale))
    h = conv(state, f"{name}.conv1", h) + conv(state, f"{name}.skip", x)
    if f"{name}.qkv.weight" in state:
        h = attention(state, name, h, channels_per_head) + h
    return h


def embedding(state: dict[str, Tensor], noise: Tensor, label: Tensor) -> Tensor:
    half = state["map_layer0.weight"].shape[1] // 2
    angles = noise[:, None] * torch.tensor([(1 / 10_000) ** (i / half) for i in range(half)], dtype=noise.dtype)
    emb = F.silu(linear(state, "map_layer0", torch.cat([angles.cos(), angles.sin()], 1)))
    one_hot = F.one_hot(label, state["map_label.weight"].shape[1]).to(noise.dtype)
    return F.silu(linear(state, "map_layer1", emb) + one_hot @ state["map_label.weight"].T)


def module_names(state: dict[str, Tensor], part: str) -> list[str]:
    """`enc.8x8_conv`, `enc.8x8_block0`, ... in the order of the state dict."""
    names = [match[0] for key in state if (match := re.match(rf"{part}\.\d+x\d+_[a-z]+\d*", key))]
    return list(dict.fromkeys(names))


def unet(
    state: dict[str, Tensor], x: Tensor, noise: Tensor, label: Tensor, channels_per_head: int
) -> tuple[Tensor, list[Tensor]]:
    """(output, every encoder module's output) in float64."""
    state = {name: value.double() for name, value in state.items()}
    x, emb = x.double(), embedding(state, noise.double(), label)
    outputs = []
    for name in module_names(state, "enc"):
        x = conv(state, name, x) if name.endswith("conv") else block(state, name, x, emb, channels_per_head)
        outputs.append(x)
    skips = list(outputs)
    for name in module_names(state, "dec"):
        if "_block" in name:
            x = torch.cat([x, skips.pop()], 1)
        x = block(state, name, x, emb, channels_per_head)
    return conv(state, "out_conv", F.silu(norm(state, "out_norm", x))), outputs


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn afresh, so that layers that start at zero or one take part."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 1 / max(1, parameter[0].numel()) ** 0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=rng)
    return module


def distance(found: Tensor, truth: Tensor) -> float:
    """The largest difference over the largest value."""
    assert found.shape == truth.shape
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).abs().max() / truth.abs().max())
