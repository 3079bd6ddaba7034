# mypy: allow-untyped-defs
"""The weighted denoising loss in Triton: head, residual, weight, gradient and its sums, in one launch at any size.

    x0_hat = a x + k out,    loss = mean_b lambda mean_n (x0_hat - target)^2
    d loss / d out = 2 lambda k (x0_hat - target) / (B N)

The gradient needs no reduction: each program reads its chunk of a sample once, writes the gradient once and the chunk's
part of the loss, lambda sum (x0_hat - target)^2 / (B N), beside it. No launch adds the parts. Layouts as in
`score_difference.py`.

Shapes: B samples, N elements in each, K chunks of BLOCK elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _chunks
from ..reference import accumulation_dtype
from ._device import exact_div
from ._launch import launch, tl_accumulation
from .score_difference import image_place


@triton.jit
def _residual(out, target, x, a, k, b, raw, offs, base, image, mask, ACC: tl.constexpr):
    """x0_hat - target, 0 outside the sample."""
    x0_hat = tl.load(out + raw + offs, mask=mask, other=0.0).to(ACC)
    if k is not None:
        at_x = tl.load(x + base + image, mask=mask, other=0.0).to(ACC)
        x0_hat = tl.load(a + b).to(ACC) * at_x + tl.load(k + b).to(ACC) * x0_hat
    return tl.where(mask, x0_hat - tl.load(target + base + image, mask=mask, other=0.0).to(ACC), 0.0)


@triton.jit
def _loss_and_grad(
    out, target, weight, x, a, k, grad, terms, num_samples, num, num_chunks,
    SCALE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, c = pid // num_chunks, pid % num_chunks
    raw, offs = b * num + c * BLOCK, tl.arange(0, BLOCK)
    mask = offs < num - c * BLOCK
    base, image = image_place(b, c * BLOCK, offs, num, CHANNELS)
    residual = _residual(out, target, x, a, k, b, raw, offs, base, image, mask, ACC)
    numel = tl.full((), num, ACC) * tl.full((), num_samples, ACC)
    share = exact_div(tl.load(weight + b).to(ACC), numel, ACC)
    tl.store(terms + pid, share * tl.sum(residual * residual))
    if grad is not None:
        slope = 2.0 * SCALE * share
        if k is not None:
            slope *= tl.load(k + b).to(ACC)
        tl.store(grad + raw + offs, (slope * residual).to(grad.dtype.element_ty), mask=mask)


def loss_and_grad(
    out: Tensor,
    target: Tensor,
    weight: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    k: Tensor | None,
    scale: float,
    channels: int,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """The parts of the loss (B * K,), and the gradient wrt. out, in out's layout, if it has a dtype; in one launch.

    Inputs are dense and in one layout, or, with `channels` above 1, target and x are contiguous and out is
    channels_last.
    """
    tensors = (out, target, weight, x)
    num_samples, num = len(out), out[0].numel()
    block, num_warps = _chunks.chunk(num)
    num_chunks = triton.cdiv(num, block)
    terms = out.new_empty(num_samples * num_chunks, dtype=accumulation_dtype(*tensors))
    grad = None if grad_dtype is None else torch.empty_like(out, dtype=grad_dtype)
    launch(
        _loss_and_grad, num_samples * num_chunks, out, target, weight, x, a, k, grad, terms,
        num_samples, num, num_chunks,
        SCALE=scale, CHANNELS=channels, BLOCK=block, ACC=tl_accumulation(*tensors), num_warps=num_warps,
    )  # fmt: skip
    return terms, grad
