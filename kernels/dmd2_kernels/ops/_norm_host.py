# mypy: allow-untyped-defs
"""What the host functions of GroupNorm+SiLU share: what is added before the norm, and gradients of parameters.

Shapes: B samples, C channels.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ._launch import launch, tl_accumulation
from ._norm_math import sum_over_batch, sum_rows


class Summands(NamedTuple):
    """What is added to x before the norm, and the factor of a sum with a residual; see `_norm_math.summand`."""

    channel_bias: Tensor | None = None  # (C,) or (B, C)
    residual: Tensor | None = None  # in x's shape, dtype and memory order
    scale: float = 1.0


NOTHING_ADDED = Summands()


def bias_stride(channel_bias: Tensor | None) -> int:
    """Elements from one sample's biases to the next's: 0 for (C,)."""
    return 0 if channel_bias is None or channel_bias.ndim == 1 else channel_bias.shape[1]


class Gradients(NamedTuple):
    """The gradients of one call; that of x is also the residual's. Absent inputs have None."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None
    channel_bias: Tensor | None


class Upstream(NamedTuple):
    """What backward knows of the summands: x is the sum itself if there was a residual."""

    channel_bias: Tensor | None = None  # (C,) or (B, C)
    total: bool = False  # whether x is the sum
    d_total: Tensor | None = None  # the gradient of the sum's other uses
    scale: float = 1.0


NOTHING_ABOVE = Upstream()


def parameter_gradients(
    sums: Tensor, weight: Tensor, bias: Tensor, channel_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dweight, dbias (C,) and dchannel_bias from the per-sample sums (2 or 3, B, C), in one launch."""
    d_weight, d_bias, d_channel_bias = torch.empty_like(weight), torch.empty_like(bias), None
    num_sums, num_samples, num_channels = sums.shape
    if channel_bias is not None and channel_bias.ndim == 1 and num_sums == 3:
        d_channel_bias = torch.empty_like(channel_bias)
    launch(
        sum_over_batch, triton.cdiv(num_channels, 64), sums, d_weight, d_bias, d_channel_bias, num_samples,
        num_channels, ROWS=16, BLOCK=64, ACC=tl_accumulation(sums), num_warps=4,
    )  # fmt: skip
    if channel_bias is not None and channel_bias.ndim == 2 and num_sums == 3:
        d_channel_bias = sums[2].to(channel_bias.dtype)
    return d_weight, d_bias, d_channel_bias


def bias_gradient(partial: Tensor, channel_bias: Tensor) -> Tensor:
    """dchannel_bias from the sums (B, K, C) over each of K blocks of pixels, in one launch."""
    d_channel_bias = torch.empty_like(channel_bias)
    num_samples, blocks, num_channels = partial.shape
    outputs, rows = (1, num_samples * blocks) if channel_bias.ndim == 1 else (num_samples, blocks)
    channel_blocks = triton.cdiv(num_channels, 16)
    launch(
        sum_rows, outputs * channel_blocks, partial, d_channel_bias, rows, num_channels, channel_blocks, ROWS=64,
        BLOCK=16, ACC=tl_accumulation(partial), num_warps=4,
    )  # fmt: skip
    return d_channel_bias
