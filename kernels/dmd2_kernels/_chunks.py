"""How the losses are cut into programs, from the shape of a sample alone: equal on every GPU, rank and batch size.

Does not import triton: the shapes of an op's outputs follow from it without running the op.
"""

import torch
from torch import Tensor

WHOLE_SAMPLE = 16_384  # the largest sample that one program keeps in registers without spilling
LOGITS = 1024  # logits of each source in one program


def cdiv(num: int, size: int) -> int:
    """The number of pieces of at most `size` in `num`."""
    return -(-num // size)


def chunk(num: int) -> tuple[int, int]:
    """(elements of a sample in one program, warps) from the elements of a sample."""
    if num <= 4096:
        return 1024, 4
    return (2048, 4) if num <= 16_384 else (4096, 8)


def in_one_launch(num: int, dtype: torch.dtype) -> bool:
    """Whether the matching gradient keeps a sample of `num` elements in one program, in arithmetic of this dtype."""
    return num <= WHOLE_SAMPLE and dtype != torch.float64


def matching_chunks(num: int, dtype: torch.dtype) -> int:
    """K of the matching gradient's sums (B, K)."""
    return 1 if in_one_launch(num, dtype) else cdiv(num, chunk(num)[0])


def denoising_terms(out: Tensor) -> int:
    """The number of parts of the denoising loss: the chunks of all samples."""
    num = out[0].numel()
    return len(out) * cdiv(num, chunk(num)[0])


def gan_terms(*logits: Tensor) -> int:
    """The number of parts of a GAN loss."""
    return cdiv(max(map(len, logits)), LOGITS)
