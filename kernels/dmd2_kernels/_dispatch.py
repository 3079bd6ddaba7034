"""Dispatch of an op: Triton for CUDA tensors, the plain-torch reference otherwise.

The choice is a Python branch in the public function, resolved before torch.compile traces a graph. `DMD2_KERNELS` sets
it for a process (auto, triton or reference) and `use` for a block. `triton` on a CPU tensor needs Triton's interpreter:
TRITON_INTERPRET=1 before the first import of triton; it is never selected automatically.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import Tensor

MODES = ("auto", "triton", "reference")
_CHOICES = (
    "needs a CUDA tensor, or TRITON_INTERPRET=1 set before the first import of triton, "
    "or the plain-torch reference that a CPU uses by default (DMD2_KERNELS=auto or reference)"
)
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _checked(mode: str, origin: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{origin} is {mode!r}; it must be one of {', '.join(MODES)}")
    return mode


compiling = False  # set by `aot.py`, whose CPU tensors represent CUDA ones and which launches nothing
_fold = os.environ.get("DMD2_KERNELS_FOLD", "1") != "0"
_mode = _checked(os.environ.get("DMD2_KERNELS", "auto"), "DMD2_KERNELS")


def interpreting() -> bool:
    """Whether Triton's interpreter is enabled in this process."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def implementation(tensor: Tensor) -> str:
    """The implementation of ops on this tensor: triton, triton-interpreter or reference."""
    if _mode == "reference" or (_mode == "auto" and not (tensor.is_cuda and _HAS_TRITON)):
        return "reference"
    return "triton-interpreter" if interpreting() or not tensor.is_cuda else "triton"


def folds(tensor: Tensor) -> bool:
    """Whether a network should leave biases and residual additions to the ops that read them next.

    So where Triton runs, except with `DMD2_KERNELS_FOLD=0` or inside `use(..., fold=False)`.
    """
    return _fold and implementation(tensor) != "reference"


@contextmanager
def use(mode: str, *, fold: bool | None = None) -> Iterator[None]:
    """Select an implementation (auto, triton or reference) inside the block; overrides DMD2_KERNELS, and `folds`."""
    global _mode, _fold
    before = _mode, _fold
    _mode, _fold = _checked(mode, "mode"), _fold if fold is None else fold
    try:
        yield
    finally:
        _mode, _fold = before


def kernels_for(tensor: Tensor, name: str) -> ModuleType:
    """The module of Triton kernels. Raises RuntimeError if they cannot run on this tensor."""
    if not tensor.is_cuda and not interpreting() and not compiling:
        raise RuntimeError(f"dmd2::{name} got a {tensor.device.type} tensor: a Triton kernel {_CHOICES}")
    from . import ops

    if not tensor.is_cuda and not ops.interpreted() and not compiling:
        raise RuntimeError(f"dmd2::{name}: TRITON_INTERPRET was set after triton was imported; a kernel {_CHOICES}")
    return ops
