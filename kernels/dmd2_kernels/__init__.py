"""Fused losses and layers of DMD2: one public function per op, on any device.

Every op is defined in `reference.py` in plain torch, which runs on CPU, and implemented in Triton for CUDA tensors.
Inputs may be bfloat16, float16, float32 or float64, also mixed; arithmetic and logged values are float32 (float64 if an
input is float64). Triton is imported on first use.

`real` and `fake` are scores (teacher and critic); `data` and `gen` are sources of samples. Shapes: B batch, C channels.
"""

import torch
from torch import Tensor

from . import _checks, _library, reference
from ._attach import attach, wanted
from ._dispatch import folds, implementation, use
from ._layer import GroupNormSiLU, group_norm_silu, residual_sum, sum_group_norm_silu
from ._types import DenoisingLoss, GanCriticLoss, GanGeneratorLoss, LinearHead, MatchingLoss

__all__ = [
    "DenoisingLoss",
    "GanCriticLoss",
    "GanGeneratorLoss",
    "GroupNormSiLU",
    "LinearHead",
    "MatchingLoss",
    "denoising_loss",
    "folds",
    "gan_critic_loss",
    "gan_generator_loss",
    "group_norm_silu",
    "implementation",
    "matching_loss",
    "matching_loss_and_grad",
    "residual_sum",
    "sum_group_norm_silu",
    "use",
]


def matching_loss(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    *,
    x: Tensor | None = None,
    head: LinearHead | None = None,
    real_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> MatchingLoss:
    """The distribution-matching loss, differentiable in x0 (B, ...) only, with gradient g / (B * N).

    Without a head, `real` and `fake` are x0 predictions; with one they are raw network outputs at the noisy `x`. With
    `real_uncond` the teacher is guided: uncond + guidance_scale * (real - uncond). Non-finite elements of g are
    replaced (NaN by 0, inf by the largest finite number) and counted in `num_nonfinite`.
    """
    real_uncond = _matching_arguments(x0, real, fake, x, head, real_uncond, guidance_scale)
    if implementation(x0) != "reference":
        args = (x0, real, fake, x, *(head or (None, None)), real_uncond, guidance_scale)
        loss, *logged = _library.matching_loss(*args)
        return MatchingLoss(loss, *_detached(logged))
    with torch.no_grad():
        out, grad = reference.matching(x0, real, fake, x, head, real_uncond, guidance_scale)
    return out._replace(loss=attach(out.loss, (x0, grad)))


def matching_loss_and_grad(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    *,
    x: Tensor | None = None,
    head: LinearHead | None = None,
    real_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> tuple[MatchingLoss, Tensor]:
    """The distribution-matching loss without a graph, and its gradient with respect to x0, in x0's shape and dtype.

    Saves the second read of the inputs in backward: continue with `x0.backward(grad)`. Arguments as in `matching_loss`.
    """
    real_uncond = _matching_arguments(x0, real, fake, x, head, real_uncond, guidance_scale)
    with torch.no_grad():
        if implementation(x0) != "reference":
            args = (x0, real, fake, x, *(head or (None, None)), real_uncond, guidance_scale)
            *values, grad = _library.matching_loss_and_grad(*args)
            return MatchingLoss(*values), grad
        out, grad = reference.matching(x0, real, fake, x, head, real_uncond, guidance_scale)
        return out, grad.to(x0.dtype)


def denoising_loss(
    out: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    x: Tensor | None = None,
    head: LinearHead | None = None,
) -> DenoisingLoss:
    """The mean over all elements of weight_b * (x0_hat - target)^2, differentiable in `out` (B, ...) only.

    Without a head, `out` is x0_hat; with one it is the raw network output at the noisy `x`. weight is (B,).
    """
    _checks.batched("out", out)
    _checks.like("target", target, "out", out)
    _checks.per_sample("weight", weight, "out", out)
    _checks.head_at(head, x, "out", out)
    if implementation(out) != "reference":
        loss, per_sample = _library.denoising_loss(out, target.detach(), weight.detach(), x, *(head or (None, None)))
        return DenoisingLoss(loss, per_sample.detach())
    need_grad = wanted(out)
    with torch.no_grad():
        loss, per_sample, grad = reference.denoising(out, target, weight, x, head, need_grad)
    return DenoisingLoss(loss if grad is None else attach(loss, (out, grad)), per_sample)


def gan_critic_loss(
    gen_logits: Tensor,
    data_logits: Tensor,
    *,
    kind: str = "softplus",
    perturbed_data_logits: Tensor | None = None,
    r1_weight: float = 0.0,
) -> GanCriticLoss:
    """The critic's GAN loss on logits (B,) or (B, 1), differentiable in all of them; batch sizes may differ.

    kind is softplus (the paper's) or hinge. `perturbed_data_logits` adds the approximate R1 penalty r1_weight * mean
    (perturbed - data)^2; the caller perturbs the noised data sample, so that a perturbation of 0 has a penalty of 0.
    """
    _checks.gan_kind(kind)
    _checks.logits("gen_logits", gen_logits)
    _checks.logits("data_logits", data_logits)
    _checks.on_device_of("data_logits", data_logits, "gen_logits", gen_logits)
    _checks.like("perturbed_data_logits", perturbed_data_logits, "data_logits", data_logits)
    if r1_weight != 0 and perturbed_data_logits is None:
        raise ValueError(f"r1_weight is {r1_weight} but perturbed_data_logits is not given; give it or use 0")
    perturbed = perturbed_data_logits
    gen, data = gen_logits.reshape(-1), data_logits.reshape(-1)
    moved = None if perturbed is None else perturbed.reshape(-1)
    if implementation(gen) != "reference":
        loss, *logged = _library.gan_critic_loss(gen, data, moved, kind, r1_weight)
        return GanCriticLoss(loss, *_detached(logged))
    with torch.no_grad():
        (loss, *logged), grads = reference.gan_critic(gen, data, moved, kind, r1_weight)
    pairs = zip([t for t in (gen, data, moved) if t is not None], grads, strict=True)
    return GanCriticLoss(attach(loss, *pairs), *logged)


def gan_generator_loss(gen_logits: Tensor, *, kind: str = "softplus") -> GanGeneratorLoss:
    """The generator's GAN loss on logits (B,) or (B, 1); kind is softplus (the paper's) or hinge."""
    _checks.gan_kind(kind)
    _checks.logits("gen_logits", gen_logits)
    gen = gen_logits.reshape(-1)
    if implementation(gen) != "reference":
        loss, p_gen = _library.gan_generator_loss(gen, kind)
        return GanGeneratorLoss(loss, p_gen.detach())
    with torch.no_grad():
        (loss, p_gen), grad = reference.gan_generator(gen, kind)
    return GanGeneratorLoss(attach(loss, (gen, grad)), p_gen)


def _detached(values: list[Tensor]) -> list[Tensor]:
    return [value.detach() for value in values]


def _matching_arguments(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    x: Tensor | None,
    head: LinearHead | None,
    real_uncond: Tensor | None,
    guidance_scale: float,
) -> Tensor | None:
    """Check the arguments; return `real_uncond`, or None if the guidance scale is 1."""
    _checks.batched("x0", x0)
    _checks.like("real", real, "x0", x0)
    _checks.like("fake", fake, "x0", x0)
    _checks.head_at(head, x, "x0", x0)
    _checks.like("real_uncond", real_uncond, "x0", x0)
    if guidance_scale != 1.0 and real_uncond is None:
        raise ValueError(f"guidance_scale is {guidance_scale} but real_uncond is not given; give it or use 1.0")
    return None if guidance_scale == 1.0 else real_uncond
