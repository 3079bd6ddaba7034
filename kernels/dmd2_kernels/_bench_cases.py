"""Benchmark cases: each op at the shapes of DMD2, in eager torch and fused.

Shapes: B batch, C channels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dmd2_kernels as dk

from . import shapes

Forward = Callable[..., Tensor]


class Case(NamedTuple):
    """One op at one shape: its inputs, and functions that return a tensor to differentiate."""

    op: str
    name: str
    dtype: torch.dtype
    memory_format: str
    inputs: Callable[[str], tuple[Tensor, ...]]  # by device; the first `num_leaves` require gradients
    num_leaves: int
    eager: Forward | None  # None: the case has the form of a training step alone
    fused: Forward | None
    calls_per_step: float  # in an average ImageNet-64 step; 0 for other models
    step: Callable[..., Any] | None = None  # losses: the form that a training step takes, gradients and sums


def eager_matching(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """The published expression for x0 predictions."""
    with torch.no_grad():
        p_real, p_fake = x0 - real, x0 - fake
        g = torch.nan_to_num((p_real - p_fake) / p_real.abs().mean(dim=(1, 2, 3), keepdim=True))
    return 0.5 * F.mse_loss(x0.float(), (x0 - g).detach().float())


def eager_matching_epsilon(
    x0: Tensor, real: Tensor, fake: Tensor, x: Tensor, uncond: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """The published expression for guided noise predictions, in float32."""
    with torch.no_grad():
        a, s = alpha[:, None, None, None], sigma[:, None, None, None]
        real = uncond + 8.0 * (real - uncond)
        x0_real, x0_fake = (x - s * real) / a, (x - s * fake) / a
    return eager_matching(x0, x0_real, x0_fake)


def fused_matching_epsilon(
    x0: Tensor, real: Tensor, fake: Tensor, x: Tensor, uncond: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """The same in one op."""
    head = dk.LinearHead.epsilon(alpha, sigma)
    return dk.matching_loss(x0, real, fake, x=x, head=head, real_uncond=uncond, guidance_scale=8.0).loss


def eager_denoising(out: Tensor, target: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """EDM's weighted loss on a preconditioned output."""
    s = sigma[:, None, None, None]
    x0_hat = 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25).sqrt() * out.float()
    return ((s**-2 + 4) * (x0_hat - target) ** 2).mean()


def fused_denoising(out: Tensor, target: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The same in one op."""
    return dk.denoising_loss(out, target, sigma**-2 + 4, x=x, head=dk.LinearHead.edm(sigma, 0.5)).loss


def step_matching(x0: Tensor, real: Tensor, fake: Tensor) -> Any:
    """Gradient and sums of x0 predictions."""
    return dk.matching_loss_and_grad(x0, real, fake)


def step_matching_epsilon(
    x0: Tensor, real: Tensor, fake: Tensor, x: Tensor, uncond: Tensor, alpha: Tensor, sigma: Tensor
) -> Any:
    """Gradient and sums of guided noise predictions."""
    head = dk.LinearHead(1 / alpha, -sigma / alpha)
    return dk.matching_loss_and_grad(x0, real, fake, x=x, head=head, real_uncond=uncond, guidance_scale=8.0)


def step_matching_raw(x0: Tensor, real: Tensor, fake: Tensor, x: Tensor, a: Tensor, k: Tensor) -> Any:
    """Gradient and sums of raw outputs with their head."""
    return dk.matching_loss_and_grad(x0, real, fake, x=x, head=dk.LinearHead(a, k))


def step_denoising(out: Tensor, target: Tensor, x: Tensor, sigma: Tensor) -> Any:
    """Gradient and sums of EDM's weighted loss."""
    return dk.denoising_loss_and_grad(out, target, sigma**-2 + 4, x=x, head=dk.LinearHead.edm(sigma, 0.5))


def step_denoising_raw(out: Tensor, target: Tensor, x: Tensor, a: Tensor, k: Tensor, weight: Tensor) -> Any:
    """The same with head and weight at hand, as in a training step."""
    return dk.denoising_loss_and_grad(out, target, weight, x=x, head=dk.LinearHead(a, k))


def step_iteration(x0: Tensor, real: Tensor, fake: Tensor, x: Tensor, *rest: Tensor) -> Any:
    """Every loss of an iteration that updates both networks, as the trainer calls them: raw outputs, GAN.

    rest: the critic's output, its target and noisy input in its own turn, two parts of a head, weight (B,), three
    sources of logits (B,) and, for a guided teacher, its unconditional output.
    """
    out, target, x_critic, a, k, weight, judged, gen, data, *uncond = rest
    head = dk.LinearHead(a, k)
    guided = {"real_uncond": uncond[0], "guidance_scale": 8.0} if uncond else {}
    return (
        dk.matching_loss_and_grad(x0, real, fake, x=x, head=head, **guided),  # type: ignore[arg-type]
        dk.gan_generator_loss_and_grad(judged),
        dk.denoising_loss_and_grad(out, target, weight, x=x_critic, head=head),
        dk.gan_critic_loss_and_grad(gen, data),
    )


def eager_critic(gen: Tensor, data: Tensor) -> Tensor:
    """The critic's loss and the two probabilities that a run logs."""
    gen.detach().sigmoid(), data.detach().sigmoid()
    return F.softplus(gen).mean() + F.softplus(-data).mean()


def eager_generator(gen: Tensor) -> Tensor:
    """The generator's loss and the probability that a run logs."""
    gen.detach().sigmoid()
    return F.softplus(-gen).mean()


def eager_norm(x: Tensor, weight: Tensor, bias: Tensor, *rows: Tensor) -> Tensor:
    """GroupNorm, scale and shift, SiLU as in EDM's U-Net."""
    z = F.group_norm(x, 32, weight.to(x.dtype), bias.to(x.dtype))
    if rows:
        scale, shift = (row[:, :, None, None] for row in rows)
        z = torch.addcmul(shift, z, scale + 1)
    return F.silu(z)


def fused_norm(x: Tensor, weight: Tensor, bias: Tensor, *rows: Tensor) -> Tensor:
    """The same in one op."""
    scale, shift = rows or (None, None)
    return dk.group_norm_silu(x, 32, weight, bias, scale=scale, shift=shift)


def _images(
    shape: tuple[int, ...], dtype: torch.dtype, num: int, *vectors: float
) -> Callable[[str], tuple[Tensor, ...]]:
    def make(device: str) -> tuple[Tensor, ...]:
        return (
            *(torch.randn(shape, dtype=dtype, device=device) for _ in range(num)),
            *(torch.full(shape[:1], value, device=device) for value in vectors),
        )

    return make


def _raw(
    shape: tuple[int, ...], images: int, outputs: tuple[int, ...], vectors: int
) -> Callable[[str], tuple[Tensor, ...]]:
    """`images` tensors, then `vectors` per sample; those in `outputs` as a network leaves them: bf16, channels_last."""

    def make(device: str) -> tuple[Tensor, ...]:
        made = [torch.randn(shape, device=device) for _ in range(images)]
        for i in outputs:
            made[i] = made[i].to(torch.bfloat16, memory_format=torch.channels_last)
        return (*made, *(torch.rand(shape[0], device=device) + 0.5 for _ in range(vectors)))

    return make


def _iteration(shape: tuple[int, ...], guided: bool) -> Callable[[str], tuple[Tensor, ...]]:
    def make(device: str) -> tuple[Tensor, ...]:
        x0, real, fake, x, out, target, x_critic, uncond, *vectors = _raw(shape, 8, (1, 2, 4, 7), 6)(device)
        return (x0, real, fake, x, out, target, x_critic, *vectors, *([uncond] if guided else []))

    return make


def _norm(
    op: str, name: str, shape: tuple[int, ...], dtype: torch.dtype, nhwc: bool, adaptive: bool, calls: float
) -> Case:
    def make(device: str) -> tuple[Tensor, ...]:
        x = torch.randn(shape, dtype=dtype, device=device)
        x = x.contiguous(memory_format=torch.channels_last) if nhwc else x
        rows = torch.randn(2, *shape[:2], dtype=dtype, device=device).unbind() if adaptive else ()
        return x, torch.ones(shape[1], device=device), torch.zeros(shape[1], device=device), *rows

    layout = "channels_last" if nhwc else "contiguous"
    return Case(op, name, dtype, layout, make, 5 if adaptive else 3, eager_norm, fused_norm, calls)


def cases() -> list[Case]:
    """Every case, losses first."""
    image, sdxl = shapes.LOSSES["imagenet"], shapes.LOSSES["sdxl"]
    per, half, full = shapes.UPDATES, torch.bfloat16, torch.float32
    found = [
        Case("matching", "imagenet", full, "contiguous", _images(image, full, 3), 1, eager_matching,
             lambda x0, real, fake: dk.matching_loss(x0, real, fake).loss, per["matching"], step_matching),
        Case("matching", "sdxl-guided", full, "contiguous", _images(sdxl, full, 5, 0.07, 0.9975), 1,
             eager_matching_epsilon, fused_matching_epsilon, 0, step_matching_epsilon),
        Case("denoising", "imagenet-edm", full, "contiguous", _images(image, full, 3, 2.0), 1,
             eager_denoising, fused_denoising, per["denoising"], step_denoising),
        Case("gan-critic", "imagenet", full, "contiguous", _images((40, 1), full, 2), 2, eager_critic,
             lambda gen, data: dk.gan_critic_loss(gen, data).loss, per["gan-critic"],
             dk.gan_critic_loss_and_grad),
        Case("gan-generator", "imagenet", full, "contiguous", _images((40, 1), full, 1), 1, eager_generator,
             lambda gen: dk.gan_generator_loss(gen).loss, per["gan-generator"], dk.gan_generator_loss_and_grad),
        Case("matching", "imagenet-raw", half, "channels_last", _raw(image, 4, (1, 2), 2), 1, None, None,
             per["matching"], step_matching_raw),
        Case("denoising", "imagenet-raw", half, "channels_last", _raw(image, 3, (0,), 3), 1, None, None,
             per["denoising"], step_denoising_raw),
        Case("iteration", "imagenet", half, "channels_last", _iteration(image, guided=False), 1, None, None, 0,
             step_iteration),
        Case("iteration", "sdxl-guided", half, "channels_last", _iteration(sdxl, guided=True), 1, None, None, 0,
             step_iteration),
    ]  # fmt: skip
    for name, shape in shapes.HEAD_NORMS.items():
        found += [_norm("norm", name, (*shape, shape[-1]), full, nhwc, False, 0) for nhwc in (False, True)]
    for (channels, side), layers in shapes.ADM_LAYERS.items():
        features, name = (image[0], channels, side, side), f"adm-{channels}x{side}"
        calls = layers * shapes.FULL_PASSES
        found += [_norm("adaptive-norm", name, features, half, nhwc, True, calls) for nhwc in (False, True)]
    return found
