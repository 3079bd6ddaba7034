"""GroupNorm + adaptive scale and shift + SiLU, as a function and as a module."""

import torch
from torch import Tensor, nn

from . import _checks, _library_norm, reference
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
) -> Tensor:
    """silu(norm(x) * (1 + scale) + shift) in x's shape, dtype and memory format, differentiable in every tensor.

    x is (B, C, ...); weight and bias are (C,); scale and shift are (B, C), or both None for the plain form.
    """
    _checks.norm_arguments(x, num_groups, weight, bias, scale, shift)
    args = (x, num_groups, weight, bias, eps, scale, shift, silu)
    if implementation(x) != "reference":
        _checks.group_size(x, num_groups)
        return _library_norm.apply(*args)
    return reference.group_norm_silu(*args)


class GroupNormSiLU(nn.Module):
    """`group_norm_silu` with its own weight and bias, named as in torch.nn.GroupNorm."""

    def __init__(self, num_channels: int, num_groups: int, eps: float = 1e-5, silu: bool = True) -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"num_groups is {num_groups}, which does not divide num_channels {num_channels}")
        self.num_groups, self.eps, self.silu = num_groups, eps, silu
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """x (B, C, ...), with scale and shift (B, C) or without both -> (B, C, ...)."""
        return group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, scale=scale, shift=shift, silu=self.silu
        )

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"{len(self.weight)}, num_groups={self.num_groups}, eps={self.eps}, silu={self.silu}"
