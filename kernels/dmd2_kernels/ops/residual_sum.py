# mypy: allow-untyped-defs
"""scale * (x + channel_bias + residual) in Triton, where no norm reads the sum at once: the end of a residual block.

A convolution's bias, the addition and the scale are one pass of 2 reads and 1 write instead of 4 and 3. The gradient
needs no kernel: it is the upstream one times the scale, and the bias's is its sum over pixels.

Shapes: the tensor is R rows of N contiguous elements, R = B * S, N = C in channels_last, and R = B * C, N = S else.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, tl_accumulation

ELEMENTS = 4096


@triton.jit
def _sum(
    x, residual, channel_bias, y, num_rows, num_cols, num_channels, col_blocks, LAST: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    rows = pid // col_blocks * ROWS + tl.arange(0, ROWS)
    cols = pid % col_blocks * COLS + tl.arange(0, COLS)
    row_mask, col_mask = rows < num_rows, cols < num_cols
    offs, mask = rows[:, None] * num_cols + cols[None, :], row_mask[:, None] & col_mask[None, :]
    v = tl.load(x + offs, mask=mask, other=0.0).to(ACC) + tl.load(residual + offs, mask=mask, other=0.0).to(ACC)
    if LAST:
        v += tl.load(channel_bias + cols, mask=col_mask, other=0.0).to(ACC)[None, :]
    else:
        v += tl.load(channel_bias + rows % num_channels, mask=row_mask, other=0.0).to(ACC)[:, None]
    tl.store(y + offs, (v * SCALE).to(y.dtype.element_ty), mask=mask)


def forward(x: Tensor, residual: Tensor, channel_bias: Tensor, scale: float, channels_last: bool) -> Tensor:
    """The sum in x's shape, dtype and memory order, in one launch; x and residual are dense in that order."""
    num_channels, y = x.shape[1], torch.empty_like(x)
    num_cols = num_channels if channels_last else x[0, 0].numel()
    num_rows = x.numel() // num_cols
    cols = min(triton.next_power_of_2(num_cols), 512)
    rows, col_blocks = ELEMENTS // cols, triton.cdiv(num_cols, cols)
    launch(
        _sum, triton.cdiv(num_rows, rows) * col_blocks, x, residual, channel_bias, y, num_rows, num_cols,
        num_channels, col_blocks, LAST=channels_last, ROWS=rows, COLS=cols, SCALE=scale, ACC=tl_accumulation(x),
        num_warps=8,
    )  # fmt: skip
    return y
