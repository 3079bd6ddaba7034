"""Launches all kernels: one grid axis, explicit warps, no autotuning, on the tensors' device."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype

Launcher = Callable[[Any, int, tuple[Any, ...], dict[str, Any]], None]


def _run(kernel: Any, num_programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    device_of = next(a for a in args if isinstance(a, Tensor))
    with torch.cuda.device_of(device_of):
        kernel[(num_programs,)](*args, **options)


launcher: Launcher = _run  # replaced by a compiler in `aot.py`, and by a meter in tests


def launch(kernel: Any, num_programs: int, *args: Any, num_warps: int, **constants: Any) -> None:
    """Launch a kernel; None is an absent tensor. FMA contraction is set explicitly, since defaults change."""
    launcher(kernel, num_programs, args, {**constants, "num_warps": num_warps, "enable_fp_fusion": True})


def tl_accumulation(*tensors: Tensor | None) -> Any:
    """Triton's dtype of the arithmetic: float64 if any tensor is, else float32."""
    return tl.float64 if accumulation_dtype(*tensors) == torch.float64 else tl.float32


def interpreted() -> bool:
    """Whether triton, including its own library, was imported with its interpreter enabled."""
    return not isinstance(tl.sum, triton.runtime.JITFunction)
