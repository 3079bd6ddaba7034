# mypy: allow-untyped-defs
"""GroupNorm + adaptive scale and shift + SiLU in Triton, on channels_last memory, forward and backward.

In NHWC a group is runs of CG channels with stride C: a program per group would fetch 32-byte sectors for 12 useful
bytes. So tiles span many channels, and a group's statistics are merged from tiles in a second launch:

    forward    moments of (block, channel) -> merged to mean, rstd of (sample, group) -> y        2 reads, 1 write
    backward   P1, P2 of (block, channel)  -> merged to group means, parameter sums   -> dx       4 reads, 1 write

Groups of small images are read once instead, by `group_norm_nhwc_once.py`. A bias and a residual are added as x is
read, as in `group_norm_silu.py`; the first launch writes their sum.

Moments are computed about each tile's own channel mean and merged in two passes, so that a large mean does not cancel.
The formulas are in `_norm_math.py`.

Shapes: B samples, S pixels, C channels, G groups of CG = C / G channels, K blocks of ROWS pixels.
"""

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
    bias_gradient,
    bias_stride,
    parameter_gradients,
)
from ._norm_math import activate, affine, slope_x, slope_z, store_parameter_sums, summand

MERGE_ROWS = 16


def tiling(num_pixels: int, num_channels: int) -> tuple[int, int, int, int]:
    """(ROWS, COLS, blocks of pixels, blocks of channels), from the shape of a sample only."""
    rows, cols = min(128, triton.next_power_of_2(num_pixels)), min(64, triton.next_power_of_2(num_channels))
    return rows, cols, triton.cdiv(num_pixels, rows), triton.cdiv(num_channels, cols)


@triton.jit
def _tile(num_pixels, num_channels, blocks, channel_blocks, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Of this program: sample, row of the (B * K, C) table, first pixel, channels, their mask, offsets, tile mask."""
    pid = tl.program_id(0).to(tl.int64)
    row, channel_block = pid // channel_blocks, pid % channel_blocks
    b, first = row // blocks, (row % blocks) * ROWS
    rows, channels = tl.arange(0, ROWS), channel_block * COLS + tl.arange(0, COLS)
    channel_mask = channels < num_channels
    mask = (rows < num_pixels - first)[:, None] & channel_mask[None, :]
    offs = (b * num_pixels + first) * num_channels + rows[:, None] * num_channels + channels[None, :]
    return b, row, first, channels, channel_mask, offs, mask


@triton.jit
def _moments(
    x, channel_bias, residual, total, partial, num_samples, bias_stride, num_pixels, num_channels, blocks,
    channel_blocks, ROWS: tl.constexpr, COLS: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, row, first, channels, inside, offs, mask = _tile(num_pixels, num_channels, blocks, channel_blocks, ROWS, COLS)
    bias_at = (b * bias_stride + channels)[None, :]
    v = summand(x, channel_bias, residual, offs, bias_at, mask, inside[None, :], SCALE, ACC)
    if total is not None:
        tl.store(total + offs, v.to(total.dtype.element_ty), mask=mask)
    count = tl.minimum(num_pixels - first, ROWS).to(ACC)
    mean = exact_div(tl.sum(v, 0), tl.zeros((COLS,), ACC) + count, ACC)
    centred = tl.where(mask, v - mean[None, :], 0.0)
    stride = tl.full((), num_samples, tl.int64) * blocks * num_channels  # partial: (2, B, K, C)
    tl.store(partial + row * num_channels + channels, mean, mask=inside)
    tl.store(partial + stride + row * num_channels + channels, tl.sum(centred * centred, 0), mask=inside)


@triton.jit
def _entries(start, b, g, num_channels, blocks, CG: tl.constexpr, CG_P: tl.constexpr, NUM: tl.constexpr):
    """Of NUM blocks of a group: their numbers, and offsets and mask in the (B, K, C) table."""
    k, c = start + tl.arange(0, NUM), tl.arange(0, CG_P)
    mask = (k < blocks)[:, None] & (c < CG)[None, :]
    return k, (b * blocks + k[:, None]) * num_channels + g * CG + c[None, :], mask


@triton.jit
def _merge_moments(
    partial, mean_out, rstd_out, num_samples, num_groups, num_pixels, blocks, EPS: tl.constexpr,
    CG: tl.constexpr, CG_P: tl.constexpr, ROWS: tl.constexpr, NUM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, g = pid // num_groups, pid % num_groups
    stride = tl.full((), num_samples, tl.int64) * blocks * num_groups * CG
    total = tl.full((), num_pixels, ACC) * CG
    means, squares = tl.zeros((NUM, CG_P), ACC), tl.zeros((NUM, CG_P), ACC)
    for start in range(0, blocks, NUM):
        k, offs, mask = _entries(start, b, g, num_groups * CG, blocks, CG, CG_P, NUM)
        share = exact_div(tl.minimum(num_pixels - k * ROWS, ROWS).to(ACC), tl.zeros((NUM,), ACC) + total, ACC)
        means += share[:, None] * tl.load(partial + offs, mask=mask, other=0.0).to(ACC)
    mean = tl.sum(means)
    for start in range(0, blocks, NUM):
        k, offs, mask = _entries(start, b, g, num_groups * CG, blocks, CG, CG_P, NUM)
        count = tl.minimum(num_pixels - k * ROWS, ROWS).to(ACC)
        delta = tl.where(mask, tl.load(partial + offs, mask=mask, other=0.0).to(ACC) - mean, 0.0)
        inner = tl.load(partial + stride + offs, mask=mask, other=0.0).to(ACC)
        squares += inner + count[:, None] * delta * delta
    tl.store(mean_out + pid, mean)
    tl.store(rstd_out + pid, exact_rsqrt(exact_div(tl.sum(squares), total, ACC) + EPS, ACC))


@triton.jit
def _statistics(mean, rstd, b, channels, inside, num_groups, CG: tl.constexpr, ACC: tl.constexpr):
    """mean and rstd of the channels' groups, as rows."""
    at = b * num_groups + channels // CG
    m = tl.load(mean + at, mask=inside, other=0.0).to(ACC)
    return m[None, :], tl.load(rstd + at, mask=inside, other=0.0).to(ACC)[None, :]


@triton.jit
def _apply(
    x, y, weight, bias, scale, shift, channel_bias, mean, rstd, num_groups, bias_stride, num_pixels, num_channels,
    blocks, channel_blocks, CG: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SILU: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    b, _, _, channels, inside, offs, mask = _tile(num_pixels, num_channels, blocks, channel_blocks, ROWS, COLS)
    gain, offset = affine(weight, bias, scale, shift, b, channels, num_channels, inside, ACC)
    m, r = _statistics(mean, rstd, b, channels, inside, num_groups, CG, ACC)
    bias_at = (b * bias_stride + channels)[None, :]
    v = summand(x, channel_bias, None, offs, bias_at, mask, inside[None, :], 1.0, ACC)
    out = activate((v - m) * r * gain[None, :] + offset[None, :], SILU)
    tl.store(y + offs, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _load_slopes(
    dy, x, channel_bias, m, r, gain, offset, offs, bias_at, mask, inside, SILU: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """(xhat, dz) of a tile, 0 outside the sample."""
    v = summand(x, channel_bias, None, offs, bias_at[None, :], mask, inside[None, :], 1.0, ACC)
    xhat = tl.where(mask, (v - m) * r, 0.0)
    slope = tl.load(dy + offs, mask=mask, other=0.0).to(ACC)
    dz = slope_z(slope, xhat * gain[None, :] + offset[None, :], SILU)
    return xhat, tl.where(mask, dz, 0.0)


@triton.jit
def _slope_sums(
    dy, x, mean, rstd, weight, bias, scale, shift, channel_bias, partial, num_samples, num_groups, bias_stride,
    num_pixels, num_channels, blocks, channel_blocks, CG: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, row, _, channels, inside, offs, mask = _tile(num_pixels, num_channels, blocks, channel_blocks, ROWS, COLS)
    gain, offset = affine(weight, bias, scale, shift, b, channels, num_channels, inside, ACC)
    m, r = _statistics(mean, rstd, b, channels, inside, num_groups, CG, ACC)
    xhat, dz = _load_slopes(
        dy, x, channel_bias, m, r, gain, offset, offs, b * bias_stride + channels, mask, inside, SILU, ACC
    )
    stride = tl.full((), num_samples, tl.int64) * blocks * num_channels
    tl.store(partial + row * num_channels + channels, tl.sum(dz * xhat, 0), mask=inside)
    tl.store(partial + stride + row * num_channels + channels, tl.sum(dz, 0), mask=inside)


@triton.jit
def _merge_slopes(
    partial, weight, bias, scale, shift, means, sums, d_scale, d_shift, num_samples, num_groups, num_pixels, blocks,
    CG: tl.constexpr, CG_P: tl.constexpr, NUM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, g = pid // num_groups, pid % num_groups
    num_channels = num_groups * CG
    stride = tl.full((), num_samples, tl.int64) * blocks * num_channels
    first, second = tl.zeros((NUM, CG_P), ACC), tl.zeros((NUM, CG_P), ACC)
    for start in range(0, blocks, NUM):
        _, offs, mask = _entries(start, b, g, num_channels, blocks, CG, CG_P, NUM)
        first += tl.load(partial + offs, mask=mask, other=0.0).to(ACC)
        second += tl.load(partial + stride + offs, mask=mask, other=0.0).to(ACC)
    p1, p2 = tl.sum(first, 0), tl.sum(second, 0)
    rows = tl.arange(0, CG_P)
    channels, inside = g * CG + rows, rows < CG
    gain, _ = affine(weight, bias, scale, shift, b, channels, num_channels, inside, ACC)
    total = tl.full((), num_pixels, ACC) * CG
    tl.store(means + pid, exact_div(tl.sum(gain * p1), total, ACC))  # means: (2, B, G)
    half = tl.full((), num_samples, tl.int64) * num_groups
    tl.store(means + half + pid, exact_div(tl.sum(gain * p2), total, ACC))
    store_parameter_sums(
        p1, p2, weight, bias, scale, sums, d_scale, d_shift, b, channels, num_samples, num_channels, inside, ACC
    )


@triton.jit
def _apply_slopes(
    dy, x, d_total, mean, rstd, weight, bias, scale, shift, channel_bias, means, dx, partial, num_samples, num_groups,
    bias_stride, num_pixels, num_channels, blocks, channel_blocks, CG: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, SILU: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, row, _, channels, inside, offs, mask = _tile(num_pixels, num_channels, blocks, channel_blocks, ROWS, COLS)
    gain, offset = affine(weight, bias, scale, shift, b, channels, num_channels, inside, ACC)
    m, r = _statistics(mean, rstd, b, channels, inside, num_groups, CG, ACC)
    second = tl.full((), num_samples, tl.int64) * num_groups
    c1, c2 = _statistics(means, means + second, b, channels, inside, num_groups, CG, ACC)
    xhat, dz = _load_slopes(
        dy, x, channel_bias, m, r, gain, offset, offs, b * bias_stride + channels, mask, inside, SILU, ACC
    )
    out = slope_x(d_total, xhat, dz, gain[None, :], r, c1, c2, offs, mask, SCALE, ACC)
    if partial is not None:
        tl.store(partial + row * num_channels + channels, tl.sum(tl.where(mask, out, 0.0), 0), mask=inside)
    tl.store(dx + offs, out.to(dx.dtype.element_ty), mask=mask)


def forward(
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
    """(y, mean, rstd, total) of a channels_last x (B, C, H, W), in three launches; mean and rstd are (B, G)."""
    num_samples, num_channels, num_pixels = len(x), x.shape[1], x[0, 0].numel()
    cg, acc = num_channels // num_groups, tl_accumulation(x)
    rows, cols, blocks, channel_blocks = tiling(num_pixels, num_channels)
    grid, sizes = num_samples * blocks * channel_blocks, (num_pixels, num_channels, blocks, channel_blocks)
    mean = x.new_empty(num_samples, num_groups, dtype=accumulation_dtype(x))
    y, rstd = torch.empty_like(x), torch.empty_like(mean)
    total = None if added.residual is None else torch.empty_like(x)
    partial, stride = mean.new_empty(2, num_samples, blocks, num_channels), bias_stride(added.channel_bias)
    tile = {"ROWS": rows, "COLS": cols, "ACC": acc, "num_warps": 8}
    launch(
        _moments, grid, x, added.channel_bias, added.residual, total, partial, num_samples, stride, *sizes,
        SCALE=added.scale, **tile,
    )  # fmt: skip
    launch(
        _merge_moments, mean.numel(), partial, mean, rstd, num_samples, num_groups, num_pixels, blocks, EPS=eps, CG=cg,
        CG_P=triton.next_power_of_2(cg), ROWS=rows, NUM=MERGE_ROWS, ACC=acc, num_warps=4,
    )  # fmt: skip
    read, again = (x, added.channel_bias) if total is None else (total, None)
    launch(
        _apply, grid, read, y, weight, bias, scale, shift, again, mean, rstd, num_groups, stride, *sizes, CG=cg,
        SILU=silu, **tile,
    )  # fmt: skip
    return y, mean, rstd, total


def backward(
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
    """The gradients for channels_last dy and x, in four launches, or five with a channel bias."""
    num_samples, num_channels, num_pixels = len(x), x.shape[1], x[0, 0].numel()
    cg, acc = num_channels // num_groups, tl_accumulation(mean)
    rows, cols, blocks, channel_blocks = tiling(num_pixels, num_channels)
    grid, sizes = num_samples * blocks * channel_blocks, (num_pixels, num_channels, blocks, channel_blocks)
    partial = mean.new_empty(2, num_samples, blocks, num_channels)
    sums, means = mean.new_empty(2, num_samples, num_channels), mean.new_empty(2, num_samples, num_groups)
    dx = torch.empty_like(x)
    d_scale = None if scale is None else torch.empty_like(scale)
    d_shift = None if shift is None else torch.empty_like(shift)
    again = None if above.total else above.channel_bias
    vectors, stride = (weight, bias, scale, shift), bias_stride(again)
    tile = {"CG": cg, "ROWS": rows, "COLS": cols, "SILU": silu, "ACC": acc, "num_warps": 8}
    launch(
        _slope_sums, grid, dy, x, mean, rstd, *vectors, again, partial, num_samples, num_groups, stride, *sizes, **tile
    )
    launch(
        _merge_slopes, mean.numel(), partial, *vectors, means, sums, d_scale, d_shift, num_samples, num_groups,
        num_pixels, blocks, CG=cg, CG_P=triton.next_power_of_2(cg), NUM=MERGE_ROWS, ACC=acc, num_warps=4,
    )  # fmt: skip
    more = above.d_total is not None or above.channel_bias is not None or x.itemsize > 2  # which need registers
    third = None if above.channel_bias is None else partial[0]  # read by now, and written again
    launch(
        _apply_slopes, grid, dy, x, above.d_total, mean, rstd, *vectors, again, means, dx, third, num_samples,
        num_groups, stride, *sizes, SCALE=above.scale, **{**tile, "num_warps": 16 if more else 8},
    )  # fmt: skip
    d_weight, d_bias, _ = parameter_gradients(sums, weight, bias, None)
    d_channel_bias = None
    if third is not None and above.channel_bias is not None:
        d_channel_bias = bias_gradient(third, above.channel_bias)
    return Gradients(dx, d_weight, d_bias, d_scale, d_shift, d_channel_bias)
