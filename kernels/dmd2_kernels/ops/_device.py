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
def log1p_exp(v, ACC: tl.constexpr):
    """log(1 + e^v) for v <= 0: below e^v = 1e-4 by its series, as 1 + e^v would round the small losses away."""
    t = tl.exp(v)
    if ACC == tl.float32:
        return tl.where(t < 1e-4, t * (1.0 - 0.5 * t), tl.log(1.0 + t))
    # float64: log(1 + t) with the rounding of 1 + t put right to first order
    u = 1.0 + t
    return tl.log(u) + (t - (u - 1.0)) / u


@triton.jit
def softplus(v, ACC: tl.constexpr):
    """log(1 + e^v) without overflow."""
    return tl.maximum(v, 0.0) + log1p_exp(-tl.abs(v), ACC)


@triton.jit
def sigmoid(v, ACC: tl.constexpr):
    """1 / (1 + e^-v), to full relative accuracy in both tails."""
    t = tl.exp(-tl.abs(v))
    return exact_div(tl.where(v >= 0, 1.0, t), 1.0 + t, ACC)
