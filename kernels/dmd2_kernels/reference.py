"""The definition of every op in plain torch, with the paper's formulas; runs on CPU.

Arithmetic is float32 for any input dtype (float64 if one of them is float64), rounded once at the end. Each loss is
returned with its gradients in closed form; `_attach.py` passes them to autograd. The Triton kernels implement the same
formulas.

Shapes: B batch, C channels, N elements of one sample, G groups. Arguments are checked by the caller.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._types import LinearHead, MatchingSums


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the arithmetic: float64 if any tensor is, else float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes (B,) to (B, 1, 1, ...), which broadcasts with `like`, in its dtype."""
    return values.to(like.dtype).view(-1, *(1,) * (like.ndim - 1))


def matching(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    x: Tensor | None,
    head: LinearHead | None,
    real_uncond: Tensor | None,
    guidance_scale: float,
    factor: Tensor | None = None,
) -> tuple[MatchingSums, Tensor]:
    """The distribution-matching loss (arXiv 2405.14867 section 3) and its gradient with respect to x0.

    real (guided)   r = u + s * (c - u)               classifier-free guidance of the teacher
    x0_real         = a * x + k * r,                  x0_fake = a * x + k * fake
    d               = x0_fake - x0_real = k * (fake - r)                 x cancels
    weight          w = mean_n |x0 - x0_real|                            per sample (arXiv 2311.18828 section 3.2)
    g               = d / w; then NaN -> 0 and +-inf -> the largest finite number
    loss            = mean_bn h_b g^2 / 2,            d loss / d x0 = h_b g / (B * N)

    h is the per-sample factor, 1 if it is None: f-divergence weighting (arXiv 2502.15681).
    """
    dtype = accumulation_dtype(x0, real, fake, x, real_uncond, factor)
    x0, real, fake = x0.to(dtype), real.to(dtype), fake.to(dtype)
    if real_uncond is not None:
        real = torch.lerp(real_uncond.to(dtype), real, guidance_scale)
    difference, x0_real = fake - real, real
    if head is not None and x is not None:
        k = per_sample(head.k, difference)
        difference.mul_(k)
        x0_real = torch.addcmul(per_sample(head.a, real) * x, k, real)
    num = x0[0].numel()
    weight = (x0 - x0_real).abs_().flatten(1).mean(1)
    g = difference.div_(per_sample(weight, difference)).flatten(1)
    num_nonfinite = torch.count_nonzero(g * 0, dim=1)  # NaN counts, as g * 0 is NaN where g is not finite
    g.nan_to_num_(nan=0.0)
    sq_norm = torch.linalg.vecdot(g, g)
    weighted = sq_norm
    if factor is not None:
        weighted = sq_norm * factor.to(dtype)
        g.mul_(factor.to(dtype)[:, None])
    loss = weighted.sum() / (2 * num * len(x0))
    grad = g.div_(num * len(x0)).view(x0.shape)
    return MatchingSums(loss.view(1), weight, sq_norm[:, None], num_nonfinite[:, None]), grad


def denoising(
    out: Tensor, target: Tensor, weight: Tensor, x: Tensor | None, head: LinearHead | None, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weighted denoising loss, per-sample values, and the gradient wrt. out (arXiv 2405.14867 section 3).

    x0_hat     = a * x + k * out, or out itself
    per_sample = lambda_b * mean_n (x0_hat - target)^2,     loss = mean_b per_sample
    d loss / d out = 2 * lambda_b * k_b * (x0_hat - target) / (B * N)
    """
    dtype = accumulation_dtype(out, target, weight, x)
    x0_hat = out.to(dtype)
    if head is not None and x is not None:
        x0_hat = torch.addcmul(per_sample(head.a, x0_hat) * x, per_sample(head.k, x0_hat), x0_hat)
    residual = (x0_hat - target).flatten(1)
    num = residual.shape[1]
    weight = weight.to(dtype)
    each = weight * torch.linalg.vecdot(residual, residual) / num
    loss = each.mean()
    if not need_grad:
        return loss, each, None
    slope = weight * (2.0 / (num * len(out)))
    if head is not None:
        slope = slope * head.k
    return loss, each, residual.mul_(slope[:, None]).view(out.shape)


def gan_critic(
    gen: Tensor, data: Tensor, perturbed: Tensor | None, kind: str, r1_weight: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(loss, p_data, p_gen, r1) and the gradients wrt. the (B,) logits (arXiv 2405.14867 section 4.3).

    softplus   mean softplus(gen) + mean softplus(-data)        slopes  p(gen),  p(data) - 1
    hinge      mean relu(1 + gen) + mean relu(1 - data)         slopes  [gen > -1],  -[data < 1]
    r1         = mean (perturbed - data)^2, added with its weight: the approximate R1 of arXiv 2501.08316
    """
    dtype = accumulation_dtype(gen, data, perturbed)
    gen, data = gen.to(dtype), data.to(dtype)
    p_gen, p_data = gen.sigmoid(), data.sigmoid()
    if kind == "softplus":
        loss = -F.logsigmoid(-gen).mean() - F.logsigmoid(data).mean()
        slope_gen, slope_data = p_gen / len(gen), -(-data).sigmoid() / len(data)
    else:
        loss = F.relu(1 + gen).mean() + F.relu(1 - data).mean()
        slope_gen, slope_data = (gen > -1).to(dtype) / len(gen), -(data < 1).to(dtype) / len(data)
    if perturbed is None:
        return (loss, p_data, p_gen, torch.zeros_like(loss)), (slope_gen, slope_data)
    change = perturbed.to(dtype) - data
    r1 = change.square().mean()
    pull = change * (2 * r1_weight / len(data))
    return (loss + r1_weight * r1, p_data, p_gen, r1), (slope_gen, slope_data - pull, pull)


def gan_generator(gen: Tensor, kind: str) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(loss, p_gen) and the gradient wrt. the (B,) logits.

    softplus   mean softplus(-gen)        slope  p(gen) - 1
    hinge      -mean gen                  slope  -1
    """
    gen = gen.to(accumulation_dtype(gen))
    p_gen = gen.sigmoid()
    if kind == "softplus":
        return (-F.logsigmoid(gen).mean(), p_gen), -(-gen).sigmoid() / len(gen)
    return (-gen.mean(), p_gen), torch.full_like(gen, -1 / len(gen))


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    """GroupNorm, then the adaptive scale and shift if given, then SiLU: silu(norm(x) * (1 + scale) + shift)."""
    dtype = accumulation_dtype(x)
    z = F.group_norm(x.to(dtype), num_groups, weight.to(dtype), bias.to(dtype), eps)
    if scale is not None and shift is not None:
        ones = (1,) * (x.ndim - 2)
        gain = (scale.to(dtype) + 1).view(*scale.shape, *ones)
        z = torch.addcmul(shift.to(dtype).view(*shift.shape, *ones), z, gain)
    return (F.silu(z) if silu else z).to(x.dtype)


def add_channels(x: Tensor, channel_bias: Tensor) -> Tensor:
    """x (B, C, ...) + channel_bias (C,) or (B, C), in the dtype of the arithmetic and rounded to x's."""
    dtype = accumulation_dtype(x)
    bias = channel_bias.to(dtype)
    return (x.to(dtype) + bias.reshape(*(bias.shape if bias.ndim == 2 else (1, -1)), *(1,) * (x.ndim - 2))).to(x.dtype)


def residual_sum(x: Tensor, residual: Tensor, channel_bias: Tensor | None, scale: float) -> Tensor:
    """scale * (x + channel_bias + residual), rounded once to x's dtype."""
    dtype = accumulation_dtype(x, residual)
    total = x.to(dtype) if channel_bias is None else add_channels(x.to(dtype), channel_bias)
    return (scale * (total + residual.to(dtype))).to(x.dtype)
