# mypy: allow-untyped-defs
"""GroupNorm+SiLU as `torch.ops.dmd2.group_norm_silu`, for NCHW and channels_last memory; see `_library.py`.

A U-Net calls it about a hundred times per pass, and the op's overhead on the host exceeds its kernels' time. So plain
tensors outside torch.compile bypass the dispatcher with an autograd function of the same host functions: `apply`.
"""

from collections.abc import Callable
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


def _like(t: Tensor, x: Tensor) -> Tensor:
    """t in the memory order of x."""
    return t.contiguous(memory_format=torch.channels_last if channels_last(x) else torch.contiguous_format)


def _forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd), the statistics (B, G); y is differentiable in every tensor."""
    kernels = kernels_for(x, "group_norm_silu")
    ops = kernels.group_norm_nhwc if channels_last(x) else kernels.group_norm_silu
    vectors = (weight.contiguous(), bias.contiguous(), eps, *_rows(scale, shift), silu)
    return ops.forward(_dense(x), num_groups, *vectors)


def _rows(scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift (B, C), contiguous, or None for both."""
    if scale is None or shift is None:
        return None, None
    return scale.contiguous(), shift.contiguous()


group_norm_silu = torch.library.custom_op("dmd2::group_norm_silu", _forward, mutates_args=())


@group_norm_silu.register_fake
def _(x, num_groups, weight, bias, eps, scale, shift, silu):
    mean = x.new_empty(x.shape[0], num_groups, dtype=accumulation_dtype(x))
    return torch.empty_like(_dense(x)), mean, torch.empty_like(mean)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients wrt. x, weight, bias, scale and shift; the last two are empty in the plain form."""
    kernels = kernels_for(x, "group_norm_silu_backward")
    ops = kernels.group_norm_nhwc if channels_last(x) else kernels.group_norm_silu
    vectors = (weight.contiguous(), bias.contiguous(), *_rows(scale, shift), silu)
    *grads, d_scale, d_shift = ops.backward(_like(dy, x), _dense(x), mean, rstd, num_groups, *vectors)
    dx, d_weight, d_bias = grads
    if d_scale is None or d_shift is None:
        return dx, d_weight, d_bias, x.new_empty(0), x.new_empty(0)
    return dx, d_weight, d_bias, d_scale, d_shift


group_norm_silu_backward = torch.library.custom_op("dmd2::group_norm_silu_backward", _backward, mutates_args=())


@group_norm_silu_backward.register_fake
def _(dy, x, mean, rstd, num_groups, weight, bias, scale, shift, silu):
    rows = [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (scale, shift)]
    return torch.empty_like(_dense(x)), weight.new_empty(weight.shape), bias.new_empty(bias.shape), *rows


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.num_groups, weight, bias, _, scale, shift, ctx.silu = inputs
    ctx.save_for_backward(x, *output[1:], weight, bias, scale, shift)


def _gradients(ctx: Any, dy: Tensor, backward: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight, bias, scale, shift = ctx.saved_tensors
    dx, d_weight, d_bias, d_scale, d_shift = backward(
        dy, x, mean, rstd, ctx.num_groups, weight, bias, scale, shift, ctx.silu
    )
    rows = (None, None) if scale is None else (d_scale, d_shift)
    return dx, None, d_weight, d_bias, None, *rows, None


def _gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, group_norm_silu_backward)


group_norm_silu.register_autograd(_gradient, setup_context=_context)


class _Direct(torch.autograd.Function):
    """The op without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _context(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Grad mode is on here only for a second derivative, which the op rejects.
        return _gradients(ctx, dy, group_norm_silu_backward if torch.is_grad_enabled() else _backward)


def apply(*inputs: Any) -> Tensor:
    """y of `group_norm_silu`, with the least overhead that the tensors allow."""
    x = inputs[0]
    if torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, nn.Parameter):
        return group_norm_silu(*inputs)[0]  # traced, fake and distributed tensors need the op
    return _Direct.apply(*inputs) if torch.is_grad_enabled() else _forward(*inputs)[0]
