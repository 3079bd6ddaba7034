# mypy: allow-untyped-defs
"""The end of a residual block, scale * (x + channel_bias + residual), as `torch.ops.dmd2.residual_sum`."""

from typing import Any

import torch
from torch import Tensor, nn

from ._dispatch import kernels_for
from ._library_norm import channels_last, like
from .reference import accumulation_dtype


def _forward(x: Tensor, residual: Tensor, channel_bias: Tensor, scale: float) -> Tensor:
    """The sum in x's dtype and memory order; differentiable in every tensor."""
    kernels = kernels_for(x, "residual_sum")
    x = x if channels_last(x) else x.contiguous()
    other = like(residual.to(x.dtype), x)
    return kernels.residual_sum.forward(x, other, channel_bias.contiguous(), scale, channels_last(x))


residual_sum = torch.library.custom_op("dmd2::residual_sum", _forward, mutates_args=())


@residual_sum.register_fake
def _(x, residual, channel_bias, scale):
    return torch.empty_like(x if channels_last(x) else x.contiguous())


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, channel_bias, ctx.scale = inputs
    ctx.bias_dtype = channel_bias.dtype


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = dy if ctx.scale == 1 else dy * ctx.scale
    d_bias = None
    if ctx.needs_input_grad[2]:
        pixels = [dim for dim in range(dy.ndim) if dim != 1]
        d_bias = (dy.sum(pixels, dtype=accumulation_dtype(dy)) * ctx.scale).to(ctx.bias_dtype)
    return dx, dx, d_bias, None


residual_sum.register_autograd(_gradient, setup_context=_context)


class _Direct(torch.autograd.Function):
    """The op without the dispatcher, as in `_library_norm.py`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out = _forward(*inputs)
        _context(ctx, inputs, out)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, dy)


def apply(*inputs: Any) -> Tensor:
    """`residual_sum` with the least overhead that the tensors allow."""
    x = inputs[0]
    if torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, nn.Parameter):
        return residual_sum(*inputs)
    return _Direct.apply(*inputs) if torch.is_grad_enabled() else _forward(*inputs)
