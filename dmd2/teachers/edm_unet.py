"""The ADM U-Net (Dhariwal and Nichol 2021) in the layout that EDM trains, with EDM's parameter names.

Encoder and decoder are separate calls: DMD2's discriminator wants the encoder's output alone (arXiv 2405.14867,
section 4.3), and a batch may need x0 of some samples and features of all.

Shapes: B batch, C channels, H, W height and width at the block's resolution, N = H * W, E embedding, D channels a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.config import Network
from dmd2.errors import UserError
from dmd2.teachers.edm_layers import Conv, LabelEmbedding, Linear, Resample, Resampling, norm


class Encoding(NamedTuple):
    """What the encoder hands to the decoder, and to a discriminator."""

    skips: list[Tensor]  # outputs (B, C, H, W) of every encoder module, in order
    emb: Tensor  # (B, E), float32

    @property
    def bottleneck(self) -> Tensor:
        """The encoder's output (B, C, H, W), at the lowest resolution."""
        return self.skips[-1]

    def first(self, num: int) -> Encoding:
        """The encoding of the first `num` samples."""
        if num == self.emb.shape[0]:
            return self
        return Encoding([skip[:num] for skip in self.skips], self.emb[:num])


class Block(nn.Module):
    """A residual block, conditioned by a scale and a shift, with self-attention if `num_heads` > 0."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        num_emb: int,
        *,
        num_heads: int = 0,
        resampling: Resampling | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.num_in, self.num_heads, self.dropout = num_in, num_heads, dropout
        self.norm0 = norm(num_in)
        self.conv0 = Conv(num_in, num_out, 3, resampling=resampling)
        self.affine = Linear(num_emb, 2 * num_out)
        self.norm1 = norm(num_out)
        self.conv1 = Conv(num_out, num_out, 3, zero=True)
        self.skip: nn.Module = nn.Identity()
        if num_in != num_out:
            self.skip = Conv(num_in, num_out, 1, resampling=resampling)
        elif resampling:
            self.skip = Resample(resampling)
        if num_heads:
            self.norm2 = norm(num_out, silu=False)
            self.qkv = Conv(num_out, 3 * num_out, 1)
            self.proj = Conv(num_out, num_out, 1, zero=True)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C_in, H, W), (B, E) -> (B, C_out, H', W')."""
        h = self.conv0(self.norm0(x))
        scale, shift = self.affine(emb).chunk(2, dim=1)  # (B, C_out) each
        h = self.norm1(h, scale, shift)
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        h = self.conv1(h) + self.skip(x)
        return h + self._attend(h) if self.num_heads else h

    def _attend(self, h: Tensor) -> Tensor:
        """Self-attention over positions; the channels of `qkv` are laid out as (heads, D, 3)."""
        batch, channels, height, width = h.shape
        qkv = self.qkv(self.norm2(h)).view(batch, self.num_heads, channels // self.num_heads, 3, height * width)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous().unbind(0)  # (B, heads, N, D) each
        a = F.scaled_dot_product_attention(q, k, v)
        return self.proj(a.transpose(2, 3).reshape(h.shape))


class UNet(nn.Module):
    """The network F(x; c_noise, label) of EDM, uninitialised until `reset` or a state dict fills it."""

    def __init__(self, network: Network, resolution: int, num_channels: int, num_classes: int):
        super().__init__()
        _check_size(network, resolution)
        num_emb = network.model_channels * network.channel_mult_emb
        self.num_frequencies = network.model_channels // 2
        self.map_layer0 = Linear(network.model_channels, num_emb)
        self.map_layer1 = Linear(num_emb, num_emb)
        self.map_label = LabelEmbedding(num_classes, num_emb)
        self.enc, widths = _encoder(network, resolution, num_channels, num_emb)
        # The place of each level's last block among the skips, coarsest first; the finest level starts with a conv.
        self._ends = [(level + 1) * (network.num_blocks + 1) - 1 for level in range(len(network.channel_mult))][::-1]
        sizes = [resolution >> level for level in range(len(network.channel_mult))][::-1]
        self.feature_shapes = tuple((widths[i], size, size) for i, size in zip(self._ends, sizes, strict=True))
        self.dec = _decoder(network, resolution, widths, num_emb)
        num_out = network.model_channels * network.channel_mult[0]
        self.out_norm = norm(num_out)
        self.out_conv = Conv(num_out, num_channels, 3, zero=True)

    def reset(self, rng: torch.Generator) -> None:
        """Draws EDM's initial values from `rng`, in the order of the state dict."""
        for module in self.modules():
            if isinstance(module, Linear | LabelEmbedding | Conv):
                module.reset(rng)

    def embed(self, noise: Tensor, label: Tensor) -> Tensor:
        """The conditioning (B, E) in float32 of noise (B,), EDM's c_noise, and label (B,), int64.

        Frequencies are (1 / 10000)^(i / n), i = 0 .. n-1, cosines first (EDM's PositionalEmbedding).
        """
        steps = torch.arange(self.num_frequencies, dtype=torch.float32, device=noise.device)
        angles = torch.outer(noise.float(), torch.exp(steps * (-math.log(10_000) / self.num_frequencies)))
        emb = F.silu(self.map_layer0(torch.cat([angles.cos(), angles.sin()], dim=1)))
        return F.silu(self.map_layer1(emb) + self.map_label(label))

    def encode(self, x: Tensor, noise: Tensor, label: Tensor) -> Encoding:
        """Everything up to the bottleneck, in the dtype of x (B, C, H, W)."""
        emb = self.embed(noise, label)
        skips: list[Tensor] = []
        for module in self.enc.values():
            x = module(x, emb) if isinstance(module, Block) else module(x)
            skips.append(x)
        return Encoding(skips, emb)

    def levels(self, encoding: Encoding) -> list[Tensor]:
        """The output of each level's last block, coarsest first: the shapes are `feature_shapes`."""
        return [encoding.skips[i] for i in self._ends]

    def decode(self, encoding: Encoding) -> Tensor:
        """The output (B, C, H, W) from an encoding; blocks that are wider than x take the next skip."""
        skips, x = list(encoding.skips), encoding.bottleneck
        for block in self.dec.values():
            if x.shape[1] != block.num_in:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, encoding.emb)
        return self.out_conv(self.out_norm(x))

    def forward(self, x: Tensor, noise: Tensor, label: Tensor) -> Tensor:
        """`decode` of `encode`."""
        return self.decode(self.encode(x, noise, label))


def _encoder(network: Network, resolution: int, num_channels: int, num_emb: int) -> tuple[nn.ModuleDict, list[int]]:
    """The encoder's modules by name, and the channels of each one's output."""
    modules: dict[str, nn.Module] = {}
    width, widths = network.model_channels * network.channel_mult[0], []
    for level, mult in enumerate(network.channel_mult):
        size = resolution >> level
        if level == 0:
            modules[f"{size}x{size}_conv"] = Conv(num_channels, width, 3)
        else:
            modules[f"{size}x{size}_down"] = Block(width, width, num_emb, resampling="down", dropout=network.dropout)
        widths.append(width)
        for i in range(network.num_blocks):
            num_in, width = width, network.model_channels * mult
            heads = _heads(network, width, size)
            modules[f"{size}x{size}_block{i}"] = Block(num_in, width, num_emb, num_heads=heads, dropout=network.dropout)
            widths.append(width)
    return nn.ModuleDict(modules), widths


def _decoder(network: Network, resolution: int, widths: list[int], num_emb: int) -> nn.ModuleDict:
    """The decoder's modules by name; `widths` are the channels of the skips."""
    modules: dict[str, nn.Module] = {}
    skips, width, dropout = list(widths), widths[-1], network.dropout
    for level, mult in reversed(list(enumerate(network.channel_mult))):
        size = resolution >> level
        if level == len(network.channel_mult) - 1:
            heads = _heads(network, width, size, always=True)
            modules[f"{size}x{size}_in0"] = Block(width, width, num_emb, num_heads=heads, dropout=dropout)
            modules[f"{size}x{size}_in1"] = Block(width, width, num_emb, dropout=dropout)
        else:
            modules[f"{size}x{size}_up"] = Block(width, width, num_emb, resampling="up", dropout=dropout)
        for i in range(network.num_blocks + 1):
            num_in, width = width + skips.pop(), network.model_channels * mult
            heads = _heads(network, width, size)
            modules[f"{size}x{size}_block{i}"] = Block(num_in, width, num_emb, num_heads=heads, dropout=dropout)
    return nn.ModuleDict(modules)


def _heads(network: Network, width: int, size: int, *, always: bool = False) -> int:
    """Attention heads of a block with `width` channels at resolution `size`; 0 where there is no attention."""
    if not always and size not in network.attn_resolutions:
        return 0
    if width % network.channels_per_head:
        raise UserError(
            f"network.channels_per_head {network.channels_per_head} does not divide the {width} channels at "
            f"{size}x{size}, which has attention; use a divisor of {width}"
        )
    return width // network.channels_per_head


def _check_size(network: Network, resolution: int) -> None:
    factor = 2 ** (len(network.channel_mult) - 1)
    if not network.channel_mult or resolution % factor:
        raise UserError(
            f"data.resolution {resolution} cannot be halved at each of network.channel_mult "
            f"{list(network.channel_mult)}; use a multiple of {factor}, or other levels"
        )
    if network.model_channels % 2:
        raise UserError(f"network.model_channels {network.model_channels} is odd; use an even number")
