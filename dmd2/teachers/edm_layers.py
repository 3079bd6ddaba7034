"""The layers of EDM's U-Net, with EDM's parameter names and initial values.

Weights are float32; a layer computes in the dtype of its input and casts its weights on the way. They are
uninitialised until `reset` draws them or a state dict fills them, so that a network can be built on the meta device.

Shapes: B batch, C channels, H, W height and width, E embedding.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2_kernels import GroupNormSiLU

Resampling = Literal["up", "down"]


def num_groups(num_channels: int) -> int:
    """EDM's min(32, C // 4), or the largest divisor of C below it where that does not divide C."""
    most = max(1, min(32, num_channels // 4))
    return next(n for n in range(most, 0, -1) if num_channels % n == 0)


def norm(num_channels: int, *, silu: bool = True) -> GroupNormSiLU:
    """GroupNorm with EDM's number of groups, then SiLU unless told otherwise."""
    return GroupNormSiLU(num_channels, num_groups(num_channels), eps=1e-5, silu=silu)


class Linear(nn.Module):
    """x W^T + b of (B, in), in the input's dtype."""

    def __init__(self, num_in: int, num_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))
        self.bias = nn.Parameter(torch.empty(num_out))

    def reset(self, rng: torch.Generator) -> None:
        """Draws EDM's initial values."""
        _uniform(self.weight, self.bias, rng)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LabelEmbedding(nn.Module):
    """One column of the weight (E, classes) for each label: the product with a one-hot vector, without the product."""

    def __init__(self, num_classes: int, num_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_classes))

    def reset(self, rng: torch.Generator) -> None:
        """Draws EDM's initial values: kaiming_normal times sqrt(classes), that is N(0, 1)."""
        nn.init.normal_(self.weight, generator=rng)

    def forward(self, label: Tensor) -> Tensor:
        return F.embedding(label, self.weight.t())  # (B,) -> (B, E)


class Conv(nn.Module):
    """A convolution that keeps H and W, in the input's dtype; with `resampling`, of the resampled input."""

    def __init__(
        self, num_in: int, num_out: int, kernel: int, *, resampling: Resampling | None = None, zero: bool = False
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(num_out))
        self.padding, self.resampling, self.zero = kernel // 2, resampling, zero
        if resampling:
            self.register_buffer("resample_filter", _box())

    def reset(self, rng: torch.Generator) -> None:
        """Draws EDM's initial values, or zeros for a layer that starts at zero."""
        _uniform(self.weight, self.bias, rng, scale=0.0 if self.zero else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = resample(x, self.resampling)
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.padding)


class Resample(nn.Module):
    """`resample` as a module: the skip of a block that changes the resolution and not the channels."""

    def __init__(self, resampling: Resampling):
        super().__init__()
        self.resampling = resampling
        self.register_buffer("resample_filter", _box())

    def forward(self, x: Tensor) -> Tensor:
        return resample(x, self.resampling)


def resample(x: Tensor, resampling: Resampling | None) -> Tensor:
    """(B, C, H, W) at half the resolution by 2x2 means, at twice by repetition, or as it is.

    EDM convolves with a 2x2 box filter; these are the same sums.
    """
    if resampling == "down":
        return F.avg_pool2d(x, 2)
    if resampling == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return x


def _uniform(weight: Tensor, bias: Tensor, rng: torch.Generator, scale: float = 1.0) -> None:
    """Uniform in +-scale / sqrt(fan in): EDM's kaiming_uniform with init_weight and init_bias sqrt(1/3)."""
    bound = scale / math.sqrt(weight[0].numel())
    nn.init.uniform_(weight, -bound, bound, generator=rng)
    nn.init.uniform_(bias, -bound, bound, generator=rng)


def _box() -> Tensor:
    return torch.full((1, 1, 2, 2), 0.25)
