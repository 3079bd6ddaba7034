# mypy: allow-untyped-defs
"""GroupNorm + adaptive scale and shift + SiLU in Triton, on NCHW memory, forward and backward.

A group of one sample is contiguous in NCHW and processed by one program. Up to its `budget` it stays in registers, so
that x is read once and y written once (backward: x and dy once, dx once). A larger group is read twice in tiles, the
second time mostly from the L2 cache. The formulas are in `_norm_math.py`; `group_norm_nhwc.py` has channels_last.

x may be a convolution's output without its bias: the bias is added as x is read, and its gradient is summed as dx is
written. With a residual the sum is written as `total`, since it is used elsewhere too; backward then reads the gradient
of those other uses (`d_total`) and dx is that of the sum.

Statistics do not use E[x^2] - E[x]^2, which cancels catastrophically for a large mean: a tile's sum of squares is
computed about the tile's own mean, and tiles are merged by Chan's formula (Chan, Golub, LeVeque 1979),

    delta = mean_t - mean,   n' = n + n_t,   mean += delta n_t / n',   M2 += M2_t + delta^2 n n_t / n'

Shapes: B samples, C channels, G groups of CG = C / G channels, S pixels; a tile is
(CG_P, TILE), with CG_P = 2^ceil(log2 CG).
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
    bias_stride,
    parameter_gradients,
)
from ._norm_math import activate, affine, slope_x, slope_z, store_parameter_sums, summand

PADDED = 32_768  # the largest tile, in padded elements: 64 of them a thread with 16 warps
LOOPED = 4_096  # padded elements of a tile where the group is larger than one


def budget(group_channels: int, itemsize: int, *, backward: bool, added: bool = False) -> int:
    """The maximum elements of a group that fit in registers without spilling; channels' gains need registers too.

    `added`: whether a bias or a residual is added.
    """
    if group_channels <= 8:
        return 16_384 if backward and added else 24_576
    if backward:  # which holds two tiles
        return 16_384
    return 24_576 if itemsize == 2 else 20_480


def tiling(group_channels: int, num_pixels: int, resident: int) -> tuple[int, int, int, int]:
    """(CG_P, TILE, number of tiles, warps) of a group, from its shape and budget only."""
    rows, cols = triton.next_power_of_2(group_channels), triton.next_power_of_2(num_pixels)
    if rows * cols > PADDED or group_channels * num_pixels > resident:
        cols = max(LOOPED // rows, 16)
    elements = rows * cols
    return rows, cols, triton.cdiv(num_pixels, cols), 4 if elements <= 2048 else 8 if elements <= 4096 else 16


@triton.jit
def _tile(num_pixels, t, CG: tl.constexpr, CG_P: tl.constexpr, TILE: tl.constexpr):
    """Offsets in the group and mask of tile t, and how many elements it has."""
    rows, cols = tl.arange(0, CG_P), t * TILE + tl.arange(0, TILE)
    mask = (rows < CG)[:, None] & (cols < num_pixels)[None, :]
    return rows[:, None] * num_pixels + cols[None, :], mask, CG * tl.minimum(num_pixels - t * TILE, TILE)


@triton.jit
def _moments(v, mask, count, ACC: tl.constexpr):
    """Mean of a tile and the sum of squares about it."""
    mean = exact_div(tl.sum(v), count, ACC)
    centred = tl.where(mask, v - mean, 0.0)
    return mean, tl.sum(centred * centred)


@triton.jit
def _normalise(v, mean, rstd, gain, offset, SILU: tl.constexpr):
    return activate((v - mean) * rstd * gain[:, None] + offset[:, None], SILU)


@triton.jit
def _forward(
    x, y, weight, bias, scale, shift, channel_bias, residual, total, mean_out, rstd_out, num_groups, num_pixels,
    bias_stride, EPS: tl.constexpr, CG: tl.constexpr, CG_P: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    SILU: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, g = pid // num_groups, pid % num_groups
    base = pid * CG * num_pixels
    rows = tl.arange(0, CG_P)
    channels, inside = g * CG + rows, rows < CG
    bias_at = (b * bias_stride + channels)[:, None]
    count_all = tl.full((), num_pixels, ACC) * CG
    if TILES == 1:
        offs, mask, _ = _tile(num_pixels, 0, CG, CG_P, TILE)
        v = summand(x, channel_bias, residual, base + offs, bias_at, mask, inside[:, None], SCALE, ACC)
        if total is not None:
            tl.store(total + base + offs, v.to(total.dtype.element_ty), mask=mask)
        mean, m2 = _moments(v, mask, count_all, ACC)
        rstd = exact_rsqrt(exact_div(m2, count_all, ACC) + EPS, ACC)
        gain, offset = affine(weight, bias, scale, shift, b, channels, num_groups * CG, inside, ACC)
        out = _normalise(v, mean, rstd, gain, offset, SILU)
        tl.store(y + base + offs, out.to(y.dtype.element_ty), mask=mask)
    else:
        mean, m2 = tl.full((), 0.0, ACC), tl.full((), 0.0, ACC)
        before = tl.full((), 0.0, ACC)
        for t in range(TILES):
            offs, mask, count = _tile(num_pixels, t, CG, CG_P, TILE)
            v = summand(x, channel_bias, residual, base + offs, bias_at, mask, inside[:, None], SCALE, ACC)
            if total is not None:
                tl.store(total + base + offs, v.to(total.dtype.element_ty), mask=mask)
            tile_mean, tile_m2 = _moments(v, mask, count.to(ACC), ACC)
            share = exact_div(count.to(ACC), before + count.to(ACC), ACC)
            delta = tile_mean - mean
            mean += delta * share
            m2 += tile_m2 + delta * delta * before * share
            before += count.to(ACC)
        rstd = exact_rsqrt(exact_div(m2, count_all, ACC) + EPS, ACC)
        gain, offset = affine(weight, bias, scale, shift, b, channels, num_groups * CG, inside, ACC)
        if total is not None:
            tl.debug_barrier()  # the program's other threads may have written what a thread reads
        for t in range(TILES):
            offs, mask, _ = _tile(num_pixels, t, CG, CG_P, TILE)
            if total is not None:
                v = tl.load(total + base + offs, mask=mask, other=0.0).to(ACC)
            else:
                v = summand(x, channel_bias, None, base + offs, bias_at, mask, inside[:, None], SCALE, ACC)
            out = _normalise(v, mean, rstd, gain, offset, SILU)
            tl.store(y + base + offs, out.to(y.dtype.element_ty), mask=mask)
    tl.store(mean_out + pid, mean)
    tl.store(rstd_out + pid, rstd)


@triton.jit
def _load_slopes(
    dy, x, channel_bias, base, offs, bias_at, mask, bias_mask, mean, rstd, gain, offset, SILU: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """(xhat, dz) of a tile, 0 outside the group."""
    v = summand(x, channel_bias, None, base + offs, bias_at, mask, bias_mask, 1.0, ACC)
    xhat = tl.where(mask, (v - mean) * rstd, 0.0)
    slope = tl.load(dy + base + offs, mask=mask, other=0.0).to(ACC)
    dz = slope_z(slope, xhat * gain[:, None] + offset[:, None], SILU)
    return xhat, tl.where(mask, dz, 0.0)


@triton.jit
def _group_means(p1, p2, gain, total, ACC: tl.constexpr):
    """mean(gain dz xhat) and mean(gain dz) over the group."""
    return exact_div(tl.sum(gain * p1), total, ACC), exact_div(tl.sum(gain * p2), total, ACC)


@triton.jit
def _backward(
    dy, x, d_total, mean_in, rstd_in, weight, bias, scale, shift, channel_bias, dx, sums, d_scale, d_shift,
    num_samples, num_groups, num_pixels, bias_stride, CG: tl.constexpr, CG_P: tl.constexpr, TILE: tl.constexpr,
    TILES: tl.constexpr, SILU: tl.constexpr, SCALE: tl.constexpr, BIASED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, g = pid // num_groups, pid % num_groups
    base = pid * CG * num_pixels
    rows = tl.arange(0, CG_P)
    channels, channel_mask = g * CG + rows, rows < CG
    gain, offset = affine(weight, bias, scale, shift, b, channels, num_groups * CG, channel_mask, ACC)
    mean, rstd = tl.load(mean_in + pid).to(ACC), tl.load(rstd_in + pid).to(ACC)
    bias_at, bias_mask = (b * bias_stride + channels)[:, None], channel_mask[:, None]
    total, p3 = tl.full((), num_pixels, ACC) * CG, tl.zeros((CG_P,), ACC)
    if TILES == 1:
        offs, mask, _ = _tile(num_pixels, 0, CG, CG_P, TILE)
        xhat, dz = _load_slopes(
            dy, x, channel_bias, base, offs, bias_at, mask, bias_mask, mean, rstd, gain, offset, SILU, ACC
        )
        p1, p2 = tl.sum(dz * xhat, 1), tl.sum(dz, 1)
        c1, c2 = _group_means(p1, p2, gain, total, ACC)
        out = slope_x(d_total, xhat, dz, gain[:, None], rstd, c1, c2, base + offs, mask, SCALE, ACC)
        if BIASED:
            p3 = tl.sum(tl.where(mask, out, 0.0), 1)
        tl.store(dx + base + offs, out.to(dx.dtype.element_ty), mask=mask)
    else:
        p1, p2 = tl.zeros((CG_P,), ACC), tl.zeros((CG_P,), ACC)
        for t in range(TILES):
            offs, mask, _ = _tile(num_pixels, t, CG, CG_P, TILE)
            xhat, dz = _load_slopes(
                dy, x, channel_bias, base, offs, bias_at, mask, bias_mask, mean, rstd, gain, offset, SILU, ACC
            )
            p1 += tl.sum(dz * xhat, 1)
            p2 += tl.sum(dz, 1)
        c1, c2 = _group_means(p1, p2, gain, total, ACC)
        for t in range(TILES):
            offs, mask, _ = _tile(num_pixels, t, CG, CG_P, TILE)
            xhat, dz = _load_slopes(
                dy, x, channel_bias, base, offs, bias_at, mask, bias_mask, mean, rstd, gain, offset, SILU, ACC
            )
            out = slope_x(d_total, xhat, dz, gain[:, None], rstd, c1, c2, base + offs, mask, SCALE, ACC)
            if BIASED:
                p3 += tl.sum(tl.where(mask, out, 0.0), 1)
            tl.store(dx + base + offs, out.to(dx.dtype.element_ty), mask=mask)
    store_parameter_sums(
        p1, p2, weight, bias, scale, sums, d_scale, d_shift, b, channels, num_samples, num_groups * CG, channel_mask,
        ACC,
    )  # fmt: skip
    if BIASED:
        third = tl.full((), 2 * num_samples, tl.int64) * num_groups * CG
        tl.store(sums + third + b * num_groups * CG + channels, p3, mask=channel_mask)


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
    """(y, mean, rstd, total) of a contiguous x (B, C, ...), in one launch; mean and rstd are (B, G).

    `total` is the sum with the residual, in x's shape and dtype, or None without one.
    """
    group_channels, num_pixels = x.shape[1] // num_groups, x[0, 0].numel()
    rows, tile, tiles, num_warps = tiling(
        group_channels, num_pixels, budget(group_channels, x.itemsize, backward=False)
    )
    mean = x.new_empty(len(x), num_groups, dtype=accumulation_dtype(x))
    y, rstd = torch.empty_like(x), torch.empty_like(mean)
    total = None if added.residual is None else torch.empty_like(x)
    launch(
        _forward, mean.numel(), x, y, weight, bias, scale, shift, added.channel_bias, added.residual, total, mean, rstd,
        num_groups, num_pixels, bias_stride(added.channel_bias), EPS=eps, CG=group_channels, CG_P=rows, TILE=tile,
        TILES=tiles, SILU=silu, SCALE=added.scale, ACC=tl_accumulation(x), num_warps=num_warps,
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
    """The gradients for contiguous dy and x, in two launches."""
    group_channels, num_pixels = x.shape[1] // num_groups, x[0, 0].numel()
    dx, biased = torch.empty_like(x), above.channel_bias is not None
    resident = budget(group_channels, x.itemsize, backward=True, added=biased or above.total)
    rows, tile, tiles, num_warps = tiling(group_channels, num_pixels, resident)
    sums = mean.new_empty(3 if biased else 2, len(x), x.shape[1])
    d_scale = None if scale is None else torch.empty_like(scale)
    d_shift = None if shift is None else torch.empty_like(shift)
    added = None if above.total else above.channel_bias
    launch(
        _backward, mean.numel(), dy, x, above.d_total, mean, rstd, weight, bias, scale, shift, added, dx, sums, d_scale,
        d_shift, len(x), num_groups, num_pixels, bias_stride(added), CG=group_channels, CG_P=rows, TILE=tile,
        TILES=tiles, SILU=silu, SCALE=above.scale, BIASED=biased, ACC=tl_accumulation(mean), num_warps=num_warps,
    )  # fmt: skip
    d_weight, d_bias, d_channel_bias = parameter_gradients(sums, weight, bias, above.channel_bias)
    return Gradients(dx, d_weight, d_bias, d_scale, d_shift, d_channel_bias)
