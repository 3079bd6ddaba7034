"""SiD's generator loss (Zhou et al. 2024, "Score identity Distillation", arXiv 2404.04057), in place of DMD's gradient.

Shapes: B batch, `...` the shape of one sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmd2.config import Train
from dmd2.method.critic import Critic
from dmd2.method.denoiser import Cond, Teacher, guided
from dmd2.method.noise import expand
from dmd2_kernels import MatchingSums


def sid_gradient(
    x0: Tensor, x: Tensor, sigma: Tensor, cond: Cond, teacher: Teacher, critic: Critic, train: Train
) -> tuple[MatchingSums, Tensor]:
    """SiD's loss and its gradient with respect to the generated images x0 (B, ...), from which x (B, ...) is noised.

    With d = x0_real - x0_fake at x, sigma (B,): the mean of d (x0_real - x0 - alpha d) / w over all elements, where w =
    mean|x0 - x0_real| per sample has no gradient (paper, eq. 23 and algorithm 1). The gradient goes through teacher and
    critic, which costs two backward passes more than DMD2's; their weights get none. What is not finite becomes 0. The
    gradient is times `matching_weight`.
    """
    assert train.sid_alpha is not None
    null = teacher.conditioner.null(cond) if train.guidance_scale != 1 else None
    real = guided(teacher.denoiser, x, sigma, cond, null, train.guidance_scale)
    fake = critic(x, sigma, cond, num_denoise=x0.shape[0])[0].x0(x)
    weight = (x0 - real).detach().abs().flatten(1).mean(1)
    difference = real - fake
    loss = (difference * (real - x0 - train.sid_alpha * difference) / expand(weight, x0)).mean()
    (grad,) = torch.autograd.grad(loss, x0)
    finite = grad.isfinite()
    grad = torch.where(finite, grad, 0.0)
    squares = (x0.numel() * grad).flatten(1).square().sum(1, keepdim=True)
    nonfinite = (~finite).flatten(1).sum(1, keepdim=True)
    return MatchingSums(loss.detach().view(1), weight, squares, nonfinite), train.matching_weight * grad
