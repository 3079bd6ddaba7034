"""The one place from which kernels start: one grid axis, explicit warps, no autotuning, on the tensors' own device."""

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


launcher: Launcher = _run  # `aot.py` puts a compiler here, the tests a meter


def launch(kernel: Any, num_programs: int, *args: Any, num_warps: int, **constants: Any) -> None:
    """Start a kernel; None stands for an absent tensor. Contraction to FMA is on, stated because defaults move."""
    launcher(kernel, num_programs, args, {**constants, "num_warps": num_warps, "enable_fp_fusion": True})


def tl_accumulation(*tensors: Tensor | None) -> Any:
    """The dtype of the arithmetic as Triton names it: float64 if a tensor is, else float32."""
    return tl.float64 if accumulation_dtype(*tensors) == torch.float64 else tl.float32


def interpreted() -> bool:
    """Whether triton was imported with its interpreter on, its own library included."""
    return not isinstance(tl.sum, triton.runtime.JITFunction)
