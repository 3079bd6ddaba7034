"""The public losses: `*_loss_and_grad`, which a training step takes, and the same attached to autograd."""

from typing import Any

import torch
from torch import Tensor

from . import _checks, _library, reference
from ._attach import attach, wanted
from ._dispatch import implementation
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


def matching_loss_and_grad(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    *,
    x: Tensor | None = None,
    head: LinearHead | None = None,
    real_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    sample_weight: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[MatchingSums, Tensor]:
    """Sums of the distribution-matching loss, and `scale` times its gradient wrt. x0 (B, ...), in x0's dtype.

    Without a head, `real` and `fake` (B, ...) are x0 predictions; with one they are raw network outputs at the noisy
    `x`. With `real_uncond` the teacher is guided: uncond + guidance_scale * (real - uncond). `sample_weight` (B,)
    multiplies each sample's loss and gradient. Non-finite elements of g are replaced (NaN by 0, inf by the largest
    finite number) and counted. Without a graph: continue with `x0.backward(grad)`. The formulas and their sources are
    in `reference.matching`. Raises TypeError or ValueError that names a wrong argument.
    """
    return _matching(x0, real, fake, x, head, real_uncond, guidance_scale, sample_weight, scale, None)


def matching_loss(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    *,
    x: Tensor | None = None,
    head: LinearHead | None = None,
    real_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    sample_weight: Tensor | None = None,
) -> MatchingLoss:
    """The distribution-matching loss, differentiable in x0 (B, ...) only; arguments as `matching_loss_and_grad`."""
    wide = _wide(x0, real, fake, x, real_uncond, sample_weight)
    sums, grad = _matching(x0, real, fake, x, head, real_uncond, guidance_scale, sample_weight, 1.0, wide)
    return MatchingLoss(attach(sums.loss, (x0, grad)), sums.weight, sums.sq_norm, sums.num_nonfinite)


@torch.no_grad()
def _matching(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    x: Tensor | None,
    head: LinearHead | None,
    uncond: Tensor | None,
    guidance: float,
    factor: Tensor | None,
    scale: float,
    grad_dtype: torch.dtype | None,
) -> tuple[MatchingSums, Tensor]:
    """The sums, and the gradient in the given dtype or x0's."""
    _checks.batched("x0", x0)
    _checks.like("real", real, "x0", x0)
    _checks.like("fake", fake, "x0", x0)
    _checks.head_at(head, x, "x0", x0)
    _checks.like("real_uncond", uncond, "x0", x0)
    if guidance != 1.0 and uncond is None:
        raise ValueError(f"guidance_scale is {guidance} but real_uncond is not given; give it or use 1.0")
    if factor is not None:
        _checks.per_sample("sample_weight", factor, "x0", x0)
    uncond, dtype = None if guidance == 1.0 else uncond, grad_dtype or x0.dtype
    if implementation(x0) != "reference":
        args = (x0, real, fake, x, *(head or (None, None)), uncond, factor, guidance, scale, dtype)
        *sums, grad = _library.call(_library.matching_loss_and_grad, *args)
        return MatchingSums(*sums), grad
    out, grad = reference.matching(x0, real, fake, x, head, uncond, guidance, factor)
    return out, _scaled(grad, scale).to(dtype)


def denoising_loss_and_grad(
    out: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    x: Tensor | None = None,
    head: LinearHead | None = None,
    scale: float = 1.0,
) -> tuple[DenoisingSums, Tensor]:
    """Sums of mean weight_b * (x0_hat - target)^2, and `scale` times its gradient wrt. `out` (B, ...), in out's dtype.

    Without a head, `out` is x0_hat; with one it is the raw network output at the noisy `x`. weight is (B,). Without a
    graph: continue with `torch.autograd.backward(out, grad)`. Raises TypeError or ValueError that names a wrong
    argument.
    """
    terms, grad = _denoising(out, target, weight, x, head, scale, out.dtype)
    assert grad is not None
    return DenoisingSums(terms), grad


def denoising_loss(
    out: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    x: Tensor | None = None,
    head: LinearHead | None = None,
) -> DenoisingLoss:
    """The denoising loss, differentiable in `out` (B, ...) only; arguments as `denoising_loss_and_grad`."""
    if implementation(out) == "reference":
        _denoising_arguments(out, target, weight, x, head)
        need_grad = wanted(out)
        with torch.no_grad():
            loss, per_sample, grad = reference.denoising(out, target, weight, x, head, need_grad)
        return DenoisingLoss(loss if grad is None else attach(loss, (out, grad)), per_sample)
    wide = _wide(out, target, weight, x) if wanted(out) else None
    terms, grad = _denoising(out, target, weight, x, head, 1.0, wide)
    per_sample = terms.view(len(out), -1).sum(1) * len(out)
    return DenoisingLoss(terms.sum() if grad is None else attach(terms.sum(), (out, grad)), per_sample)


def _denoising_arguments(
    out: Tensor, target: Tensor, weight: Tensor, x: Tensor | None, head: LinearHead | None
) -> None:
    _checks.batched("out", out)
    _checks.like("target", target, "out", out)
    _checks.per_sample("weight", weight, "out", out)
    _checks.head_at(head, x, "out", out)


@torch.no_grad()
def _denoising(
    out: Tensor,
    target: Tensor,
    weight: Tensor,
    x: Tensor | None,
    head: LinearHead | None,
    scale: float,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """The terms (T,), and the gradient if it has a dtype."""
    _denoising_arguments(out, target, weight, x, head)
    if implementation(out) != "reference":
        args = (out, target, weight, x, *(head or (None, None)), scale, grad_dtype)
        terms, grad = _library.call(_library.denoising_loss_and_grad, *args)
        return terms, None if grad_dtype is None else grad
    loss, _, grad = reference.denoising(out, target, weight, x, head, grad_dtype is not None)
    return loss.view(1), None if grad is None else _scaled(grad, scale).to(grad_dtype)


def gan_critic_loss_and_grad(
    gen_logits: Tensor,
    data_logits: Tensor,
    *,
    kind: str = "softplus",
    perturbed_data_logits: Tensor | None = None,
    r1_weight: float = 0.0,
    scale: float = 1.0,
) -> tuple[GanCriticSums, CriticGradients]:
    """Sums of the critic's GAN loss, and `scale` times its gradients wrt. the logits, each (B,) or (B, 1).

    Batch sizes may differ. kind is softplus (the paper's) or hinge. `perturbed_data_logits` adds the approximate R1
    penalty r1_weight * mean (perturbed - data)^2; the caller perturbs the noised data sample, so that a perturbation of
    0 has a penalty of 0. Without a graph: continue with `torch.autograd.backward`. Raises TypeError or ValueError that
    names a wrong argument.
    """
    _critic_arguments(gen_logits, data_logits, kind, perturbed_data_logits, r1_weight)
    sources = (gen_logits, data_logits, perturbed_data_logits)
    gen, data, perturbed = _flattened(sources)
    sums, _, grads = _critic(gen, data, perturbed, kind, r1_weight, scale, False, None)
    shaped = [None if t is None else g.view(t.shape) for t, g in zip(sources, grads, strict=True)]
    return sums, CriticGradients(*shaped)  # type: ignore[arg-type]


def gan_critic_loss(
    gen_logits: Tensor,
    data_logits: Tensor,
    *,
    kind: str = "softplus",
    perturbed_data_logits: Tensor | None = None,
    r1_weight: float = 0.0,
) -> GanCriticLoss:
    """The critic's GAN loss, differentiable in all logits; arguments as `gan_critic_loss_and_grad`."""
    _critic_arguments(gen_logits, data_logits, kind, perturbed_data_logits, r1_weight)
    gen, data, perturbed = flat = _flattened((gen_logits, data_logits, perturbed_data_logits))
    sums, (p_data, p_gen), grads = _critic(gen, data, perturbed, kind, r1_weight, 1.0, True, _wide(*flat))
    pairs = [(t, grad) for t, grad in zip(flat, grads, strict=True) if t is not None]
    return GanCriticLoss(attach(sums.loss, *pairs), p_data, p_gen, sums.r1)


def _flattened(logits: tuple[Tensor | None, ...]) -> list[Any]:
    return [None if t is None else t.reshape(-1) for t in logits]


def _critic_arguments(gen: Tensor, data: Tensor, kind: str, perturbed: Tensor | None, r1_weight: float) -> None:
    _checks.gan_kind(kind)
    _checks.logits("gen_logits", gen)
    _checks.logits("data_logits", data)
    _checks.on_device_of("data_logits", data, "gen_logits", gen)
    _checks.like("perturbed_data_logits", perturbed, "data_logits", data)
    if r1_weight != 0 and perturbed is None:
        raise ValueError(f"r1_weight is {r1_weight} but perturbed_data_logits is not given; give it or use 0")


@torch.no_grad()
def _critic(
    gen: Tensor,
    data: Tensor,
    perturbed: Tensor | None,
    kind: str,
    r1_weight: float,
    scale: float,
    probabilities: bool,
    grad_dtype: torch.dtype | None,
) -> tuple[GanCriticSums, list[Tensor], list[Tensor]]:
    """Sums, [p_data, p_gen] and the gradients wrt. flat logits; the last means nothing without perturbed ones."""
    if implementation(gen) != "reference":
        args = (gen, data, perturbed, kind, r1_weight, scale, probabilities, grad_dtype)
        *sums, p_data, p_gen, d_gen, d_data, d_perturbed = _library.call(_library.gan_critic_loss_and_grad, *args)
        return GanCriticSums(*sums), [p_data, p_gen], [d_gen, d_data, d_perturbed]
    (loss, p_data, p_gen, r1), grads = reference.gan_critic(gen, data, perturbed, kind, r1_weight)
    correct = 0.5 * ((p_data > 0.5).to(loss.dtype).mean() + (p_gen < 0.5).to(loss.dtype).mean())
    logits = [t for t in (gen, data, perturbed) if t is not None]
    scaled = [_scaled(g, scale).to(grad_dtype or t.dtype) for g, t in zip(grads, logits, strict=True)]
    sums = GanCriticSums(loss.view(1), correct.view(1), r1.view(1))
    return sums, [p_data, p_gen], [*scaled, gen.new_empty(0)][:3]


def gan_generator_loss_and_grad(
    gen_logits: Tensor, *, kind: str = "softplus", scale: float = 1.0
) -> tuple[GanGeneratorSums, Tensor]:
    """Sums of the generator's GAN loss, and `scale` times its gradient wrt. logits (B,) or (B, 1), in their dtype.

    kind is softplus (the paper's) or hinge. Raises TypeError or ValueError that names a wrong argument.
    """
    terms, _, grad = _generator(gen_logits, kind, scale, False, None)
    return GanGeneratorSums(terms), grad.view(gen_logits.shape)


def gan_generator_loss(gen_logits: Tensor, *, kind: str = "softplus") -> GanGeneratorLoss:
    """The generator's GAN loss, differentiable in logits (B,) or (B, 1); kind is softplus (the paper's) or hinge."""
    terms, p_gen, grad = _generator(gen_logits, kind, 1.0, True, _wide(gen_logits))
    return GanGeneratorLoss(attach(GanGeneratorSums(terms).loss, (gen_logits.reshape(-1), grad)), p_gen)


@torch.no_grad()
def _generator(
    logits: Tensor, kind: str, scale: float, probabilities: bool, grad_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The terms (T,), p_gen (B,) and the gradient (B,)."""
    _checks.gan_kind(kind)
    _checks.logits("gen_logits", logits)
    gen = logits.reshape(-1)
    if implementation(gen) != "reference":
        args = (gen, kind, scale, probabilities, grad_dtype)
        terms, p_gen, grad = _library.call(_library.gan_generator_loss_and_grad, *args)
        return terms, p_gen, grad
    (loss, p_gen), grad = reference.gan_generator(gen, kind)
    return loss.view(1), p_gen, _scaled(grad, scale).to(grad_dtype or gen.dtype)


def _wide(*tensors: Any) -> torch.dtype:
    """The dtype in which an attached gradient waits for the upstream one, so that it is rounded once.

    Of wrong arguments too, which the checks then name.
    """
    return reference.accumulation_dtype(*(t for t in tensors if isinstance(t, Tensor)))


def _scaled(grad: Tensor, scale: float) -> Tensor:
    """In float32, as a graph's product with an upstream gradient of that value."""
    return grad if scale == 1.0 else grad * scale
