"""GroupNorm + adaptive scale and shift + SiLU, as functions and as a module, and the sum at the end of a block."""

import torch
from torch import Tensor, nn

from . import _checks, _library_norm, _library_sum, reference
from ._dispatch import implementation


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    channel_bias: Tensor | None = None,
) -> Tensor:
    """silu(norm(x + channel_bias) * (1 + scale) + shift) in x's shape, dtype and memory format.

    x is (B, C, ...); weight and bias are (C,); scale and shift are (B, C), or both None for the plain form;
    channel_bias is (C,), as a convolution's bias, or (B, C). Differentiable in every tensor.
    """
    _checks.norm_arguments(x, num_groups, weight, bias, scale, shift)
    _checks.summands(x, channel_bias, None)
    args = (x, num_groups, weight, bias, eps, scale, shift, silu)
    if implementation(x) != "reference":
        _checks.group_size(x, num_groups)
        return _library_norm.apply(*args, channel_bias, None, 1.0)[0]
    if channel_bias is not None:
        args = (reference.add_channels(x, channel_bias), *args[1:])
    return reference.group_norm_silu(*args)


def sum_group_norm_silu(
    x: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    channel_bias: Tensor | None = None,
    sum_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(`group_norm_silu` of the sum, the sum): sum_scale * (x + channel_bias + residual), rounded once, in x's dtype.

    residual is like x, of any floating dtype; the rest as in `group_norm_silu`. Differentiable in every tensor.
    """
    _checks.norm_arguments(x, num_groups, weight, bias, scale, shift)
    _checks.summands(x, channel_bias, residual)
    if implementation(x) != "reference":
        _checks.group_size(x, num_groups)
        args = (x, num_groups, weight, bias, eps, scale, shift, silu, channel_bias, residual, sum_scale)
        return _library_norm.apply(*args)
    total = reference.residual_sum(x, residual, channel_bias, sum_scale)
    return reference.group_norm_silu(total, num_groups, weight, bias, eps, scale, shift, silu), total


def residual_sum(x: Tensor, residual: Tensor, channel_bias: Tensor, scale: float = 1.0) -> Tensor:
    """scale * (x + channel_bias + residual), rounded once: a residual block's end, with its convolution's bias (C,).

    x is (B, C, ...) and residual is like it. The result has x's dtype; differentiable in every tensor.
    """
    _checks.summands(x, channel_bias, residual)
    if channel_bias.ndim != 1:
        raise ValueError(f"channel_bias has shape {tuple(channel_bias.shape)}; it must be ({x.shape[1]},)")
    if implementation(x) != "reference":
        return _library_sum.apply(x, residual, channel_bias, scale)
    return reference.residual_sum(x, residual, channel_bias, scale)


class GroupNormSiLU(nn.Module):
    """`group_norm_silu` with its own weight and bias, named as in torch.nn.GroupNorm."""

    def __init__(self, num_channels: int, num_groups: int, eps: float = 1e-5, silu: bool = True) -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"num_groups is {num_groups}, which does not divide num_channels {num_channels}")
        self.num_groups, self.eps, self.silu = num_groups, eps, silu
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        channel_bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, ...), with scale and shift (B, C) or without both, and channel_bias as above -> (B, C, ...)."""
        return group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            scale=scale,
            shift=shift,
            silu=self.silu,
            channel_bias=channel_bias,
        )

    def of_sum(
        self, x: Tensor, residual: Tensor, channel_bias: Tensor | None = None, sum_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The norm of sum_scale * (x + channel_bias + residual), and that sum; see `sum_group_norm_silu`."""
        return sum_group_norm_silu(
            x,
            residual,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            silu=self.silu,
            channel_bias=channel_bias,
            sum_scale=sum_scale,
        )

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"{len(self.weight)}, num_groups={self.num_groups}, eps={self.eps}, silu={self.silu}"
