# mypy: allow-untyped-defs
"""GroupNorm+SiLU as `torch.ops.dmd2.group_norm_silu`, for NCHW and channels_last memory; see `_library.py`.

A U-Net calls it about a hundred times per pass, and the op's overhead on the host exceeds its kernels' time. So plain
tensors outside torch.compile bypass the dispatcher with an autograd function of the same host functions: `apply`.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ._dispatch import kernels_for
from .reference import accumulation_dtype


def channels_last(x: Tensor) -> bool:
    """Whether x is dense in NHWC order and not in NCHW order."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _dense(x: Tensor) -> Tensor:
    return x if channels_last(x) else x.contiguous()


def like(t: Tensor, x: Tensor) -> Tensor:
    """t in the memory order of x."""
    return t.contiguous(memory_format=torch.channels_last if channels_last(x) else torch.contiguous_format)


def _implementation(kernels: ModuleType, x: Tensor, num_groups: int, *, backward: bool) -> Callable[..., Any]:
    """The host function for x's memory order and size."""
    name = "backward" if backward else "forward"
    if not channels_last(x):
        return getattr(kernels.group_norm_silu, name)
    once = kernels.group_norm_nhwc_once
    group_channels = x.shape[1] // num_groups
    run = once.run_of(x[0, 0].numel(), num_groups, group_channels, x.itemsize, backward=backward)
    if run is None:
        return getattr(kernels.group_norm_nhwc, name)
    return lambda *args: getattr(once, name)(run, *args)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    sum_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, rstd, total), the statistics (B, G); y and total are differentiable in every tensor.

    total is sum_scale * (x + channel_bias + residual), empty without a residual.
    """
    kernels, x = kernels_for(x, "group_norm_silu"), _dense(x)
    forward = _implementation(kernels, x, num_groups, backward=False)
    other = None if residual is None else like(residual.to(x.dtype), x)
    added = kernels.Summands(_contiguous(channel_bias), other, sum_scale)
    vectors = (weight.contiguous(), bias.contiguous(), eps, *_rows(scale, shift), silu)
    y, mean, rstd, total = forward(x, num_groups, *vectors, added)
    return y, mean, rstd, x.new_empty(0) if total is None else total


def _rows(scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift (B, C), contiguous, or None for both."""
    if scale is None or shift is None:
        return None, None
    return scale.contiguous(), shift.contiguous()


group_norm_silu = torch.library.custom_op("dmd2::group_norm_silu", _forward, mutates_args=())


@group_norm_silu.register_fake
def _(x, num_groups, weight, bias, eps, scale, shift, silu, channel_bias=None, residual=None, sum_scale=1.0):
    mean = x.new_empty(x.shape[0], num_groups, dtype=accumulation_dtype(x))
    x = _dense(x)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), mean, torch.empty_like(mean), total


def _backward(
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
    channel_bias: Tensor | None = None,
    is_total: bool = False,
    d_total: Tensor | None = None,
    sum_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients wrt. x, weight, bias, scale, shift and channel_bias, empty for one that is absent.

    With `is_total`, x is the sum that forward returned and `d_total` the gradient of its other uses.
    """
    kernels, x = kernels_for(x, "group_norm_silu_backward"), _dense(x)
    backward = _implementation(kernels, x, num_groups, backward=True)
    more = None if d_total is None else like(d_total, x)
    above = kernels.Upstream(_contiguous(channel_bias), is_total, more, sum_scale)
    vectors = (weight.contiguous(), bias.contiguous(), *_rows(scale, shift), silu)
    dx, d_weight, d_bias, *others = backward(like(dy, x), x, mean, rstd, num_groups, *vectors, above)
    d_scale, d_shift, d_channel_bias = (x.new_empty(0) if t is None else t for t in others)
    return dx, d_weight, d_bias, d_scale, d_shift, d_channel_bias


group_norm_silu_backward = torch.library.custom_op("dmd2::group_norm_silu_backward", _backward, mutates_args=())


@group_norm_silu_backward.register_fake
def _(
    dy, x, mean, rstd, num_groups, weight, bias, scale, shift, silu, channel_bias=None, is_total=False, d_total=None,
    sum_scale=1.0,
):  # fmt: skip
    rows = [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (scale, shift, channel_bias)]
    return torch.empty_like(_dense(x)), weight.new_empty(weight.shape), bias.new_empty(bias.shape), *rows


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.num_groups, weight, bias, _, scale, shift, ctx.silu, channel_bias, residual, ctx.sum_scale = inputs
    _, mean, rstd, total = output
    ctx.is_sum = residual is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total if ctx.is_sum else x, mean, rstd, weight, bias, scale, shift, channel_bias)


def _gradients(
    ctx: Any, dy: Tensor | None, d_total: Tensor | None, backward: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight, bias, scale, shift, channel_bias = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    vectors = (weight, bias, scale, shift, ctx.silu, channel_bias)
    more = (ctx.is_sum, d_total if ctx.is_sum else None, ctx.sum_scale)
    dx, d_weight, d_bias, *others = backward(dy, x, mean, rstd, ctx.num_groups, *vectors, *more)
    given = (scale, shift, channel_bias)
    d_scale, d_shift, d_channel_bias = (None if t is None else d for t, d in zip(given, others, strict=True))
    return dx, None, d_weight, d_bias, None, d_scale, d_shift, None, d_channel_bias, dx if ctx.is_sum else None, None


def _gradient(ctx: Any, dy: Tensor, _: Any, __: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, d_total, group_norm_silu_backward)


group_norm_silu.register_autograd(_gradient, setup_context=_context)


class _Direct(torch.autograd.Function):
    """The op without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _context(ctx, inputs, output)
        return output[0], output[3]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, d_total: Tensor) -> tuple[Tensor | None, ...]:
        # Grad mode is on here only for a second derivative, which the op rejects.
        return _gradients(ctx, dy, d_total, group_norm_silu_backward if torch.is_grad_enabled() else _backward)


def apply(*inputs: Any) -> tuple[Tensor, Tensor]:
    """(y, total) of `group_norm_silu`, with the least overhead that the tensors allow."""
    x = inputs[0]
    if torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, nn.Parameter):
        out = group_norm_silu(*inputs)  # traced, fake and distributed tensors need the op
        return out[0], out[3]
    if torch.is_grad_enabled():
        return _Direct.apply(*inputs)
    out = _forward(*inputs)
    return out[0], out[3]
