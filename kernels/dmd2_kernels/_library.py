# mypy: allow-untyped-defs
"""The losses as `torch.ops.dmd2.*`: schema, fake outputs and autograd, so that torch.compile sees one node.

Importing this registers the ops without importing triton; an op's first call imports it. Backward passes are separate
ops without a gradient. Inputs are made contiguous here.
"""

from typing import Any

import torch
from torch import Tensor

from ._dispatch import kernels_for
from .reference import accumulation_dtype


def _flat(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


@torch.library.custom_op("dmd2::matching_loss", mutates_args=())
def matching_loss(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    k: Tensor | None,
    uncond: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, weight, sq_norm, num_nonfinite); the loss is differentiable in x0."""
    ops = kernels_for(x0, "matching_loss").score_difference
    return ops.forward(*_flat(x0, real, fake, x, a, k, uncond), scale)


@matching_loss.register_fake
def _(x0, real, fake, x, a, k, uncond, scale):
    per_sample = x0.new_empty(x0.shape[0], dtype=accumulation_dtype(x0, real, fake, x, uncond))
    counts = x0.new_empty(x0.shape[0], dtype=torch.int64)
    return per_sample.new_empty(()), per_sample, torch.empty_like(per_sample), counts


@torch.library.custom_op("dmd2::matching_loss_backward", mutates_args=())
def matching_loss_backward(
    go: Tensor,
    weight: Tensor,
    real: Tensor,
    fake: Tensor,
    k: Tensor | None,
    uncond: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the matching loss wrt. x0."""
    ops = kernels_for(real, "matching_loss_backward").score_difference
    return ops.backward(go, weight, *_flat(real, fake, k, uncond), scale, dtype)


@matching_loss_backward.register_fake
def _(go, weight, real, fake, k, uncond, scale, dtype):
    return real.new_empty(real.shape, dtype=dtype)


@torch.library.custom_op("dmd2::matching_loss_and_grad", mutates_args=())
def matching_loss_and_grad(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    k: Tensor | None,
    uncond: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """matching_loss's four values and the gradient wrt. x0; no autograd."""
    ops = kernels_for(x0, "matching_loss_and_grad").score_difference
    return ops.loss_and_grad(*_flat(x0, real, fake, x, a, k, uncond), scale)


@matching_loss_and_grad.register_fake
def _(x0, real, fake, x, a, k, uncond, scale):
    per_sample = x0.new_empty(x0.shape[0], dtype=accumulation_dtype(x0, real, fake, x, uncond))
    counts = x0.new_empty(x0.shape[0], dtype=torch.int64)
    return per_sample.new_empty(()), per_sample, torch.empty_like(per_sample), counts, x0.new_empty(x0.shape)


def _matching_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x0, real, fake, _, _, k, uncond, ctx.scale = inputs
    ctx.dtype = x0.dtype
    ctx.save_for_backward(output[1], real, fake, k, uncond)


def _matching_gradient(ctx: Any, go: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return matching_loss_backward(go, *ctx.saved_tensors, ctx.scale, ctx.dtype), *(None,) * 7


matching_loss.register_autograd(_matching_gradient, setup_context=_matching_context)


@torch.library.custom_op("dmd2::denoising_loss", mutates_args=())
def denoising_loss(
    out: Tensor, target: Tensor, weight: Tensor, x: Tensor | None, a: Tensor | None, k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(loss, per_sample); the loss is differentiable in out."""
    ops = kernels_for(out, "denoising_loss").denoising_loss
    return ops.forward(*_flat(out, target, weight, x, a, k))


@denoising_loss.register_fake
def _(out, target, weight, x, a, k):
    per_sample = out.new_empty(out.shape[0], dtype=accumulation_dtype(out, target, weight, x))
    return per_sample.new_empty(()), per_sample


@torch.library.custom_op("dmd2::denoising_loss_backward", mutates_args=())
def denoising_loss_backward(
    go: Tensor,
    out: Tensor,
    target: Tensor,
    weight: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    k: Tensor | None,
) -> Tensor:
    """The gradient of the denoising loss wrt. out."""
    ops = kernels_for(out, "denoising_loss_backward").denoising_loss
    return ops.backward(go, *_flat(out, target, weight, x, a, k))


@denoising_loss_backward.register_fake
def _(go, out, target, weight, x, a, k):
    return out.new_empty(out.shape)


def _denoising_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _denoising_gradient(ctx: Any, go: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return denoising_loss_backward(go, *ctx.saved_tensors), *(None,) * 5


denoising_loss.register_autograd(_denoising_gradient, setup_context=_denoising_context)


@torch.library.custom_op("dmd2::gan_critic_loss", mutates_args=())
def gan_critic_loss(
    gen: Tensor, data: Tensor, perturbed: Tensor | None, kind: str, r1_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, p_data, p_gen, r1) of (B,) logits; the loss is differentiable in all of them."""
    ops = kernels_for(gen, "gan_critic_loss").gan_loss
    return ops.critic_forward(*_flat(gen, data, perturbed), kind, r1_weight)


@gan_critic_loss.register_fake
def _(gen, data, perturbed, kind, r1_weight):
    dtype = accumulation_dtype(gen, data, perturbed)
    p_gen, p_data = gen.new_empty(gen.shape, dtype=dtype), data.new_empty(data.shape, dtype=dtype)
    return p_gen.new_empty(()), p_data, p_gen, p_gen.new_empty(())


@torch.library.custom_op("dmd2::gan_critic_loss_backward", mutates_args=())
def gan_critic_loss_backward(
    go: Tensor, gen: Tensor, data: Tensor, perturbed: Tensor | None, kind: str, r1_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the critic loss wrt. the logits; the last is empty without perturbed logits."""
    ops = kernels_for(gen, "gan_critic_loss_backward").gan_loss
    d_gen, d_data, d_perturbed = ops.critic_backward(go, *_flat(gen, data, perturbed), kind, r1_weight)
    return d_gen, d_data, gen.new_empty(0) if d_perturbed is None else d_perturbed


@gan_critic_loss_backward.register_fake
def _(go, gen, data, perturbed, kind, r1_weight):
    third = gen.new_empty(0) if perturbed is None else perturbed.new_empty(perturbed.shape)
    return gen.new_empty(gen.shape), data.new_empty(data.shape), third


def _critic_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.kind, ctx.r1_weight = inputs
    ctx.save_for_backward(*tensors)


def _critic_gradient(ctx: Any, go: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gen, data, perturbed = ctx.saved_tensors
    d_gen, d_data, d_perturbed = gan_critic_loss_backward(go, gen, data, perturbed, ctx.kind, ctx.r1_weight)
    return d_gen, d_data, None if perturbed is None else d_perturbed, None, None


gan_critic_loss.register_autograd(_critic_gradient, setup_context=_critic_context)


@torch.library.custom_op("dmd2::gan_generator_loss", mutates_args=())
def gan_generator_loss(gen: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(loss, p_gen) of (B,) logits; the loss is differentiable in them."""
    ops = kernels_for(gen, "gan_generator_loss").gan_loss
    return ops.generator_forward(*_flat(gen), kind)


@gan_generator_loss.register_fake
def _(gen, kind):
    p_gen = gen.new_empty(gen.shape, dtype=accumulation_dtype(gen))
    return p_gen.new_empty(()), p_gen


@torch.library.custom_op("dmd2::gan_generator_loss_backward", mutates_args=())
def gan_generator_loss_backward(go: Tensor, gen: Tensor, kind: str) -> Tensor:
    """The gradient of the generator loss wrt. the logits."""
    ops = kernels_for(gen, "gan_generator_loss_backward").gan_loss
    return ops.generator_backward(go, *_flat(gen), kind)


@gan_generator_loss_backward.register_fake
def _(go, gen, kind):
    return gen.new_empty(gen.shape)


def _generator_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gen, ctx.kind = inputs
    ctx.save_for_backward(gen)


def _generator_gradient(ctx: Any, go: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (gen,) = ctx.saved_tensors
    return gan_generator_loss_backward(go, gen, ctx.kind), None


gan_generator_loss.register_autograd(_generator_gradient, setup_context=_generator_context)
