"""Common to EDM's two U-Nets: the residual block, encoder, decoder and forward passes.

Encoder and decoder are separate calls: DMD2's discriminator needs only the encoder's output (arXiv 2405.14867,
section 4.3), and a batch may need x0 of some samples and features of all.

Shapes: B batch, C channels, (H, W) the block's resolution, N = H * W, E embedding, D channels per head.
"""

from __future__ import annotations

import abc
import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dmd2_kernels as dk
from dmd2.config import Network
from dmd2.errors import UserError
from dmd2.teachers.edm_layers import (
    ADM,
    Conv,
    LabelEmbedding,
    Linear,
    Resample,
    Resampling,
    Style,
    Unused,
    is_channels_last,
    norm,
)


class Encoding(NamedTuple):
    """The encoder's output, input of the decoder and of a discriminator."""

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
    """A residual block conditioned on an embedding, with self-attention if `num_heads` > 0."""

    recompute = False
    """Whether activation checkpointing is on."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        num_emb: int,
        *,
        style: Style = ADM,
        num_heads: int = 0,
        resampling: Resampling | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.num_in, self.num_heads, self.dropout, self.style = num_in, num_heads, dropout, style
        self.norm0 = norm(num_in, style.eps)
        self.conv0 = Conv(num_in, num_out, 3, resampling=resampling, init=style.init)
        self.affine = Linear(num_emb, num_out * (2 if style.adaptive else 1), style.init)
        self.norm1 = norm(num_out, style.eps)
        self.conv1 = Conv(num_out, num_out, 3, init=style.init_last)
        self.skip: nn.Module = nn.Identity()
        if num_in != num_out or (resampling and style.project_resampled):
            self.skip = Conv(num_in, num_out, 1, resampling=resampling, init=style.init)
        elif resampling:
            self.skip = Resample(resampling)
        if num_heads:
            self.norm2 = norm(num_out, style.eps, silu=False)
            self.qkv = Conv(num_out, 3 * num_out, 1, init=style.init_attention)
            self.proj = Conv(num_out, num_out, 1, init=style.init_last)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C_in, H, W), (B, E) -> (B, C_out, H', W')."""
        if self.recompute and torch.is_grad_enabled():
            random = self.training and self.dropout > 0
            out: Tensor = checkpoint(self._forward, x, emb, use_reentrant=False, preserve_rng_state=random)
            return out
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        folds = dk.folds(x)  # each convolution's bias is added by the op that reads its output
        h = self.conv0(self.norm0(x), biased=not folds)
        bias = self.conv0.bias if folds else None
        given = self.affine(emb)  # float32, (B, 2 C_out) or (B, C_out)
        if self.style.adaptive:
            scale, shift = given.chunk(2, dim=1)
            h = self.norm1(h, scale, shift, bias)
        elif bias is not None:
            h = self.norm1(h, channel_bias=given + bias)
        else:
            h = self.norm1(h + given.to(h.dtype)[:, :, None, None])
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        if folds:
            return self._folded_end(h, x)
        h = self._scaled(self.conv1(h) + self.skip(x))
        return self._scaled(h + self.proj(self._attend(self.norm2(h)))) if self.num_heads else h

    def _folded_end(self, h: Tensor, x: Tensor) -> Tensor:
        """The second convolution, skip and attention; biases, additions and scales in one pass of each sum."""
        h, scale = self.conv1(h, biased=False), self.style.skip_scale
        bias: Tensor = self.conv1.bias
        if isinstance(self.skip, Conv):
            residual, bias = self.skip(x, biased=False), bias + self.skip.bias
        else:
            residual = self.skip(x)
        if not self.num_heads:
            return dk.residual_sum(h, residual, bias, scale)
        normed, h = self.norm2.of_sum(h, residual, bias, scale)
        return dk.residual_sum(self.proj(self._attend(normed), biased=False), h, self.proj.bias, scale)

    def _scaled(self, h: Tensor) -> Tensor:
        return h if self.style.skip_scale == 1 else h * self.style.skip_scale

    def _attend(self, h: Tensor) -> Tensor:
        """Self-attention over positions of the normalised input, up to the projection.

        The channels of `qkv` are laid out as (heads, D, 3).

        torch's kernels compute logits and softmax in float32 even if q, k and v are bfloat16. Each memory layout costs
        one copy in and one out, and is preserved in forward and backward.
        """
        batch, channels, height, width = h.shape
        heads, last = (self.num_heads, channels // self.num_heads), is_channels_last(h)
        qkv = self.qkv(h)
        if last:
            split = qkv.permute(0, 2, 3, 1).reshape(batch, height * width, *heads, 3).permute(4, 0, 2, 1, 3)
        else:
            split = qkv.view(batch, *heads, 3, height * width).permute(3, 0, 1, 4, 2)
        q, k, v = split.contiguous().unbind(0)  # (B, heads, N, D) each
        a = F.scaled_dot_product_attention(q, k, v)
        if last:
            return a.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return a.transpose(2, 3).reshape(h.shape)


class MakeBlock(Protocol):
    """Builds one block of a network."""

    def __call__(
        self, num_in: int, num_out: int, *, attention: bool = False, resampling: Resampling | None = None
    ) -> Block: ...


def encoder(
    network: Network, resolution: int, stem: Conv, num_stem: int, make: MakeBlock
) -> tuple[nn.ModuleDict, list[int]]:
    """The encoder's modules by name, and the number of output channels of each; `stem` has `num_stem`."""
    modules: dict[str, nn.Module] = {}
    width, widths = num_stem, []
    for level, mult in enumerate(network.channel_mult):
        size = resolution >> level
        if level == 0:
            modules[f"{size}x{size}_conv"] = stem
        else:
            modules[f"{size}x{size}_down"] = make(width, width, resampling="down")
        widths.append(width)
        for i in range(network.num_blocks):
            num_in, width = width, network.model_channels * mult
            modules[f"{size}x{size}_block{i}"] = make(num_in, width, attention=size in network.attn_resolutions)
            widths.append(width)
    return nn.ModuleDict(modules), widths


def decoder(
    network: Network, resolution: int, widths: list[int], make: MakeBlock, *, attend_last: bool
) -> nn.ModuleDict:
    """The decoder's modules by name; `widths` are the channels of the skips.

    At resolutions with attention every block has it, or with `attend_last` only the last of the level.
    """
    modules: dict[str, nn.Module] = {}
    skips, width = list(widths), widths[-1]
    for level, mult in reversed(list(enumerate(network.channel_mult))):
        size = resolution >> level
        if level == len(network.channel_mult) - 1:
            modules[f"{size}x{size}_in0"] = make(width, width, attention=True)
            modules[f"{size}x{size}_in1"] = make(width, width)
        else:
            modules[f"{size}x{size}_up"] = make(width, width, resampling="up")
        for i in range(network.num_blocks + 1):
            num_in, width = width + skips.pop(), network.model_channels * mult
            attention = size in network.attn_resolutions and (i == network.num_blocks or not attend_last)
            modules[f"{size}x{size}_block{i}"] = make(num_in, width, attention=attention)
    return nn.ModuleDict(modules)


class UNetBase(nn.Module, abc.ABC):
    """The network F(x; c_noise, label) of EDM, uninitialised until `reset` or `load_state_dict`.

    A subclass builds `enc` and `dec` and implements `embed` and `finish`.
    """

    enc: nn.ModuleDict
    dec: nn.ModuleDict
    feature_shapes: tuple[tuple[int, int, int], ...]
    """(C, H, W) of the output of each level's last encoder block, coarsest first."""

    def _set_levels(self, network: Network, resolution: int, widths: list[int]) -> None:
        """Sets `_ends`, each level's last skip, and `feature_shapes`. Levels start with the stem or a down block."""
        levels = range(len(network.channel_mult) - 1, -1, -1)
        self._ends = [(level + 1) * (network.num_blocks + 1) - 1 for level in levels]
        sizes = [resolution >> level for level in levels]
        self.feature_shapes = tuple((widths[i], size, size) for i, size in zip(self._ends, sizes, strict=True))

    @abc.abstractmethod
    def embed(self, noise: Tensor, label: Tensor) -> Tensor:
        """noise (B,), EDM's c_noise, and label (B,) int64 -> conditioning (B, E) float32."""

    @abc.abstractmethod
    def finish(self, x: Tensor) -> Tensor:
        """The output layers, applied to the last block's output."""

    def blocks(self) -> list[nn.Module]:
        """The residual blocks in forward order."""
        return [module for part in (self.enc, self.dec) for module in part.values() if isinstance(module, Block)]

    def reset(self, rng: torch.Generator) -> None:
        """Initialises all weights as EDM does, from `rng`, in the order of the state dict."""
        for module in self.modules():
            if isinstance(module, Linear | LabelEmbedding | Conv | Unused):
                module.reset(rng)

    def encode(self, x: Tensor, noise: Tensor, label: Tensor) -> Encoding:
        """The encoder, in the dtype and memory layout of x (B, C, H, W)."""
        emb = self.embed(noise, label)
        skips: list[Tensor] = []
        for module in self.enc.values():
            x = module(x, emb) if isinstance(module, Block) else module(x)
            skips.append(x)
        return Encoding(skips, emb)

    def levels(self, encoding: Encoding) -> list[Tensor]:
        """The output (B, *feature_shapes[i]) of each level's last block, coarsest first."""
        return [encoding.skips[i] for i in self._ends]

    def decode(self, encoding: Encoding) -> Tensor:
        """The decoder: output (B, C, H, W). Blocks with more input channels than x has concatenate the next skip."""
        skips, x = list(encoding.skips), encoding.bottleneck
        for block in self.dec.values():
            if not isinstance(block, Block):
                break
            if x.shape[1] != block.num_in:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, encoding.emb)
        return self.finish(x)

    def forward(self, x: Tensor, noise: Tensor, label: Tensor) -> Tensor:
        """`decode` of `encode`."""
        return self.decode(self.encode(x, noise, label))


def waves(noise: Tensor, num: int, *, endpoint: bool) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, num) of noise (B,) times (1 / 10000)^(i / n), i = 0 .. num-1 (EDM's PositionalEmbedding).

    n is `num`, or num - 1 with `endpoint`, so that the last frequency is 1 / 10000.
    """
    steps = torch.arange(num, dtype=torch.float32, device=noise.device)
    last = max(1, num - 1) if endpoint else num
    angles = torch.outer(noise.float(), torch.exp(steps * (-math.log(10_000) / last)))
    return angles.cos(), angles.sin()


def check_size(network: Network, resolution: int) -> None:
    """Raises UserError if the resolution cannot be halved at each level, or the channels are odd."""
    factor = 2 ** (len(network.channel_mult) - 1)
    if not network.channel_mult or resolution % factor:
        raise UserError(
            f"data.resolution {resolution} cannot be halved at each of network.channel_mult "
            f"{list(network.channel_mult)}; use a multiple of {factor}, or other levels"
        )
    if network.model_channels % 2:
        raise UserError(f"network.model_channels {network.model_channels} is odd; use an even number")
