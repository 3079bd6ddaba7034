# ruff: noqa: SIM300 (ACC is a constexpr, compared as Triton wants it)
# mypy: allow-untyped-defs
"""Device functions that more than one kernel uses. ACC is the dtype of the arithmetic, float32 or float64."""

import triton
import triton.language as tl


@triton.jit
def exact_div(a, b, ACC: tl.constexpr):
    """a / b rounded to nearest; Triton's own float32 division is off by up to 2 ulp."""
    if ACC == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def exact_rsqrt(a, ACC: tl.constexpr):
    """1 / sqrt(a) with both steps rounded to nearest."""
    if ACC == tl.float32:
        return tl.div_rn(1.0, tl.sqrt_rn(a))
    return 1.0 / tl.sqrt(a)


@triton.jit
def is_nonfinite(v):
    """Whether v is NaN or infinite."""
    return (v != v) | (tl.abs(v) == float("inf"))


@triton.jit
def nan_to_num(v, ACC: tl.constexpr):
    """NaN as 0, infinities as the largest finite number of ACC."""
    largest: tl.constexpr = 3.4028234663852886e38 if ACC == tl.float32 else 1.7976931348623157e308
    v = tl.where(v != v, 0.0, v)
    return tl.minimum(tl.maximum(v, -largest), largest)


@triton.jit
def log1p_unit(t, ACC: tl.constexpr):
    """log(1 + t) for 0 <= t <= 1 to full relative accuracy, where log(1 + t) itself would round a small t away.

    float32: 2 atanh(s) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...), s = t / (2 + t) <= 1 / 3; the next term is below 2^-24.
    float64: log(1 + t) with the rounding of 1 + t put right to first order.
    """
    if ACC == tl.float32:
        s = exact_div(t, 2.0 + t, ACC)
        q = s * s
        series = 1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15)))
        return 2.0 * s * (1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * series))))
    u = 1.0 + t
    return tl.log(u) + (t - (u - 1.0)) / u


@triton.jit
def softplus(v, ACC: tl.constexpr):
    """log(1 + e^v) without overflow."""
    return tl.maximum(v, 0.0) + log1p_unit(tl.exp(-tl.abs(v)), ACC)


@triton.jit
def sigmoid(v, ACC: tl.constexpr):
    """1 / (1 + e^-v), to full relative accuracy in both tails."""
    t = tl.exp(-tl.abs(v))
    return exact_div(tl.where(v >= 0, 1.0, t), 1.0 + t, ACC)
