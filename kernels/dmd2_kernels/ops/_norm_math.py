# mypy: allow-untyped-defs
"""The arithmetic of GroupNorm+SiLU on one tile, shared by the NCHW and the channels_last kernels.

    xhat = (x - mean) * rstd,    z = gain * xhat + offset,    y = z * sigmoid(z)
    gain = weight * (1 + scale),    offset = bias * (1 + scale) + shift          plain form: scale = shift = 0

x may be a sum, SCALE * (x + channel_bias + residual): see `summand`. With dz = dy * silu'(z) and the two sums over a
channel's pixels P1 = sum dz * xhat and P2 = sum dz,

    dx     = rstd * (gain * dz - mean(gain * dz) - xhat * mean(gain * dz * xhat))     means over the group, from P1, P2
    dscale = P1 * weight + P2 * bias,    dshift = P2
    dweight = sum_b P1 * (1 + scale),    dbias = sum_b P2 * (1 + scale)
    dchannel_bias = sum of dx over a channel's pixels
"""

import triton
import triton.language as tl


@triton.jit
def affine(weight, bias, scale, shift, b, channels, num_channels, mask, ACC: tl.constexpr):
    """(gain, offset) of some channels of sample b."""
    gain = tl.load(weight + channels, mask=mask, other=0.0).to(ACC)
    offset = tl.load(bias + channels, mask=mask, other=0.0).to(ACC)
    if scale is not None:
        at = b * num_channels + channels
        more = tl.load(scale + at, mask=mask, other=0.0).to(ACC) + 1.0
        gain *= more
        offset = offset * more + tl.load(shift + at, mask=mask, other=0.0).to(ACC)
    return gain, offset


@triton.jit
def summand(x, channel_bias, residual, at, bias_at, mask, bias_mask, SCALE: tl.constexpr, ACC: tl.constexpr):
    """What is normalised at the offsets `at`: x, x + channel_bias, or SCALE * (x + channel_bias + residual).

    A sum with a residual is rounded to x's dtype, since it is stored and used elsewhere. 0 where masked.
    """
    v = tl.load(x + at, mask=mask, other=0.0).to(ACC)
    if channel_bias is not None:
        v = tl.where(mask, v + tl.load(channel_bias + bias_at, mask=bias_mask, other=0.0).to(ACC), 0.0)
    if residual is not None:
        v += tl.load(residual + at, mask=mask, other=0.0).to(ACC)
        v = (v * SCALE).to(x.dtype.element_ty).to(ACC)
    return v


@triton.jit
def fast_sigmoid(z):
    """1 / (1 + e^-z) with Triton's 2-ulp division: the exact one branches and spills in a tile of this size."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def activate(z, SILU: tl.constexpr):
    """silu(z), or z."""
    if SILU:
        z = z * fast_sigmoid(z)
    return z


@triton.jit
def slope_z(dy, z, SILU: tl.constexpr):
    """dz = dy * silu'(z), with silu'(z) = s * (1 + z * (1 - s)), s = sigmoid(z)."""
    if SILU:
        s = fast_sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    return dy


@triton.jit
def slope_x(d_total, xhat, dz, gain, rstd, c1, c2, at, mask, SCALE: tl.constexpr, ACC: tl.constexpr):
    """dx, with the gradient of a sum's other uses if there is one, in which case masked elements mean nothing."""
    out = rstd * (dz * gain - c2 - xhat * c1)
    if d_total is not None:
        return (out + tl.load(d_total + at, mask=mask, other=0.0).to(ACC)) * SCALE
    return tl.where(mask, out * SCALE, 0.0)  # without the mask ptxas spills on sm_100, above with it on sm_90


@triton.jit
def store_parameter_sums(
    p1, p2, weight, bias, scale, sums, d_scale, d_shift, b, channels, num_samples, num_channels, mask, ACC: tl.constexpr
):  # fmt: skip
    """Write one sample's share of dweight and dbias into sums (2, B, C), and dscale and dshift themselves."""
    at = b * num_channels + channels
    q1, q2 = p1, p2
    if scale is not None:
        w = tl.load(weight + channels, mask=mask, other=0.0).to(ACC)
        v = tl.load(bias + channels, mask=mask, other=0.0).to(ACC)
        more = tl.load(scale + at, mask=mask, other=0.0).to(ACC) + 1.0
        tl.store(d_scale + at, (p1 * w + p2 * v).to(d_scale.dtype.element_ty), mask=mask)
        tl.store(d_shift + at, p2.to(d_shift.dtype.element_ty), mask=mask)
        q1, q2 = p1 * more, p2 * more
    tl.store(sums + at, q1, mask=mask)
    tl.store(sums + tl.full((), num_samples, tl.int64) * num_channels + at, q2, mask=mask)


@triton.jit
def sum_over_batch(
    sums, d_weight, d_bias, d_channel_bias, num_samples, num_channels, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dweight, dbias and, if it is wanted, dchannel_bias (C,) from the per-sample sums (2 or 3, B, C), in one order."""
    channels = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < num_channels
    stride = tl.full((), num_samples, tl.int64) * num_channels
    first, second = tl.zeros((ROWS, BLOCK), ACC), tl.zeros((ROWS, BLOCK), ACC)
    for start in range(0, num_samples, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < num_samples)[:, None] & inside[None, :]
        at = rows[:, None] * num_channels + channels[None, :]
        first += tl.load(sums + at, mask=mask, other=0.0).to(ACC)
        second += tl.load(sums + stride + at, mask=mask, other=0.0).to(ACC)
    tl.store(d_weight + channels, tl.sum(first, 0).to(d_weight.dtype.element_ty), mask=inside)
    tl.store(d_bias + channels, tl.sum(second, 0).to(d_bias.dtype.element_ty), mask=inside)
    if d_channel_bias is not None:
        third = tl.zeros((ROWS, BLOCK), ACC)
        for start in range(0, num_samples, ROWS):
            rows = start + tl.arange(0, ROWS).to(tl.int64)
            mask = (rows < num_samples)[:, None] & inside[None, :]
            third += tl.load(
                sums + 2 * stride + rows[:, None] * num_channels + channels[None, :], mask=mask, other=0.0
            ).to(ACC)
        tl.store(d_channel_bias + channels, tl.sum(third, 0).to(d_channel_bias.dtype.element_ty), mask=inside)


@triton.jit
def sum_rows(
    partial, out, num_rows, num_channels, channel_blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """out (O, C) from partial (O, num_rows, C), in one order."""
    pid = tl.program_id(0).to(tl.int64)
    output, channels = pid // channel_blocks, (pid % channel_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < num_channels
    found = tl.zeros((ROWS, BLOCK), ACC)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        at = (output * num_rows + rows[:, None]) * num_channels + channels[None, :]
        found += tl.load(partial + at, mask=(rows < num_rows)[:, None] & inside[None, :], other=0.0).to(ACC)
    tl.store(out + output * num_channels + channels, tl.sum(found, 0).to(out.dtype.element_ty), mask=inside)
