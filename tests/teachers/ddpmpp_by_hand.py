"""EDM's DDPM++ network written a second time, plainly and in float64, from its formulas and state-dict names.

As in `edm_by_hand`, nothing is shared with `dmd2.teachers`: one head of attention by einsum and softmax, one-hot labels
through a linear layer, sums scaled by sqrt(1/2) where they stand.
"""

import math

import torch
import torch.nn.functional as F
from edm_by_hand import conv, linear, module_names, num_groups
from torch import Tensor


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, num_groups(x.shape[1]), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def attention(state: dict[str, Tensor], name: str, h: Tensor) -> Tensor:
    batch, channels, height, width = h.shape
    qkv = conv(state, f"{name}.qkv", norm(state, f"{name}.norm2", h)).reshape(batch, channels, 3, height * width)
    q, k, v = (qkv[:, :, i] for i in range(3))
    weight = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(channels)).softmax(2)
    return conv(state, f"{name}.proj", torch.einsum("bqk,bck->bcq", weight, v).reshape(h.shape))


def block(state: dict[str, Tensor], name: str, x: Tensor, emb: Tensor) -> Tensor:
    h = conv(state, f"{name}.conv0", F.silu(norm(state, f"{name}.norm0", x)))
    h = F.silu(norm(state, f"{name}.norm1", h + linear(state, f"{name}.affine", emb)[:, :, None, None]))
    h = (conv(state, f"{name}.conv1", h) + conv(state, f"{name}.skip", x)) * math.sqrt(0.5)
    if f"{name}.qkv.weight" in state:
        h = (attention(state, name, h) + h) * math.sqrt(0.5)
    return h


def embedding(state: dict[str, Tensor], noise: Tensor, label: Tensor) -> Tensor:
    half = state["map_layer0.weight"].shape[1] // 2
    angles = noise[:, None] * torch.tensor([(1 / 10_000) ** (i / (half - 1)) for i in range(half)], dtype=noise.dtype)
    cosines_first = torch.cat([angles.cos(), angles.sin()], 1)
    emb = cosines_first.reshape(len(noise), 2, half).flip(1).reshape(len(noise), 2 * half)
    num_classes = state["map_label.weight"].shape[1]
    one_hot = F.one_hot(label, num_classes).to(noise.dtype)
    emb = emb + linear(state, "map_label", one_hot * math.sqrt(num_classes))
    return F.silu(linear(state, "map_layer1", F.silu(linear(state, "map_layer0", emb))))


def unet(state: dict[str, Tensor], x: Tensor, noise: Tensor, label: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(output, every encoder module's output) in float64."""
    state = {name: value.double() for name, value in state.items()}
    x, emb = x.double(), embedding(state, noise.double(), label)
    finest = f"dec.{x.shape[2]}x{x.shape[3]}_aux"
    outputs = []
    for name in module_names(state, "enc"):
        x = conv(state, name, x) if name.endswith("conv") else block(state, name, x, emb)
        outputs.append(x)
    skips = list(outputs)
    for name in module_names(state, "dec"):
        if name == finest:
            break
        if "_block" in name:
            x = torch.cat([x, skips.pop()], 1)
        x = block(state, name, x, emb)
    return conv(state, f"{finest}_conv", F.silu(norm(state, f"{finest}_norm", x))), outputs
