"""The DMD2 losses: which network is evaluated, at which noise levels, and which gets the gradient.

`real` is the frozen teacher's score, `fake` the critic's; `data` are real samples, `gen` generated ones. Losses
are returned as gradients, with the sums that a log needs beside them (`dmd2_kernels`): the generator's with respect to
its images, so that all terms need one backward pass through it and their norms can be compared (the author's rule for
choosing the GAN weight), the critic's with respect to its outputs.

Shapes: B batch, `...` the shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmd2.config import Train
from dmd2.method.critic import Critic
from dmd2.method.denoiser import Cond, Prediction, Teacher, concat
from dmd2.method.divergence import sample_weights
from dmd2.method.noise import NoiseGrid, add_noise, critic_weight
from dmd2.method.sid import sid_gradient
from dmd2.training.rng import normal
from dmd2_kernels import (
    DenoisingSums,
    GanCriticSums,
    GanGeneratorSums,
    LinearHead,
    MatchingSums,
    denoising_loss_and_grad,
    gan_critic_loss_and_grad,
    gan_generator_loss_and_grad,
    matching_loss_and_grad,
)

Matching = tuple[MatchingSums, Tensor]
"""The distribution-matching loss's sums, and its weighted gradient (B, ...) with respect to the images."""
GanGenerator = tuple[GanGeneratorSums, Tensor]
"""The generator's GAN loss's sums, and its gradient (B, ...) with respect to the images, not weighted."""


class Noised(NamedTuple):
    """A network's input: noised samples x = x0 + sigma * eps."""

    x: Tensor  # (B, ...)
    sigma: Tensor  # (B,)
    cond: Cond


def noised(x0: Tensor, cond: Cond, grid: NoiseGrid, levels: tuple[int, int], rng: torch.Generator) -> Noised:
    """Noises x0 (B, ...) at one level per sample, drawn uniformly from the grid indices [low, high], both included."""
    sigma = grid.draw(x0.shape[0], *levels, rng)
    return Noised(add_noise(x0, sigma, normal(x0.shape, rng)), sigma, cond)


def _joined(parts: Sequence[Noised]) -> Noised:
    """Concatenates batches."""
    x, sigma, conds = zip(*parts, strict=True)
    return Noised(torch.cat(x), torch.cat(sigma), concat(conds))


def matching_gradient(
    x0: Tensor, cond: Cond, teacher: Teacher, critic: Critic, train: Train, rng: torch.Generator
) -> Matching:
    """The distribution-matching loss and its gradient with respect to the generated images (paper, eq. 2 and 3).

    x0 (B, ...) detached. With x at a random level, d L / d x0 = (x0_fake - x0_real) / mean|x0 - x0_real| / numel, the
    mean per sample: the critic's estimate minus the teacher's, in units of the teacher's correction; times
    `matching_weight`. With `sid_alpha` it is SiD's loss and gradient.
    """
    if train.sid_alpha is not None:
        leaf = x0.detach().requires_grad_()
        noisy = noised(leaf, cond, teacher.grid, train.matching_levels, rng)
        return sid_gradient(leaf, *noisy, teacher, critic, train)
    part = noised(x0, cond, teacher.grid, train.matching_levels, rng)
    real, (fake, logits) = _real_prediction(part, teacher, train), _fake_prediction(part, teacher, critic, train)
    return _matching(x0, part, real, fake, teacher, train, logits)


def gan_gradient(
    x0: Tensor, cond: Cond, teacher: Teacher, critic: Critic, train: Train, rng: torch.Generator
) -> GanGenerator:
    """The generator's GAN loss and its gradient with respect to the generated images (paper, section 4.3, eq. 4).

    mean softplus(-D(x)) on images noised at levels drawn for this term; the critic's weights get no gradient.
    """
    leaf = x0.detach().requires_grad_()
    part = noised(leaf, cond, teacher.grid, train.gan_levels, rng)
    if train.gan_features == "teacher":
        _, logits = critic(*part, num_denoise=0, features=_teachers_features(part, teacher, train))
    else:
        _, logits = critic(*part, num_denoise=0, logits_from=0)
    return _gan_gradient(logits, leaf, train)


def generator_terms(
    x0: Tensor, cond: Cond, teacher: Teacher, critic: Critic, train: Train, rng: torch.Generator
) -> tuple[Matching | None, GanGenerator | None]:
    """`matching_gradient` and `gan_gradient`, None for a term with weight 0; separate noise levels or shared ones."""
    if train.share_levels and train.matching_weight > 0 and train.has_gan:
        return shared_gradients(x0, cond, teacher, critic, train, rng)
    matching = matching_gradient(x0, cond, teacher, critic, train, rng) if train.matching_weight > 0 else None
    return matching, gan_gradient(x0, cond, teacher, critic, train, rng) if train.has_gan else None


def shared_gradients(
    x0: Tensor, cond: Cond, teacher: Teacher, critic: Critic, train: Train, rng: torch.Generator
) -> tuple[Matching, GanGenerator]:
    """`matching_gradient` and `gan_gradient` on the same noised samples (`share_levels`), as FastGen does.

    The network whose features D uses returns them with its estimate, which saves one encoder pass. A guided teacher
    estimates a batch of 2B instead, so its features need a separate pass.
    """
    num = x0.shape[0]
    leaf = x0.detach().requires_grad_()
    part = noised(leaf, cond, teacher.grid, train.matching_levels, rng)
    if train.gan_features == "critic":
        real = _real_prediction(part, teacher, train)
        fake, logits = critic(*part, num_denoise=num, logits_from=0)
    else:
        if train.guidance_scale == 1:
            estimate, features = teacher.denoiser.predict_and_tap(*part, num, train.gan_taps)
            real = Guided(estimate)
        else:
            real, features = _real_prediction(part, teacher, train), _teachers_features(part, teacher, train)
        with torch.no_grad():
            fake, _ = critic(*part, num_denoise=num)
        _, logits = critic(*part, num_denoise=0, features=features)
    matching = _matching(x0, part, real, fake, teacher, train, logits)
    return matching, _gan_gradient(logits, leaf, train)


class Guided(NamedTuple):
    """The teacher's prediction; with `uncond` (B, ...), its unconditional output, guidance is left to the kernel."""

    cond: Prediction
    uncond: Tensor | None = None


def _matching(
    x0: Tensor, part: Noised, real: Guided, fake: Prediction, teacher: Teacher, train: Train, logits: Tensor | None
) -> Matching:
    """The matching loss and gradient: the kernel converts raw outputs to x0 and guides them as it reads them.

    `logits` (B, K) of D at `part` are read only with an f-divergence.
    """
    head, weight = real.cond.head, None
    if train.f_divergence is not None and logits is not None:
        weight = sample_weights(logits, part.sigma, teacher.grid, train.f_divergence)
    return matching_loss_and_grad(
        x0,
        real.cond.out.detach(),
        fake.out.detach(),
        x=None if head is None else part.x.detach(),
        head=head,
        real_uncond=real.uncond,
        guidance_scale=1.0 if real.uncond is None else train.guidance_scale,
        sample_weight=weight,
        scale=train.matching_weight,
    )


@torch.no_grad()
def _real_prediction(part: Noised, teacher: Teacher, train: Train) -> Guided:
    if train.guidance_scale == 1:
        return Guided(teacher.denoiser.predict(*part))
    num, null = part.x.shape[0], teacher.conditioner.null(part.cond)
    assert null is not None  # checked at the start
    both = concat([null, part.cond])
    out, head = teacher.denoiser.predict(torch.cat([part.x] * 2), torch.cat([part.sigma] * 2), both)
    uncond, cond = out.chunk(2)
    return Guided(Prediction(cond, None if head is None else LinearHead(head.a[:num], head.k[:num])), uncond)


@torch.no_grad()
def _fake_prediction(part: Noised, teacher: Teacher, critic: Critic, train: Train) -> tuple[Prediction, Tensor | None]:
    """The critic's prediction and, with an f-divergence, D's logits of the same samples."""
    num = part.x.shape[0]
    if train.f_divergence is None:
        return critic(*part, num_denoise=num)
    if train.gan_features == "teacher":
        return critic(*part, num_denoise=num, features=_teachers_features(part, teacher, train))
    return critic(*part, num_denoise=num, logits_from=0)


def _teachers_features(part: Noised, teacher: Teacher, train: Train) -> list[Tensor]:
    return teacher.denoiser.predict_and_tap(*part, 0, train.gan_taps)[1]


def _gan_gradient(logits: Tensor, leaf: Tensor, train: Train) -> GanGenerator:
    """The loss over the logits of all samples and heads, and its gradient with respect to the images."""
    flat = logits.reshape(-1)
    sums, grad = gan_generator_loss_and_grad(flat, kind=train.gan_loss)
    return sums, torch.autograd.grad(flat, leaf, grad)[0]


class CriticLosses(NamedTuple):
    """The critic's losses, and the gradients of their weighted sum with respect to its outputs."""

    denoising: DenoisingSums
    gan: GanCriticSums | None
    outputs: list[Tensor]
    grads: list[Tensor]

    def backward(self) -> None:
        """Adds the gradient of the weighted sum to the critic's weights."""
        torch.autograd.backward(self.outputs, self.grads)


def critic_losses(
    x0: Tensor,
    cond: Cond,
    data: Callable[[], tuple[Tensor, Cond]],
    teacher: Teacher,
    critic: Critic,
    train: Train,
    rng: torch.Generator,
    scale: float = 1.0,
) -> CriticLosses:
    """Fake-score and discriminator losses on generated images x0 (B, ...), detached, in one pass of the critic.

    The batch is [fake score | D on generated | D on data]: the encoder runs on all of it, the decoder only on the
    first third. With `share_critic_pass` the first two thirds are the same samples. With the teacher's features the
    critic's batch is the first third, and D's gradient stops at the heads. `data` is called only with a GAN. `scale`
    multiplies the gradients: 1 over the number of micro-batches.
    """
    score = noised(x0, cond, teacher.grid, train.critic_levels, rng)
    weight = _denoising_weight(score.sigma, teacher, train)
    if not train.has_gan:
        fake, _ = critic(*score, num_denoise=x0.shape[0])
        sums, grad = _denoising(fake, score, x0, weight, scale)
        return CriticLosses(sums, None, [fake.out], [grad])

    gen = score if train.share_critic_pass else noised(x0, cond, teacher.grid, train.gan_levels, rng)
    judged = [gen, *_noised_for_discriminator(*data(), teacher, train, rng)]
    fake, logits = _critic_pass(score, judged, teacher, critic, train)
    sources = [part.reshape(-1) for part in logits.split([len(part.x) for part in judged])]
    sums, grad = _denoising(fake, score, x0, weight, scale)
    gan, slopes = gan_critic_loss_and_grad(
        *sources[:2],
        kind=train.gan_loss,
        perturbed_data_logits=sources[2] if len(sources) > 2 else None,
        r1_weight=train.r1_weight,
        scale=_product(scale, train.gan_critic_weight),
    )
    return CriticLosses(sums, gan, [fake.out, *sources], [grad, *(slope for slope in slopes if slope is not None)])


def _denoising(
    prediction: Prediction, part: Noised, x0: Tensor, weight: Tensor, scale: float
) -> tuple[DenoisingSums, Tensor]:
    """The denoising loss and gradient of a prediction at `part`, as raw output with its head if it has one."""
    x = None if prediction.head is None else part.x
    return denoising_loss_and_grad(prediction.out, x0, weight, x=x, head=prediction.head, scale=scale)


def _product(scale: float, weight: float) -> float:
    """Rounded to float32, as a graph of the weighted sum would."""
    return float(np.float32(scale) * np.float32(weight))


def _noised_for_discriminator(
    x0: Tensor, cond: Cond, teacher: Teacher, train: Train, rng: torch.Generator
) -> list[Noised]:
    """Noised real samples for D; for the approximate R1 penalty also a perturbed copy.

    The *noised* sample is perturbed, so that a perturbation of 0 has a penalty of exactly 0.
    """
    part = noised(x0, cond, teacher.grid, train.gan_levels, rng)
    if train.r1_weight == 0:
        return [part]
    return [part, part._replace(x=part.x + train.r1_sigma * normal(part.x.shape, rng))]


def _critic_pass(
    score: Noised, judged: Sequence[Noised], teacher: Teacher, critic: Critic, train: Train
) -> tuple[Prediction, Tensor]:
    """The fake score's prediction of `score`, and the logits of all `judged` batches; the first may be `score`."""
    num = score.x.shape[0]
    if train.gan_features == "teacher":
        with torch.no_grad():
            features = _teachers_features(_joined(judged), teacher, train)
        return critic(*score, num_denoise=num, features=features)
    if train.share_critic_pass:
        return critic(*_joined(judged), num_denoise=num, logits_from=0)
    return critic(*_joined([score, *judged]), num_denoise=num, logits_from=num)


def _denoising_weight(sigma: Tensor, teacher: Teacher, train: Train) -> Tensor:
    if train.denoising_weighting == "uniform":
        return torch.ones_like(sigma)
    return critic_weight(sigma, teacher.sigma_data)
