# mypy: allow-untyped-defs
"""The distribution-matching loss in Triton: guidance, head, normaliser, loss and gradient.

With r the guided teacher and f the critic, both with the same head (a, k) at the same noisy x,

    d = x0_fake - x0_real = (a x + k f) - (a x + k r) = k (f - r),

so the direction needs neither x0 nor x, and nothing large cancels for a large k (k = 14.6 at SD's last timestep);
only the normaliser w = mean |x0 - x0_real| needs x0 and x. Division by w is deferred: a forward program reduces its
chunk of a sample to sum |x0 - x0_real|, sum d^2 and the count of non-finite d, and `_finish` then computes

    w = S1 / N,    sum g^2 = (sqrt(S2) / w)^2,    loss = sum_b sum g^2 / (2 B N).

Backward recomputes d and writes g / (B N) times the upstream gradient. So a sample may have any number of programs,
without atomics, a grid barrier or a second read of x0, and sums have a fixed order. `_whole_sample` keeps a sample of
up to 16,384 elements in registers, with minimum traffic for loss and gradient: x0, r and f read once, g written once.

Special values are as in the reference: w = 0 makes 0/0 a 0 and d/0 the largest number, and all of g counts as
non-finite; NaN in w makes the sample's g 0; NaN in d makes that element 0. Due to the deferred division only: |d| above
1.8e19 overflows S2 (loss inf), below 1e-23 underflows it, and a finite d whose d / w overflows is not counted.

Shapes: B samples, N elements in each, K chunks of BLOCK elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype
from ._device import exact_div, is_nonfinite, nan_to_num
from ._launch import launch, tl_accumulation

WHOLE_SAMPLE = 16_384  # the largest sample that one program keeps in registers without spilling


def chunk(num: int) -> tuple[int, int]:
    """(BLOCK, warps) from the elements of a sample only, so that results are equal across GPUs and batch sizes."""
    if num <= 4096:
        return 1024, 4
    return (2048, 4) if num <= 16_384 else (4096, 8)


@triton.jit
def _difference(real, fake, k, uncond, b, base, offs, mask, SCALE: tl.constexpr, ACC: tl.constexpr):
    """(r, d): the guided teacher, raw, and d = k (f - r)."""
    r = tl.load(real + base + offs, mask=mask, other=0.0).to(ACC)
    f = tl.load(fake + base + offs, mask=mask, other=0.0).to(ACC)
    if uncond is not None:
        u = tl.load(uncond + base + offs, mask=mask, other=0.0).to(ACC)
        r = u + SCALE * (r - u)
    d = f - r
    if k is not None:
        d *= tl.load(k + b).to(ACC)
    return r, d


@triton.jit
def _distance(x0, x, a, k, r, b, base, offs, mask, ACC: tl.constexpr):
    """|x0 - x0_real|, 0 outside the sample."""
    if k is not None:
        at_x = tl.load(x + base + offs, mask=mask, other=0.0).to(ACC)
        r = tl.load(a + b).to(ACC) * at_x + tl.load(k + b).to(ACC) * r
    v = tl.load(x0 + base + offs, mask=mask, other=0.0).to(ACC)
    return tl.where(mask, tl.abs(v - r), 0.0)


@triton.jit
def _partial_sums(
    x0, real, fake, x, a, k, uncond, partial, num_samples, num, num_chunks,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, c = pid // num_chunks, pid % num_chunks
    base = b * num + c * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < num - c * BLOCK
    r, d = _difference(real, fake, k, uncond, b, base, offs, mask, SCALE, ACC)
    distance = _distance(x0, x, a, k, r, b, base, offs, mask, ACC)
    bad = tl.where(mask & is_nonfinite(d), 1.0, 0.0)
    d = tl.where(mask & (d == d), d, 0.0)
    stride = tl.full((), num_samples, tl.int64) * num_chunks  # partial: (3, B, K)
    tl.store(partial + pid, tl.sum(distance))
    tl.store(partial + stride + pid, tl.sum(d * d))
    tl.store(partial + 2 * stride + pid, tl.sum(bad).to(ACC))


@triton.jit
def sum_chunks(partial, rows, num_samples, num_chunks, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr):
    """The sums over K of ROWS rows of one (B, K) table, in one order."""
    total = tl.zeros((ROWS, COLS), ACC)
    for start in range(0, num_chunks, COLS):
        cols = start + tl.arange(0, COLS)
        mask = (rows < num_samples)[:, None] & (cols < num_chunks)[None, :]
        total += tl.load(partial + rows[:, None] * num_chunks + cols[None, :], mask=mask, other=0.0).to(ACC)
    return tl.sum(total, 1)


@triton.jit
def _finish(
    partial, loss, weight, sq_norm, num_nonfinite, num_samples, num, num_chunks,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    count = tl.full((), num, ACC)
    stride = tl.full((), num_samples, tl.int64) * num_chunks
    total = tl.full((), 0.0, ACC)
    for start in range(0, num_samples, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        mask = rows < num_samples
        s1 = sum_chunks(partial, rows, num_samples, num_chunks, ROWS, COLS, ACC)
        s2 = sum_chunks(partial + stride, rows, num_samples, num_chunks, ROWS, COLS, ACC)
        bad = sum_chunks(partial + 2 * stride, rows, num_samples, num_chunks, ROWS, COLS, ACC)
        w = exact_div(s1, tl.zeros_like(s1) + count, ACC)
        norm = exact_div(tl.sqrt(s2), w, ACC)
        sq = tl.where(mask & (norm == norm), norm * norm, 0.0)
        none = (w == 0.0) | (w != w)  # then no element of g is finite
        tl.store(weight + rows, w, mask=mask)
        tl.store(sq_norm + rows, sq, mask=mask)
        tl.store(num_nonfinite + rows, tl.where(none, count, bad).to(tl.int64), mask=mask)
        total += tl.sum(sq)
    tl.store(loss, exact_div(total, 2.0 * count * tl.full((), num_samples, ACC), ACC))


@triton.jit
def _slopes(
    go, weight, real, fake, k, uncond, grad, num_samples, num, num_chunks,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, c = pid // num_chunks, pid % num_chunks
    base = b * num + c * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < num - c * BLOCK
    _, d = _difference(real, fake, k, uncond, b, base, offs, mask, SCALE, ACC)
    g = nan_to_num(exact_div(d, tl.zeros_like(d) + tl.load(weight + b).to(ACC), ACC), ACC)
    numel = tl.full((), num, ACC) * tl.full((), num_samples, ACC)
    step = exact_div(tl.load(go).to(ACC), numel, ACC)
    tl.store(grad + base + offs, (g * step).to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _whole_sample(
    x0, real, fake, x, a, k, uncond, grad, weight, sq_norm, num_nonfinite, num_samples, num,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    base = b * num
    offs = tl.arange(0, BLOCK)
    mask = offs < num
    r, d = _difference(real, fake, k, uncond, b, base, offs, mask, SCALE, ACC)
    count = tl.full((), num, ACC)
    w = exact_div(tl.sum(_distance(x0, x, a, k, r, b, base, offs, mask, ACC)), count, ACC)
    g = exact_div(d, tl.zeros_like(d) + w, ACC)
    bad = tl.sum(tl.where(mask & is_nonfinite(g), 1.0, 0.0))
    g = tl.where(mask, nan_to_num(g, ACC), 0.0)
    tl.store(weight + b, w)
    tl.store(sq_norm + b, tl.sum(g * g))
    tl.store(num_nonfinite + b, bad.to(tl.int64))
    g = exact_div(g, tl.zeros_like(g) + count * tl.full((), num_samples, ACC), ACC)
    tl.store(grad + base + offs, g.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _loss_of(sq_norm, loss, num_samples, num, ROWS: tl.constexpr, ACC: tl.constexpr):
    total = tl.full((), 0.0, ACC)
    for start in range(0, num_samples, ROWS):
        rows = start + tl.arange(0, ROWS)
        total += tl.sum(tl.load(sq_norm + rows, mask=rows < num_samples, other=0.0).to(ACC))
    count = tl.full((), num, ACC) * tl.full((), num_samples, ACC)
    tl.store(loss, exact_div(total, 2.0 * count, ACC))


Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def outputs(x0: Tensor, dtype: torch.dtype) -> Outputs:
    """Empty loss (), weight (B,), sq_norm (B,) and num_nonfinite (B,)."""
    per_sample = x0.new_empty(len(x0), dtype=dtype)
    counts = x0.new_empty(len(x0), dtype=torch.int64)
    return x0.new_empty((), dtype=dtype), per_sample, torch.empty_like(per_sample), counts


def forward(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    k: Tensor | None,
    uncond: Tensor | None,
    scale: float,
) -> Outputs:
    """(loss, weight, sq_norm, num_nonfinite) of contiguous inputs, in two launches."""
    tensors = (x0, real, fake, x, uncond)
    num_samples, num = len(x0), x0[0].numel()
    block, num_warps = chunk(num)
    num_chunks = triton.cdiv(num, block)
    out = outputs(x0, accumulation_dtype(*tensors))
    partial = out[1].new_empty(3, num_samples, num_chunks)
    acc = tl_accumulation(*tensors)
    sizes = (num_samples, num, num_chunks)
    launch(
        _partial_sums, num_samples * num_chunks, x0, real, fake, x, a, k, uncond, partial, *sizes,
        SCALE=scale, BLOCK=block, ACC=acc, num_warps=num_warps,
    )  # fmt: skip
    launch(_finish, 1, partial, *out, *sizes, ROWS=64, COLS=16, ACC=acc, num_warps=4)
    return out


def backward(
    go: Tensor,
    weight: Tensor,
    real: Tensor,
    fake: Tensor,
    k: Tensor | None,
    uncond: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient wrt. x0, of the given dtype, times the upstream gradient go (), in one launch."""
    num_samples, num = len(real), real[0].numel()
    block, num_warps = chunk(num)
    num_chunks = triton.cdiv(num, block)
    grad = torch.empty_like(real, dtype=dtype)
    launch(
        _slopes, num_samples * num_chunks, go, weight, real, fake, k, uncond, grad, num_samples, num, num_chunks,
        SCALE=scale, BLOCK=block, ACC=tl_accumulation(weight), num_warps=num_warps,
    )  # fmt: skip
    return grad


def loss_and_grad(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    k: Tensor | None,
    uncond: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """forward's four values and the gradient: two launches with minimum traffic, or three for a large sample."""
    num_samples, num = len(x0), x0[0].numel()
    tensors = (x0, real, fake, x, uncond)
    if num > WHOLE_SAMPLE or accumulation_dtype(*tensors) == torch.float64:
        out = forward(x0, real, fake, x, a, k, uncond, scale)
        go = torch.ones_like(out[0])
        return *out, backward(go, out[1], real, fake, k, uncond, scale, x0.dtype)
    out = outputs(x0, accumulation_dtype(*tensors))
    grad = torch.empty_like(x0)
    block = max(triton.next_power_of_2(num), 128)
    acc = tl_accumulation(*tensors)
    launch(
        _whole_sample, num_samples, x0, real, fake, x, a, k, uncond, grad, *out[1:], num_samples, num,
        SCALE=scale, BLOCK=block, ACC=acc, num_warps=min(16, max(4, block // 1024)),
    )  # fmt: skip
    launch(_loss_of, 1, out[2], out[0], num_samples, num, ROWS=1024, ACC=acc, num_warps=4)
    return *out, grad
