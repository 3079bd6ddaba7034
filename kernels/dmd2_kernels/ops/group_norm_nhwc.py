# mypy: allow-untyped-defs
"""GroupNorm + adaptive scale and shift + SiLU in Triton, on channels_last memory, forward and backward.

In NHWC a group is runs of CG channels with stride C: a program per group would fetch 32-byte sectors for 12 useful
bytes. So tiles span many channels, and a group's statistics are merged from tiles in a second launch:

    forward    moments of (block, channel) -> merged to mean, rstd of (sample, group) -> y        2 reads, 1 write
    backward   P1, P2 of (block, channel)  -> merged to group means, parameter sums   -> dx       4 reads, 1 write

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
from ._norm_math import activate, affine, slope_z, store_parameter_sums
from .group_norm_silu import Gradients, parameter_gradients

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
    x, partial, num_samples, num_pixels, num_channels, blocks, channel_blocks,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    _, row, first, channels, inside, offs, mask = _tile(num_pixels, num_channels, blocks, channel_blocks, ROWS, COLS)
    v = tl.load(x + offs, mask=mask, other=0.0).to(ACC)
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
    x, y, weight, bias, scale, shift, mean, rstd, num_groups, num_pixels, num_channels, blocks, channel_blocks,
    CG: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, _, _, channels, inside, offs, mask = _tile(num_pixels, num_channels, blocks, channel_blocks, ROWS, COLS)
    gain, offset = affine(weight, bias, scale, shift, b, channels, num_channels, inside, ACC)
    m, r = _statistics(mean, rstd, b, channels, inside, num_groups, CG, ACC)
    v = tl.load(x + offs, mask=mask, other=0.0).to(ACC)
    out = activate((v - m) * r * gain[None, :] + offset[None, :], SILU)
    tl.store(y + offs, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _load_slopes(
    dy, x, m, r, gain, offset, offs, mask, SILU: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """(xhat, dz) of a tile, 0 outside the sample."""
    xhat = tl.where(mask, (tl.load(x + offs, mask=mask, other=0.0).to(ACC) - m) * r, 0.0)
    slope = tl.load(dy + offs, mask=mask, other=0.0).to(ACC)
    dz = slope_z(slope, xhat * gain[None, :] + offset[None, :], SILU)
    return xhat, tl.where(mask, dz, 0.0)


@triton.jit
def _slope_sums(
    dy, x, mean, rstd, weight, bias, scale, shift, partial, num_samples, num_groups, num_pixels, num_channels, blocks,
    channel_blocks, CG: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, row, _, channels, inside, offs, mask = _tile(num_pixels, num_channels, blocks, channel_blocks, ROWS, COLS)
    gain, offset = affine(weight, bias, scale, shift, b, channels, num_channels, inside, ACC)
    m, r = _statistics(mean, rstd, b, channels, inside, num_groups, CG, ACC)
    xhat, dz = _load_slopes(dy, x, m, r, gain, offset, offs, mask, SILU, ACC)
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
    dy, x, mean, rstd, weight, bias, scale, shift, means, dx, num_samples, num_groups, num_pixels, num_channels,
    blocks, channel_blocks, CG: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SILU: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    b, _, _, channels, inside, offs, mask = _tile(num_pixels, num_channels, blocks, channel_blocks, ROWS, COLS)
    gain, offset = affine(weight, bias, scale, shift, b, channels, num_channels, inside, ACC)
    m, r = _statistics(mean, rstd, b, channels, inside, num_groups, CG, ACC)
    second = tl.full((), num_samples, tl.int64) * num_groups
    c1, c2 = _statistics(means, means + second, b, channels, inside, num_groups, CG, ACC)
    xhat, dz = _load_slopes(dy, x, m, r, gain, offset, offs, mask, SILU, ACC)
    out = r * (dz * gain[None, :] - c2 - xhat * c1)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of a channels_last x (B, C, H, W), in three launches; mean and rstd are (B, G)."""
    num_samples, num_channels, num_pixels = len(x), x.shape[1], x[0, 0].numel()
    cg, acc = num_channels // num_groups, tl_accumulation(x)
    rows, cols, blocks, channel_blocks = tiling(num_pixels, num_channels)
    grid, sizes = num_samples * blocks * channel_blocks, (num_pixels, num_channels, blocks, channel_blocks)
    mean = x.new_empty(num_samples, num_groups, dtype=accumulation_dtype(x))
    y, rstd = torch.empty_like(x), torch.empty_like(mean)
    partial = mean.new_empty(2, num_samples, blocks, num_channels)
    tile = {"ROWS": rows, "COLS": cols, "ACC": acc, "num_warps": 8}
    launch(_moments, grid, x, partial, num_samples, *sizes, **tile)
    launch(
        _merge_moments, mean.numel(), partial, mean, rstd, num_samples, num_groups, num_pixels, blocks, EPS=eps, CG=cg,
        CG_P=triton.next_power_of_2(cg), ROWS=rows, NUM=MERGE_ROWS, ACC=acc, num_warps=4,
    )  # fmt: skip
    launch(_apply, grid, x, y, weight, bias, scale, shift, mean, rstd, num_groups, *sizes, CG=cg, SILU=silu, **tile)
    return y, mean, rstd


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
) -> Gradients:
    """The gradients wrt. x, weight, bias, scale and shift for channels_last dy and x, in four launches."""
    num_samples, num_channels, num_pixels = len(x), x.shape[1], x[0, 0].numel()
    cg, acc = num_channels // num_groups, tl_accumulation(mean)
    rows, cols, blocks, channel_blocks = tiling(num_pixels, num_channels)
    grid, sizes = num_samples * blocks * channel_blocks, (num_pixels, num_channels, blocks, channel_blocks)
    partial = mean.new_empty(2, num_samples, blocks, num_channels)
    sums, means = mean.new_empty(2, num_samples, num_channels), mean.new_empty(2, num_samples, num_groups)
    dx = torch.empty_like(x)
    d_scale = None if scale is None else torch.empty_like(scale)
    d_shift = None if shift is None else torch.empty_like(shift)
    vectors = (weight, bias, scale, shift)
    tile = {"CG": cg, "ROWS": rows, "COLS": cols, "SILU": silu, "ACC": acc, "num_warps": 8}
    launch(_slope_sums, grid, dy, x, mean, rstd, *vectors, partial, num_samples, num_groups, *sizes, **tile)
    launch(
        _merge_slopes, mean.numel(), partial, *vectors, means, sums, d_scale, d_shift, num_samples, num_groups,
        num_pixels, blocks, CG=cg, CG_P=triton.next_power_of_2(cg), NUM=MERGE_ROWS, ACC=acc, num_warps=4,
    )  # fmt: skip
    launch(_apply_slopes, grid, dy, x, mean, rstd, *vectors, means, dx, num_samples, num_groups, *sizes, **tile)
    return dx, *parameter_gradients(sums, weight, bias), d_scale, d_shift
