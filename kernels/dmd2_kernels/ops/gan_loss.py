# mypy: allow-untyped-defs
"""The GAN losses in Triton: gradients, parts of the loss and, on request, probabilities, in one launch each.

    softplus   critic  mean softplus(gen) + mean softplus(-data)        generator  mean softplus(-gen)
    hinge      critic  mean relu(1 + gen) + mean relu(1 - data)         generator  -mean gen
    r1         = mean (perturbed - data)^2

A program reads up to 1,024 logits of each source once and writes their gradients and its parts of the means, so up to
as many there is one part, which is the loss itself. No launch adds several.

Shapes: B logits, which may differ between sources; T programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _chunks
from ..reference import accumulation_dtype
from ._device import exact_div, sigmoid, softplus
from ._launch import launch, tl_accumulation


@triton.jit
def _loss(v, SIGN: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr):
    """One logit's loss: softplus(SIGN * l), relu(1 + SIGN * l) or SIGN * l."""
    if KIND == "softplus":
        return softplus(SIGN * v, ACC)
    if KIND == "hinge":
        return tl.where(v == v, tl.maximum(1.0 + SIGN * v, 0.0), v)  # NaN stays NaN
    return SIGN * v


@triton.jit
def _slope(v, SIGN: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr):
    """The derivative of one logit's loss."""
    if KIND == "softplus":
        return SIGN * sigmoid(SIGN * v, ACC)
    if KIND == "hinge":
        return tl.where(1.0 + SIGN * v > 0.0, SIGN + v * 0.0, 0.0)
    return SIGN + v * 0.0


@triton.jit
def _mean_loss(v, mask, num, SIGN: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr):
    """The part of the mean over `num` logits that is in this program."""
    return exact_div(tl.sum(tl.where(mask, _loss(v, SIGN, KIND, ACC), 0.0)), tl.full((), num, ACC), ACC)


@triton.jit
def _correct(v, mask, num, SIGN: tl.constexpr, ACC: tl.constexpr):
    """The part of the share of logits on the right side of 0, SIGN * l < 0."""
    return exact_div(tl.sum(tl.where(mask & (SIGN * v < 0.0), 1.0, 0.0)).to(ACC), tl.full((), num, ACC), ACC)


@triton.jit
def _critic(
    gen, data, perturbed, d_gen, d_data, d_perturbed, terms, correct, r1, p_gen, p_data, num_gen, num_data,
    KIND: tl.constexpr, R1_WEIGHT: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_gen
    v = tl.load(gen + offs, mask=mask, other=0.0).to(ACC)
    total = _mean_loss(v, mask, num_gen, 1.0, KIND, ACC)
    right = _correct(v, mask, num_gen, 1.0, ACC)
    step = exact_div(tl.full((), SCALE, ACC), tl.full((), num_gen, ACC), ACC)
    tl.store(d_gen + offs, (step * _slope(v, 1.0, KIND, ACC)).to(d_gen.dtype.element_ty), mask=mask)
    if p_gen is not None:
        tl.store(p_gen + offs, sigmoid(v, ACC), mask=mask)

    mask = offs < num_data
    v = tl.load(data + offs, mask=mask, other=0.0).to(ACC)
    total += _mean_loss(v, mask, num_data, -1.0, KIND, ACC)
    right += _correct(v, mask, num_data, -1.0, ACC)
    step = exact_div(tl.full((), SCALE, ACC), tl.full((), num_data, ACC), ACC)
    slope = step * _slope(v, -1.0, KIND, ACC)
    if p_data is not None:
        tl.store(p_data + offs, sigmoid(v, ACC), mask=mask)
    penalty = tl.full((), 0.0, ACC)
    if perturbed is not None:
        change = tl.load(perturbed + offs, mask=mask, other=0.0).to(ACC) - v
        pull = 2.0 * R1_WEIGHT * step * change
        tl.store(d_perturbed + offs, pull.to(d_perturbed.dtype.element_ty), mask=mask)
        slope -= pull
        penalty = exact_div(tl.sum(tl.where(mask, change * change, 0.0)), tl.full((), num_data, ACC), ACC)
        total += R1_WEIGHT * penalty
    tl.store(d_data + offs, slope.to(d_data.dtype.element_ty), mask=mask)
    tl.store(terms + pid, total)
    tl.store(correct + pid, 0.5 * right)
    tl.store(r1 + pid, penalty)


@triton.jit
def _generator(
    gen, d_gen, terms, p_gen, num, KIND: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num
    v = tl.load(gen + offs, mask=mask, other=0.0).to(ACC)
    step = exact_div(tl.full((), SCALE, ACC), tl.full((), num, ACC), ACC)
    tl.store(d_gen + offs, (step * _slope(v, -1.0, KIND, ACC)).to(d_gen.dtype.element_ty), mask=mask)
    tl.store(terms + pid, _mean_loss(v, mask, num, -1.0, KIND, ACC))
    if p_gen is not None:
        tl.store(p_gen + offs, sigmoid(v, ACC), mask=mask)


def critic_loss_and_grad(
    gen: Tensor,
    data: Tensor,
    perturbed: Tensor | None,
    kind: str,
    r1_weight: float,
    scale: float,
    probabilities: bool,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    """(terms, correct, r1) of shape (T,), p_data, p_gen and the gradients wrt. gen, data and perturbed, in one launch.

    Of contiguous (B,) logits. Without `probabilities` or `perturbed` those are empty. A gradient has its logits' dtype
    if none is given.
    """
    dtype = accumulation_dtype(gen, data, perturbed)
    parts = gen.new_empty(_chunks.gan_terms(gen, data), dtype=dtype)
    out = (parts, torch.empty_like(parts), torch.empty_like(parts))
    p_data, p_gen = (torch.empty_like(t, dtype=dtype) if probabilities else None for t in (data, gen))
    d_gen, d_data = (torch.empty_like(t, dtype=grad_dtype) for t in (gen, data))
    d_perturbed = None if perturbed is None else torch.empty_like(perturbed, dtype=grad_dtype)
    launch(
        _critic, len(parts), gen, data, perturbed, d_gen, d_data, d_perturbed, *out, p_gen, p_data,
        len(gen), len(data),
        KIND=kind, R1_WEIGHT=r1_weight, SCALE=scale, BLOCK=_block(gen, data),
        ACC=tl_accumulation(gen, data, perturbed), num_warps=4,
    )  # fmt: skip
    return *out, *(gen.new_empty(0) if t is None else t for t in (p_data, p_gen, d_gen, d_data, d_perturbed))


def generator_loss_and_grad(
    gen: Tensor, kind: str, scale: float, probabilities: bool, grad_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """terms (T,), p_gen (empty without `probabilities`) and the gradient wrt. contiguous (B,) logits, in one launch."""
    dtype = accumulation_dtype(gen)
    terms, d_gen = gen.new_empty(_chunks.gan_terms(gen), dtype=dtype), torch.empty_like(gen, dtype=grad_dtype)
    p_gen = torch.empty_like(gen, dtype=dtype) if probabilities else None
    launch(
        _generator, len(terms), gen, d_gen, terms, p_gen, len(gen),
        KIND="linear" if kind == "hinge" else kind, SCALE=scale, BLOCK=_block(gen), ACC=tl_accumulation(gen),
        num_warps=4,
    )  # fmt: skip
    return terms, gen.new_empty(0) if p_gen is None else p_gen, d_gen


def _block(*logits: Tensor) -> int:
    """A power of two, no larger than holds all logits."""
    return min(_chunks.LOGITS, max(128, triton.next_power_of_2(max(map(len, logits)))))
