"""How close an answer must be: to float64 on the same rounded inputs, in units of the stored dtype's last place."""

import torch
from torch import Tensor

import dmd2_kernels as dk

LOW = (torch.bfloat16, torch.float16)


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of dtype's numbers at float64 values."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.tiny))[1] - 1
    return torch.ldexp(torch.full_like(exact, info.eps), exponent)


def assert_rounded_once(actual: Tensor, exact: Tensor, noise: float = 0.0) -> None:
    """Low precision: within 0.51 ulp of float64, plus `noise` of the largest value where terms cancel.

    float32: within 1e-6 of the largest value.
    """
    error, largest = (actual.double() - exact).abs(), exact.abs().max()
    if actual.dtype in LOW:
        allowed = 0.51 * ulp(exact, actual.dtype) + noise * largest
    else:
        allowed = torch.full_like(error, 1e-6) * largest
    worst = (error / allowed.clamp(min=1e-300)).max().item()
    assert (error <= allowed).all(), f"{actual.dtype} is off by {worst:.2f} of what is allowed"


def assert_relative(actual: Tensor, exact: Tensor, rtol: float = 5e-7) -> None:
    """Losses and statistics: relative closeness to float64."""
    torch.testing.assert_close(actual.double(), exact.double(), rtol=rtol, atol=0)


def strided(t: Tensor) -> Tensor:
    """The same values with a gap between elements."""
    wide = t.new_empty(*t.shape, 2)
    wide[..., 0] = t
    return wide[..., 0]


def assert_layout_and_dtype_do_not_matter(device: str) -> None:
    """Strided, bfloat16 and channels_last inputs give the answer of contiguous float32 ones with the same values."""
    x0, real, fake = (torch.randn(2, 3, 5, 5, device=device).to(torch.bfloat16).float() for _ in range(3))
    odd = (strided(x0), real.to(torch.bfloat16), fake.contiguous(memory_format=torch.channels_last))
    norm = dk.GroupNormSiLU(3, 3).to(device)
    expected, expected_grad = dk.matching_loss_and_grad(x0, real, fake)
    out, grad = dk.matching_loss_and_grad(*odd)
    for mine, true in zip((*out, grad), (*expected, expected_grad), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(norm(strided(x0)), norm(x0), rtol=0, atol=0)
    torch.testing.assert_close(norm(odd[2]), norm(fake), rtol=1e-5, atol=1e-6)
