"""Fused losses and layers of DMD2: one public function per op, on any device.

Every op is defined in `reference.py` in plain torch, which runs on CPU, and implemented in Triton for CUDA tensors.
Inputs may be bfloat16, float16, float32 or float64, also mixed; arithmetic and logged values are float32 (float64 if an
input is float64). Triton is imported on first use.

A training step takes the `*_loss_and_grad` forms: gradients at once, and sums from which the losses are formed when
they are read. The others attach the same gradients to autograd.

`real` and `fake` are scores (teacher and critic); `data` and `gen` are sources of samples. Shapes: B batch, C channels.
"""

from ._dispatch import folds, implementation, use
from ._layer import GroupNormSiLU, group_norm_silu, residual_sum, sum_group_norm_silu
from ._losses import (
    denoising_loss,
    denoising_loss_and_grad,
    gan_critic_loss,
    gan_critic_loss_and_grad,
    gan_generator_loss,
    gan_generator_loss_and_grad,
    matching_loss,
    matching_loss_and_grad,
)
from ._types import (
    CriticGradients,
    DenoisingLoss,
    DenoisingSums,
    GanCriticLoss,
    GanCriticSums,
    GanGeneratorLoss,
    GanGeneratorSums,
    LinearHead,
    MatchingLoss,
    MatchingSums,
)

__all__ = [
    "CriticGradients",
    "DenoisingLoss",
    "DenoisingSums",
    "GanCriticLoss",
    "GanCriticSums",
    "GanGeneratorLoss",
    "GanGeneratorSums",
    "GroupNormSiLU",
    "LinearHead",
    "MatchingLoss",
    "MatchingSums",
    "denoising_loss",
    "denoising_loss_and_grad",
    "folds",
    "gan_critic_loss",
    "gan_critic_loss_and_grad",
    "gan_generator_loss",
    "gan_generator_loss_and_grad",
    "group_norm_silu",
    "implementation",
    "matching_loss",
    "matching_loss_and_grad",
    "residual_sum",
    "sum_group_norm_silu",
    "use",
]
