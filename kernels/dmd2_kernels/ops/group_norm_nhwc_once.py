# mypy: allow-untyped-defs
"""GroupNorm + adaptive scale and shift + SiLU in Triton on channels_last memory, for small images: one read, one write.

A program takes all pixels of a run of K neighbouring groups, which stay in registers. K is such that a pixel's share of
the run is whole in 16 bytes, or 32 where that fits: accesses are 128 bits wide and sectors are not fetched twice. What
does not fit is left to `group_norm_nhwc.py`. The formulas are in `_norm_math.py`.

Shapes: B samples, S pixels, C channels, G groups of CG = C / G channels, runs of SPAN = K * CG channels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype
from ._device import exact_div, exact_rsqrt
from ._launch import launch, tl_accumulation
from ._norm_host import (
    NOTHING_ABOVE,
    NOTHING_ADDED,
    Gradients,
    Summands,
    Upstream,
    bias_stride,
    parameter_gradients,
)
from ._norm_math import activate, affine, slope_x, slope_z, store_parameter_sums, summand

FORWARD, BACKWARD = 16_384, 8_192  # padded elements of a tile: larger ones spilled for sm_90, by the check of `aot.py`
SECTOR = 32  # bytes


class Run(NamedTuple):
    """The tile of one program."""

    groups: int  # K
    span: int
    rows: int  # padded pixels
    cols: int  # padded channels
    num_warps: int


def run_of(num_pixels: int, num_groups: int, group_channels: int, itemsize: int, *, backward: bool) -> Run | None:
    """The run of groups of a program, from the shape of a sample only; None if it is too large or not aligned."""
    rows, limit = triton.next_power_of_2(num_pixels), BACKWARD if backward else FORWARD
    for width in (SECTOR, SECTOR // 2):
        for groups in (1, 2, 4, 8):
            span = groups * group_channels
            cols = triton.next_power_of_2(span)
            if num_groups % groups == 0 and span * itemsize % width == 0 and rows * cols <= limit:
                elements = rows * cols
                return Run(groups, span, rows, cols, 4 if elements <= 2048 else 8 if elements <= 4096 else 16)
    return None


@triton.jit
def _tile(
    num_groups, num_pixels, runs, CG: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Of this program: sample, channels, their mask and number of group in the run, offsets and mask of the tile."""
    pid = tl.program_id(0).to(tl.int64)
    b, run = pid // runs, pid % runs
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    inside, channels = cols < SPAN, run * SPAN + cols
    offs = (b * num_pixels + rows[:, None]) * (num_groups * CG) + channels[None, :]
    return b, channels, inside, cols // CG, offs, (rows < num_pixels)[:, None] & inside[None, :]


@triton.jit
def _over_groups(values, group, GROUPS: tl.constexpr):
    """For each channel the sum of `values` (COLS,) over the channels of its group."""
    out = tl.zeros_like(values)
    for k in tl.static_range(GROUPS):
        mine = group == k
        out = tl.where(mine, tl.sum(tl.where(mine, values, 0.0)), out)
    return out


@triton.jit
def _forward(
    x, y, weight, bias, scale, shift, channel_bias, residual, total, mean_out, rstd_out, num_groups, num_pixels,
    bias_stride, runs, EPS: tl.constexpr, CG: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, SILU: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, channels, inside, group, offs, mask = _tile(num_groups, num_pixels, runs, CG, SPAN, ROWS, COLS)
    bias_at = (b * bias_stride + channels)[None, :]
    v = summand(x, channel_bias, residual, offs, bias_at, mask, inside[None, :], SCALE, ACC)
    if total is not None:
        tl.store(total + offs, v.to(total.dtype.element_ty), mask=mask)
    count = tl.zeros((COLS,), ACC) + tl.full((), num_pixels, ACC) * CG
    mean = exact_div(_over_groups(tl.sum(v, 0), group, GROUPS), count, ACC)
    centred = tl.where(mask, v - mean[None, :], 0.0)
    m2 = _over_groups(tl.sum(centred * centred, 0), group, GROUPS)
    rstd = exact_rsqrt(exact_div(m2, count, ACC) + EPS, ACC)
    gain, offset = affine(weight, bias, scale, shift, b, channels, num_groups * CG, inside, ACC)
    out = activate(centred * rstd[None, :] * gain[None, :] + offset[None, :], SILU)
    tl.store(y + offs, out.to(y.dtype.element_ty), mask=mask)
    at, first = b * num_groups + channels // CG, inside & (channels % CG == 0)
    tl.store(mean_out + at, mean, mask=first)
    tl.store(rstd_out + at, rstd, mask=first)


@triton.jit
def _backward(
    dy, x, d_total, mean_in, rstd_in, weight, bias, scale, shift, channel_bias, dx, sums, d_scale, d_shift,
    num_samples, num_groups, num_pixels, bias_stride, runs, CG: tl.constexpr, GROUPS: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SILU: tl.constexpr, SCALE: tl.constexpr,
    BIASED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, channels, inside, group, offs, mask = _tile(num_groups, num_pixels, runs, CG, SPAN, ROWS, COLS)
    num_channels = num_groups * CG
    gain, offset = affine(weight, bias, scale, shift, b, channels, num_channels, inside, ACC)
    at = b * num_groups + channels // CG
    mean = tl.load(mean_in + at, mask=inside, other=0.0).to(ACC)
    rstd = tl.load(rstd_in + at, mask=inside, other=0.0).to(ACC)
    bias_at = (b * bias_stride + channels)[None, :]
    v = summand(x, channel_bias, None, offs, bias_at, mask, inside[None, :], 1.0, ACC)
    xhat = tl.where(mask, (v - mean[None, :]) * rstd[None, :], 0.0)
    slope = tl.load(dy + offs, mask=mask, other=0.0).to(ACC)
    dz = tl.where(mask, slope_z(slope, xhat * gain[None, :] + offset[None, :], SILU), 0.0)
    p1, p2 = tl.sum(dz * xhat, 0), tl.sum(dz, 0)
    count = tl.zeros((COLS,), ACC) + tl.full((), num_pixels, ACC) * CG
    c1 = exact_div(_over_groups(gain * p1, group, GROUPS), count, ACC)
    c2 = exact_div(_over_groups(gain * p2, group, GROUPS), count, ACC)
    out = slope_x(d_total, xhat, dz, gain[None, :], rstd[None, :], c1[None, :], c2[None, :], offs, mask, SCALE, ACC)
    tl.store(dx + offs, out.to(dx.dtype.element_ty), mask=mask)
    store_parameter_sums(
        p1, p2, weight, bias, scale, sums, d_scale, d_shift, b, channels, num_samples, num_channels, inside, ACC
    )
    if BIASED:
        third = tl.full((), 2 * num_samples, tl.int64) * num_channels
        tl.store(sums + third + b * num_channels + channels, tl.sum(tl.where(mask, out, 0.0), 0), mask=inside)


def forward(
    run: Run,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    added: Summands = NOTHING_ADDED,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(y, mean, rstd, total) of a channels_last x (B, C, H, W), in one launch; mean and rstd are (B, G)."""
    group_channels, num_pixels = x.shape[1] // num_groups, x[0, 0].numel()
    runs = num_groups // run.groups
    mean = x.new_empty(len(x), num_groups, dtype=accumulation_dtype(x))
    y, rstd = torch.empty_like(x), torch.empty_like(mean)
    total = None if added.residual is None else torch.empty_like(x)
    launch(
        _forward, len(x) * runs, x, y, weight, bias, scale, shift, added.channel_bias, added.residual, total, mean,
        rstd, num_groups, num_pixels, bias_stride(added.channel_bias), runs, EPS=eps, CG=group_channels,
        GROUPS=run.groups, SPAN=run.span, ROWS=run.rows, COLS=run.cols, SILU=silu, SCALE=added.scale,
        ACC=tl_accumulation(x), num_warps=run.num_warps,
    )  # fmt: skip
    return y, mean, rstd, total


def backward(
    run: Run,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    above: Upstream = NOTHING_ABOVE,
) -> Gradients:
    """The gradients for channels_last dy and x, in two launches."""
    group_channels, num_pixels = x.shape[1] // num_groups, x[0, 0].numel()
    runs, dx, biased = num_groups // run.groups, torch.empty_like(x), above.channel_bias is not None
    sums = mean.new_empty(3 if biased else 2, len(x), x.shape[1])
    d_scale = None if scale is None else torch.empty_like(scale)
    d_shift = None if shift is None else torch.empty_like(shift)
    again = None if above.total else above.channel_bias
    launch(
        _backward, len(x) * runs, dy, x, above.d_total, mean, rstd, weight, bias, scale, shift, again, dx, sums,
        d_scale, d_shift, len(x), num_groups, num_pixels, bias_stride(again), runs, CG=group_channels,
        GROUPS=run.groups, SPAN=run.span, ROWS=run.rows, COLS=run.cols, SILU=silu, SCALE=above.scale, BIASED=biased,
        ACC=tl_accumulation(mean), num_warps=run.num_warps,
    )  # fmt: skip
    d_weight, d_bias, d_channel_bias = parameter_gradients(sums, weight, bias, above.channel_bias)
    return Gradients(dx, d_weight, d_bias, d_scale, d_shift, d_channel_bias)
