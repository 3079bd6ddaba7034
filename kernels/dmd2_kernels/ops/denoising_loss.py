# mypy: allow-untyped-defs
"""The weighted denoising loss in Triton: head, residual, weight, loss and gradient.

    x0_hat = a x + k out,    per_sample = lambda mean (x0_hat - target)^2,    loss = mean per_sample
    d loss / d out = 2 lambda k (x0_hat - target) / (B N)

Forward reduces chunks of a sample to sum (x0_hat - target)^2, which a second launch of one program sums in a fixed
order. Backward reads the inputs again and writes the gradient; nothing of the sample's size is saved for it.

Shapes: B samples, N elements in each, K chunks of BLOCK elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype
from ._device import exact_div
from ._launch import launch, tl_accumulation
from .score_difference import chunk, sum_chunks


@triton.jit
def _residual(out, target, x, a, k, b, base, offs, mask, ACC: tl.constexpr):
    """x0_hat - target, 0 outside the sample."""
    x0_hat = tl.load(out + base + offs, mask=mask, other=0.0).to(ACC)
    if k is not None:
        at_x = tl.load(x + base + offs, mask=mask, other=0.0).to(ACC)
        x0_hat = tl.load(a + b).to(ACC) * at_x + tl.load(k + b).to(ACC) * x0_hat
    return tl.where(mask, x0_hat - tl.load(target + base + offs, mask=mask, other=0.0).to(ACC), 0.0)


@triton.jit
def _squares(
    out, target, x, a, k, partial, num, num_chunks, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, c = pid // num_chunks, pid % num_chunks
    offs = tl.arange(0, BLOCK)
    residual = _residual(out, target, x, a, k, b, b * num + c * BLOCK, offs, offs < num - c * BLOCK, ACC)
    tl.store(partial + pid, tl.sum(residual * residual))


@triton.jit
def _finish(
    partial, weight, loss, per_sample, num_samples, num, num_chunks,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    count = tl.full((), num, ACC)
    total = tl.full((), 0.0, ACC)
    for start in range(0, num_samples, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        inside = rows < num_samples
        squares = sum_chunks(partial, rows, num_samples, num_chunks, ROWS, COLS, ACC)
        each = tl.load(weight + rows, mask=inside, other=0.0).to(ACC) * exact_div(
            squares, tl.zeros((ROWS,), ACC) + count, ACC
        )
        tl.store(per_sample + rows, each, mask=inside)
        total += tl.sum(tl.where(inside, each, 0.0))
    tl.store(loss, exact_div(total, tl.full((), num_samples, ACC), ACC))


@triton.jit
def _slopes(
    go, out, target, weight, x, a, k, grad, num_samples, num, num_chunks, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, c = pid // num_chunks, pid % num_chunks
    base = b * num + c * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < num - c * BLOCK
    numel = tl.full((), num, ACC) * tl.full((), num_samples, ACC)
    slope = exact_div(2.0 * tl.load(weight + b).to(ACC) * tl.load(go).to(ACC), numel, ACC)
    if k is not None:
        slope *= tl.load(k + b).to(ACC)
    value = slope * _residual(out, target, x, a, k, b, base, offs, mask, ACC)
    tl.store(grad + base + offs, value.to(grad.dtype.element_ty), mask=mask)


def forward(
    out: Tensor, target: Tensor, weight: Tensor, x: Tensor | None, a: Tensor | None, k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(loss, per_sample) of contiguous inputs, in two launches."""
    tensors = (out, target, weight, x)
    num_samples, num = len(out), out[0].numel()
    block, num_warps = chunk(num)
    num_chunks = triton.cdiv(num, block)
    acc = tl_accumulation(*tensors)
    per_sample = out.new_empty(num_samples, dtype=accumulation_dtype(*tensors))
    loss, partial = per_sample.new_empty(()), per_sample.new_empty(num_samples, num_chunks)
    launch(
        _squares, num_samples * num_chunks, out, target, x, a, k, partial, num, num_chunks,
        BLOCK=block, ACC=acc, num_warps=num_warps,
    )  # fmt: skip
    launch(
        _finish, 1, partial, weight, loss, per_sample, num_samples, num, num_chunks,
        ROWS=64, COLS=16, ACC=acc, num_warps=4,
    )  # fmt: skip
    return loss, per_sample


def backward(
    go: Tensor,
    out: Tensor,
    target: Tensor,
    weight: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    k: Tensor | None,
) -> Tensor:
    """The gradient wrt. out times the upstream gradient go (), in one launch."""
    num_samples, num = len(out), out[0].numel()
    block, num_warps = chunk(num)
    num_chunks = triton.cdiv(num, block)
    grad = torch.empty_like(out)
    launch(
        _slopes, num_samples * num_chunks, go, out, target, weight, x, a, k, grad, num_samples, num, num_chunks,
        BLOCK=block, ACC=tl_accumulation(out, target, weight, x), num_warps=num_warps,
    )  # fmt: skip
    return grad
