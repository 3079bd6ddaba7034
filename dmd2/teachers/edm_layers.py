"""The layers of EDM's U-Nets, with EDM's parameter names and initialisation.

Weights are float32; a layer casts them to the dtype of its input. They are uninitialised until `reset` or
`load_state_dict`, so that a network can be built on the meta device.

Shapes: B batch, C channels, H, W height and width, E embedding.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2_kernels import GroupNormSiLU

Resampling = Literal["up", "down"]


class Init(NamedTuple):
    """Uniform initialisation of a layer (EDM's `weight_init`).

    ADM: weights and biases within +-scale / sqrt(fan in) (kaiming_uniform, init_weight and init_bias sqrt(1/3)).
    DDPM++ (`xavier`): weights within +-scale * sqrt(6 / (fan in + fan out)), biases 0.
    """

    scale: float = 1.0
    xavier: bool = False

    def draw(self, weight: Tensor, bias: Tensor | None, rng: torch.Generator) -> None:
        """Fills `weight` (out, in, ...) and `bias` (out,)."""
        fan_in, fan_out = weight[0].numel(), weight[:, 0].numel()
        bound = self.scale * (math.sqrt(6 / (fan_in + fan_out)) if self.xavier else 1 / math.sqrt(fan_in))
        nn.init.uniform_(weight, -bound, bound, generator=rng)
        if bias is not None and self.xavier:
            nn.init.zeros_(bias)
        elif bias is not None:
            nn.init.uniform_(bias, -bound, bound, generator=rng)


KAIMING = Init()


class Style(NamedTuple):
    """Settings in which the blocks of the two U-Nets differ."""

    eps: float  # of the norms
    adaptive: bool  # the embedding scales and shifts after the second norm, or is added before it
    skip_scale: float  # of each sum with a skip
    project_resampled: bool  # a 1x1 convolution on the skip also if only resampling changes the shape
    init: Init
    init_last: Init  # of the last layer of each branch
    init_attention: Init


ADM = Style(1e-5, True, 1.0, False, KAIMING, Init(0.0), KAIMING)
DDPMPP = Style(1e-6, False, math.sqrt(0.5), True, Init(xavier=True), Init(1e-5, True), Init(math.sqrt(0.2), True))


def num_groups(num_channels: int) -> int:
    """The largest divisor of C that is at most EDM's min(32, C // 4)."""
    most = max(1, min(32, num_channels // 4))
    return next(n for n in range(most, 0, -1) if num_channels % n == 0)


def norm(num_channels: int, eps: float = 1e-5, *, silu: bool = True) -> GroupNormSiLU:
    """GroupNorm with EDM's number of groups, followed by SiLU if `silu`."""
    return GroupNormSiLU(num_channels, num_groups(num_channels), eps=eps, silu=silu)


class Linear(nn.Module):
    """x W^T + b: (B, in) -> (B, out), in the input's dtype."""

    def __init__(self, num_in: int, num_out: int, init: Init = KAIMING):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))
        self.bias = nn.Parameter(torch.empty(num_out))
        self.init = init

    def reset(self, rng: torch.Generator) -> None:
        """Initialises as EDM does."""
        self.init.draw(self.weight, self.bias, rng)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LabelEmbedding(nn.Module):
    """label (B,) -> columns of the weight (E, classes) as (B, E): equals the product with a one-hot vector."""

    def __init__(self, num_classes: int, num_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_classes))

    def reset(self, rng: torch.Generator) -> None:
        """Initialises as EDM does: kaiming_normal times sqrt(classes), that is N(0, 1)."""
        nn.init.normal_(self.weight, generator=rng)

    def forward(self, label: Tensor) -> Tensor:
        return F.embedding(label, self.weight.t())  # (B,) -> (B, E)


class ScaledLabelEmbedding(LabelEmbedding):
    """DDPM++'s label embedding: a linear layer with bias, applied to the one-hot vector times sqrt(classes)."""

    def __init__(self, num_classes: int, num_out: int, init: Init):
        super().__init__(num_classes, num_out)
        self.bias = nn.Parameter(torch.empty(num_out))
        self.init, self.scale = init, math.sqrt(num_classes)

    def reset(self, rng: torch.Generator) -> None:
        """Initialises as EDM does."""
        self.init.draw(self.weight, self.bias, rng)

    def forward(self, label: Tensor) -> Tensor:
        return self.scale * super().forward(label) + self.bias


class Unused(nn.Module):
    """A weight of the published network that is not used here, kept so that its state dict loads."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(shape))

    def reset(self, rng: torch.Generator) -> None:
        """Zeros."""
        nn.init.zeros_(self.get_buffer("weight"))


class Conv(nn.Module):
    """A convolution with "same" padding, in the input's dtype; with `resampling`, of the resampled input."""

    def __init__(
        self, num_in: int, num_out: int, kernel: int, *, resampling: Resampling | None = None, init: Init = KAIMING
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(num_out))
        self.padding, self.resampling, self.init = kernel // 2, resampling, init
        if resampling:
            self.register_buffer("resample_filter", _box())

    def reset(self, rng: torch.Generator) -> None:
        """Initialises as EDM does."""
        self.init.draw(self.weight, self.bias, rng)

    def forward(self, x: Tensor, *, biased: bool = True) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W'); without its bias if the next op adds it."""
        x = resample(x, self.resampling)
        # Casts and converts the layout in one copy; else the convolution would make a second one for the layout.
        layout = torch.channels_last if is_channels_last(x) else torch.preserve_format
        bias = self.bias.to(x.dtype) if biased else None
        return F.conv2d(x, self.weight.to(x.dtype, memory_format=layout), bias, padding=self.padding)


class Resample(nn.Module):
    """`resample` as a module: the skip of a block that changes the resolution and not the channels."""

    def __init__(self, resampling: Resampling):
        super().__init__()
        self.resampling = resampling
        self.register_buffer("resample_filter", _box())

    def forward(self, x: Tensor) -> Tensor:
        return resample(x, self.resampling)


def resample(x: Tensor, resampling: Resampling | None) -> Tensor:
    """Downsamples (B, C, H, W) by 2x2 means, upsamples by repetition, or returns x; equal to EDM's 2x2 box filter."""
    if resampling == "down":
        return F.avg_pool2d(x, 2)
    if resampling == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return x


def is_channels_last(x: Tensor) -> bool:
    """Whether x (B, C, H, W) is channels_last, and not contiguous as well (as with a size of 1)."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _box() -> Tensor:
    return torch.full((1, 1, 2, 2), 0.25)
