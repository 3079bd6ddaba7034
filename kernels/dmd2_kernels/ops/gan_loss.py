# mypy: allow-untyped-defs
"""The GAN losses in Triton: one launch for the loss and probabilities of critic or generator, one for the gradients.

    softplus   critic  mean softplus(gen) + mean softplus(-data)        generator  mean softplus(-gen)
    hinge      critic  mean relu(1 + gen) + mean relu(1 - data)         generator  -mean gen
    r1         = mean (perturbed - data)^2

A batch has tens of logits, so a launch costs more than its work: one program processes all of them in a fixed order,
and the gradients are recomputed from the logits instead of being stored.

Shapes: B logits, which may differ between sources.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype
from ._device import exact_div, sigmoid, softplus
from ._launch import launch, tl_accumulation

BLOCK = 256


@triton.jit
def _side(logits, probabilities, num, SIGN: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The mean loss of one source, softplus(SIGN * l), relu(1 + SIGN * l) or SIGN * l; writes sigmoid(l)."""
    total = tl.full((), 0.0, ACC)
    for start in range(0, num, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < num
        v = tl.load(logits + offs, mask=mask, other=0.0).to(ACC)
        tl.store(probabilities + offs, sigmoid(v, ACC), mask=mask)
        if KIND == "softplus":
            each = softplus(SIGN * v, ACC)
        elif KIND == "hinge":
            each = tl.where(v == v, tl.maximum(1.0 + SIGN * v, 0.0), v)  # NaN stays NaN
        else:
            each = SIGN * v
        total += tl.sum(tl.where(mask, each, 0.0))
    return exact_div(total, tl.full((), num, ACC), ACC)


@triton.jit
def _slope(v, SIGN: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr):
    """The derivative of one logit's loss."""
    if KIND == "softplus":
        return SIGN * sigmoid(SIGN * v, ACC)
    if KIND == "hinge":
        return tl.where(1.0 + SIGN * v > 0.0, SIGN + v * 0.0, 0.0)
    return SIGN + v * 0.0


@triton.jit
def _critic(
    gen, data, perturbed, loss, p_data, p_gen, r1, num_gen, num_data,
    KIND: tl.constexpr, R1_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    total = _side(gen, p_gen, num_gen, 1.0, KIND, BLOCK, ACC) + _side(data, p_data, num_data, -1.0, KIND, BLOCK, ACC)
    penalty = tl.full((), 0.0, ACC)
    if perturbed is not None:
        for start in range(0, num_data, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < num_data
            v = tl.load(perturbed + offs, mask=mask, other=0.0).to(ACC)
            v -= tl.load(data + offs, mask=mask, other=0.0).to(ACC)
            penalty += tl.sum(v * v)
        penalty = exact_div(penalty, tl.full((), num_data, ACC), ACC)
        total += R1_WEIGHT * penalty
    tl.store(loss, total)
    tl.store(r1, penalty)


@triton.jit
def _critic_slopes(
    go, gen, data, perturbed, d_gen, d_data, d_perturbed, num_gen, num_data,
    KIND: tl.constexpr, R1_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    upstream = tl.load(go).to(ACC)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_gen
    v = tl.load(gen + offs, mask=mask, other=0.0).to(ACC)
    step = exact_div(upstream, tl.full((), num_gen, ACC), ACC)
    tl.store(d_gen + offs, (step * _slope(v, 1.0, KIND, ACC)).to(d_gen.dtype.element_ty), mask=mask)
    mask = offs < num_data
    v = tl.load(data + offs, mask=mask, other=0.0).to(ACC)
    step = exact_div(upstream, tl.full((), num_data, ACC), ACC)
    slope = step * _slope(v, -1.0, KIND, ACC)
    if perturbed is not None:
        pull = 2.0 * R1_WEIGHT * step * (tl.load(perturbed + offs, mask=mask, other=0.0).to(ACC) - v)
        tl.store(d_perturbed + offs, pull.to(d_perturbed.dtype.element_ty), mask=mask)
        slope -= pull
    tl.store(d_data + offs, slope.to(d_data.dtype.element_ty), mask=mask)


@triton.jit
def _generator(gen, loss, p_gen, num, KIND: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    tl.store(loss, _side(gen, p_gen, num, -1.0, KIND, BLOCK, ACC))


@triton.jit
def _generator_slopes(go, gen, d_gen, num, KIND: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num
    v = tl.load(gen + offs, mask=mask, other=0.0).to(ACC)
    step = exact_div(tl.load(go).to(ACC), tl.full((), num, ACC), ACC)
    tl.store(d_gen + offs, (step * _slope(v, -1.0, KIND, ACC)).to(d_gen.dtype.element_ty), mask=mask)


def _generator_kind(kind: str) -> str:
    return "linear" if kind == "hinge" else kind


def critic_forward(
    gen: Tensor, data: Tensor, perturbed: Tensor | None, kind: str, r1_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, p_data, p_gen, r1) of contiguous (B,) logits, in one launch."""
    dtype = accumulation_dtype(gen, data, perturbed)
    loss, r1 = gen.new_empty((), dtype=dtype), gen.new_empty((), dtype=dtype)
    p_gen, p_data = torch.empty_like(gen, dtype=dtype), torch.empty_like(data, dtype=dtype)
    launch(
        _critic, 1, gen, data, perturbed, loss, p_data, p_gen, r1, len(gen), len(data),
        KIND=kind, R1_WEIGHT=r1_weight, BLOCK=BLOCK, ACC=tl_accumulation(gen, data, perturbed), num_warps=4,
    )  # fmt: skip
    return loss, p_data, p_gen, r1


def critic_backward(
    go: Tensor, gen: Tensor, data: Tensor, perturbed: Tensor | None, kind: str, r1_weight: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients wrt. the logits times the upstream gradient go (), in one launch."""
    d_gen, d_data = torch.empty_like(gen), torch.empty_like(data)
    d_perturbed = None if perturbed is None else torch.empty_like(perturbed)
    launch(
        _critic_slopes, triton.cdiv(max(len(gen), len(data)), BLOCK),
        go, gen, data, perturbed, d_gen, d_data, d_perturbed, len(gen), len(data),
        KIND=kind, R1_WEIGHT=r1_weight, BLOCK=BLOCK, ACC=tl_accumulation(gen, data, perturbed), num_warps=4,
    )  # fmt: skip
    return d_gen, d_data, d_perturbed


def generator_forward(gen: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(loss, p_gen) of contiguous (B,) logits, in one launch."""
    dtype = accumulation_dtype(gen)
    loss, p_gen = gen.new_empty((), dtype=dtype), torch.empty_like(gen, dtype=dtype)
    launch(
        _generator, 1, gen, loss, p_gen, len(gen),
        KIND=_generator_kind(kind), BLOCK=BLOCK, ACC=tl_accumulation(gen), num_warps=4,
    )  # fmt: skip
    return loss, p_gen


def generator_backward(go: Tensor, gen: Tensor, kind: str) -> Tensor:
    """The gradient wrt. the logits times the upstream gradient go (), in one launch."""
    d_gen = torch.empty_like(gen)
    launch(
        _generator_slopes, triton.cdiv(len(gen), BLOCK), go, gen, d_gen, len(gen),
        KIND=_generator_kind(kind), BLOCK=BLOCK, ACC=tl_accumulation(gen), num_warps=4,
    )  # fmt: skip
    return d_gen
