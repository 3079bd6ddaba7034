# mypy: allow-untyped-defs
"""The distribution-matching gradient in Triton: guidance, head, normaliser, per-sample factor, gradient and its sums.

With r the guided teacher and f the critic, both with the same head (a, k) at the same noisy x,

    d = x0_fake - x0_real = (a x + k f) - (a x + k r) = k (f - r),

so the direction needs neither x0 nor x, and nothing large cancels for a large k (k = 14.6 at SD's last timestep);
only the normaliser w = mean |x0 - x0_real| needs x0 and x, and it does not need f. Hence

    up to 16,384 elements   `_whole_sample` keeps a sample in registers: each tensor is read once, the gradient written
                            once, in one launch
    above                   `_distances` reduces chunks of |x0 - x0_real| (x0, r and, if given, x and uncond: at most 4
                            reads), then `_chunk_gradients` adds a sample's chunks in one order, in every program the
                            same, and writes the gradient (r, f and uncond: at most 3 reads, 1 write)

Both write sums of the gradient beside it, per sample or per chunk, for the log; no launch finishes them. There are no
atomics and no grid barrier, and sums have a fixed order. float64 (tests) takes the second form at any size.

Special values are as in the reference: w = 0 makes 0/0 a 0 and d/0 the largest number, and all of g counts as
non-finite; NaN in w makes the sample's g 0; NaN in d makes that element 0. Only a w below 2.9e-39 is taken for 0, as
1 / w overflows.

Networks run in channels_last and images are contiguous, so raw outputs (real, fake, uncond, also the gradient) and
images (x0, x) may have different layouts: the elements of a sample are taken in the order of the raw outputs, and
`image_place` finds them in the images. Nothing is copied to another layout.

Shapes: B samples, N elements in each, K chunks of BLOCK elements, C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _chunks
from ..reference import accumulation_dtype
from ._device import exact_div, is_nonfinite, nan_to_num
from ._launch import launch, tl_accumulation


@triton.jit
def image_place(b, start, offs, num, CHANNELS: tl.constexpr):
    """(base, offsets) in the images of elements start + offs of sample b; those of the raw outputs are b num + start.

    With CHANNELS above 1 the raw outputs are (H, W, C) and the images (C, H, W).
    """
    base, image = b * num + start, offs
    if CHANNELS > 1:
        n = start + offs
        base, image = b * num, (n % CHANNELS) * (num // CHANNELS) + n // CHANNELS
    return base, image


@triton.jit
def _teacher(real, uncond, base, offs, mask, GUIDANCE: tl.constexpr, ACC: tl.constexpr):
    """r: the teacher's raw output, guided."""
    r = tl.load(real + base + offs, mask=mask, other=0.0).to(ACC)
    if uncond is not None:
        u = tl.load(uncond + base + offs, mask=mask, other=0.0).to(ACC)
        r = u + GUIDANCE * (r - u)
    return r


@triton.jit
def _direction(fake, k, r, b, base, offs, mask, ACC: tl.constexpr):
    """d = k (f - r)."""
    d = tl.load(fake + base + offs, mask=mask, other=0.0).to(ACC) - r
    if k is not None:
        d *= tl.load(k + b).to(ACC)
    return d


@triton.jit
def _distance(x0, x, a, k, r, b, base, offs, mask, ACC: tl.constexpr):
    """|x0 - x0_real|, 0 outside the sample."""
    if k is not None:
        at_x = tl.load(x + base + offs, mask=mask, other=0.0).to(ACC)
        r = tl.load(a + b).to(ACC) * at_x + tl.load(k + b).to(ACC) * r
    v = tl.load(x0 + base + offs, mask=mask, other=0.0).to(ACC)
    return tl.where(mask, tl.abs(v - r), 0.0)


@triton.jit
def _write(
    d, w, factor, grad, terms, squares, nonfinite, place, b, base, offs, mask, num_samples, num,
    SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write a tile of the gradient, h g SCALE / (B N) with g = d / w, and its sums to a place in each table."""
    g = d * exact_div(tl.full((), 1.0, ACC), w, ACC)  # 1 / w keeps what follows: 0, infinite and NaN w
    bad = tl.sum(tl.where(mask & is_nonfinite(g), 1.0, 0.0))
    g = tl.where(mask, nan_to_num(g, ACC), 0.0)
    numel = tl.full((), num, ACC) * tl.full((), num_samples, ACC)
    square = tl.sum(g * g)
    half = exact_div(square, 2.0 * numel, ACC)
    if factor is not None:
        h = tl.load(factor + b).to(ACC)
        g *= h
        half *= h
    tl.store(squares + place, square)
    tl.store(terms + place, half)
    tl.store(nonfinite + place, bad.to(nonfinite.dtype.element_ty))
    g *= exact_div(tl.full((), SCALE, ACC), numel, ACC)
    tl.store(grad + base + offs, g.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _whole_sample(
    x0, real, fake, x, a, k, uncond, factor, grad, terms, weight, squares, nonfinite, num_samples, num,
    GUIDANCE: tl.constexpr, SCALE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < num
    base, image = image_place(b, 0, offs, num, CHANNELS)
    r = _teacher(real, uncond, b * num, offs, mask, GUIDANCE, ACC)
    w = exact_div(tl.sum(_distance(x0, x, a, k, r, b, base, image, mask, ACC)), tl.full((), num, ACC), ACC)
    d = _direction(fake, k, r, b, b * num, offs, mask, ACC)
    tl.store(weight + b, w)
    _write(d, w, factor, grad, terms, squares, nonfinite, b, b, b * num, offs, mask, num_samples, num, SCALE, ACC)


@triton.jit
def _distances(
    x0, real, x, a, k, uncond, partial, num, num_chunks,
    GUIDANCE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, c = pid // num_chunks, pid % num_chunks
    offs = tl.arange(0, BLOCK)
    mask = offs < num - c * BLOCK
    base, image = image_place(b, c * BLOCK, offs, num, CHANNELS)
    r = _teacher(real, uncond, b * num + c * BLOCK, offs, mask, GUIDANCE, ACC)
    tl.store(partial + pid, tl.sum(_distance(x0, x, a, k, r, b, base, image, mask, ACC)))


@triton.jit
def _chunk_gradients(
    partial, real, fake, k, uncond, factor, grad, terms, weight, squares, nonfinite, num_samples, num, num_chunks,
    GUIDANCE: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, c = pid // num_chunks, pid % num_chunks
    offs = tl.arange(0, BLOCK)
    mask = offs < num - c * BLOCK
    total = tl.zeros((COLS,), ACC)
    for start in range(0, num_chunks, COLS):
        cols = start + tl.arange(0, COLS)
        total += tl.load(partial + b * num_chunks + cols, mask=cols < num_chunks, other=0.0).to(ACC)
    w = exact_div(tl.sum(total), tl.full((), num, ACC), ACC)
    tl.store(weight + b, w, mask=c == 0)
    base = b * num + c * BLOCK
    r = _teacher(real, uncond, base, offs, mask, GUIDANCE, ACC)
    d = _direction(fake, k, r, b, base, offs, mask, ACC)
    _write(d, w, factor, grad, terms, squares, nonfinite, pid, b, base, offs, mask, num_samples, num, SCALE, ACC)


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def tables(x0: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty terms (B * K,), weight (B,), squares (B, K) and non-finite counts (B, K) of an arithmetic in `dtype`."""
    num_samples, num_chunks = len(x0), _chunks.matching_chunks(x0[0].numel(), dtype)
    squares = x0.new_empty(num_samples, num_chunks, dtype=dtype)
    counts = torch.empty_like(squares, dtype=torch.int64)
    return squares.new_empty(num_samples * num_chunks), squares.new_empty(num_samples), squares, counts


def loss_and_grad(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    k: Tensor | None,
    uncond: Tensor | None,
    factor: Tensor | None,
    guidance: float,
    scale: float,
    channels: int,
    grad_dtype: torch.dtype,
) -> Outputs:
    """(terms, weight, squares, nonfinite) as in `tables`, and the gradient in real's layout, in one launch or two.

    Inputs are dense and in one layout, or, with `channels` above 1, images are contiguous and raw outputs are
    channels_last.
    """
    tensors = (x0, real, fake, x, uncond, factor)
    num_samples, num = len(x0), x0[0].numel()
    dtype, acc = accumulation_dtype(*tensors), tl_accumulation(*tensors)
    out, grad = tables(x0, dtype), torch.empty_like(real, dtype=grad_dtype)
    if _chunks.in_one_launch(num, dtype):
        block = max(triton.next_power_of_2(num), 128)
        launch(
            _whole_sample, num_samples, x0, real, fake, x, a, k, uncond, factor, grad, *out, num_samples, num,
            GUIDANCE=guidance, SCALE=scale, CHANNELS=channels, BLOCK=block, ACC=acc,
            num_warps=min(32, max(4, block // 512)),
        )  # fmt: skip
        return *out, grad
    block, num_warps = _chunks.chunk(num)
    num_chunks = out[2].shape[1]
    partial = torch.empty_like(out[2])
    launch(
        _distances, num_samples * num_chunks, x0, real, x, a, k, uncond, partial, num, num_chunks,
        GUIDANCE=guidance, CHANNELS=channels, BLOCK=block, ACC=acc, num_warps=num_warps,
    )  # fmt: skip
    launch(
        _chunk_gradients, num_samples * num_chunks,
        partial, real, fake, k, uncond, factor, grad, *out, num_samples, num, num_chunks,
        GUIDANCE=guidance, SCALE=scale, BLOCK=block,
        COLS=min(1024, max(16, triton.next_power_of_2(num_chunks))),
        ACC=acc, num_warps=num_warps,
    )  # fmt: skip
    return *out, grad
