"""The DMD2 losses at network level: which network is asked what, at which noise, and who gets the gradient.

`real` is the frozen teacher's score, `fake` the critic's; `data` are real samples, `gen` generated ones. Losses of
the generator are returned as gradients on its images, so that one backward pass through the generator serves all
terms and their sizes can be compared where they meet (the author's rule for choosing the GAN weight).

Shapes: B batch, `...` the shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dmd2.config import Train
from dmd2.critic import Critic
from dmd2.denoiser import Cond, Teacher, concat, guided
from dmd2.noise import NoiseGrid, add_noise, normal
from dmd2_kernels import (
    DenoisingLoss,
    GanCriticLoss,
    MatchingLoss,
    denoising_loss,
    gan_critic_loss,
    gan_generator_loss,
    matching_loss_and_grad,
)


class Noised(NamedTuple):
    """A noised sample: x = x0 + sigma * eps."""

    x: Tensor  # (B, ...)
    sigma: Tensor  # (B,)


def noised(x0: Tensor, grid: NoiseGrid, levels: tuple[int, int], rng: torch.Generator) -> Noised:
    """`x0` at noise levels drawn uniformly, one per sample, from the grid indices low..high (both included)."""
    sigma = grid.draw(x0.shape[0], *levels, rng)
    return Noised(add_noise(x0, sigma, normal(x0.shape, rng)), sigma)


def matching_gradient(
    x0: Tensor, cond: Cond, teacher: Teacher, critic: Critic, train: Train, rng: torch.Generator
) -> tuple[MatchingLoss, Tensor]:
    """The distribution-matching loss and its gradient on the generated images (paper, eq. 2 and 3).

    x0 (B, ...) detached. With x at a random level, d L / d x0 = (x0_fake - x0_real) / mean|x0 - x0_real| / numel:
    the critic's estimate minus the teacher's, per sample in units of the teacher's correction.
    """
    with torch.no_grad():
        x, sigma = noised(x0, teacher.grid, train.matching_levels, rng)
        null = teacher.conditioner.null(x0.shape[0]) if train.guidance_scale != 1 else None
        x0_real = guided(teacher.denoiser, x, sigma, cond, null, train.guidance_scale)
        x0_fake, _ = critic(x, sigma, cond, num_denoise=x0.shape[0])
        return matching_loss_and_grad(x0, x0_real, x0_fake)


def gan_gradient(
    x0: Tensor, cond: Cond, teacher: Teacher, critic: Critic, train: Train, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The generator's GAN loss () and its gradient on the generated images (paper, section 4.3, eq. 4).

    mean softplus(-D(x)) on images noised at a level of their own; the critic's weights get no gradient.
    """
    leaf = x0.detach().requires_grad_()
    x, sigma = noised(leaf, teacher.grid, train.gan_levels, rng)
    _, logits = critic(x, sigma, cond, num_denoise=0, logits_from=0)
    loss = gan_generator_loss(logits, kind=train.gan_loss).loss
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


class CriticLosses(NamedTuple):
    """The critic's turn: `total` carries the graph."""

    total: Tensor
    denoising: DenoisingLoss
    gan: GanCriticLoss | None


def critic_losses(
    x0: Tensor,
    cond: Cond,
    data: Callable[[], tuple[Tensor, Cond]],
    teacher: Teacher,
    critic: Critic,
    train: Train,
    rng: torch.Generator,
) -> CriticLosses:
    """Fake-score and discriminator losses on generated images x0 (B, ...), detached, in one pass of the critic.

    The batch is [fake score | D on generated | D on data]: the encoder runs once on all of it, the decoder on the
    first part alone. With `share_critic_pass` the first two parts are one. `data` is called only if there is a GAN.
    """
    num = x0.shape[0]
    grid = teacher.grid
    score = noised(x0, grid, train.critic_levels, rng)
    if not train.has_gan:
        x0_fake, _ = critic(score.x, score.sigma, cond, num_denoise=num)
        denoising = denoising_loss(x0_fake, x0, critic_weight(score.sigma, teacher.sigma_data))
        return CriticLosses(denoising.loss, denoising, None)

    x0_data, cond_data = data()
    gen = score if train.share_critic_pass else noised(x0, grid, train.gan_levels, rng)
    on_data = noised(x0_data, grid, train.gan_levels, rng)
    judged, conds = [gen, on_data], [cond, cond_data]
    if train.r1_weight > 0:  # approximate R1: the *noised* sample is moved, so that a move of 0 costs exactly 0
        judged.append(Noised(on_data.x + train.r1_sigma * normal(on_data.x.shape, rng), on_data.sigma))
        conds.append(cond_data)
    batch = judged
    if not train.share_critic_pass:
        batch, conds = [score, *judged], [cond, *conds]

    x0_fake, logits = critic(
        torch.cat([part.x for part in batch]),
        torch.cat([part.sigma for part in batch]),
        concat(conds),
        num_denoise=num,
        logits_from=0 if train.share_critic_pass else num,
    )
    gen_logits, data_logits, *perturbed = logits.split([part.x.shape[0] for part in judged])
    denoising = denoising_loss(x0_fake, x0, critic_weight(score.sigma, teacher.sigma_data))
    gan = gan_critic_loss(
        gen_logits,
        data_logits,
        kind=train.gan_loss,
        perturbed_data_logits=perturbed[0] if perturbed else None,
        r1_weight=train.r1_weight,
    )
    return CriticLosses(denoising.loss + train.gan_critic_weight * gan.loss, denoising, gan)


def critic_weight(sigma: Tensor, sigma_data: float | None) -> Tensor:
    """lambda(sigma) of the fake-score loss: EDM's sigma^-2 + sigma_data^-2, or sigma^-2, which is the epsilon loss."""
    weight = sigma**-2
    return weight if sigma_data is None else weight + sigma_data**-2
