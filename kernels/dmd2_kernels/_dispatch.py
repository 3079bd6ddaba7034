"""Which implementation an op takes: Triton for CUDA tensors, the plain-torch reference for the rest.

The choice is a Python branch in the public function, made before torch.compile sees a graph. `DMD2_KERNELS` sets it for
a process (auto, triton or reference) and `use` for a block. `triton` on a CPU tensor needs Triton's interpreter, that
is TRITON_INTERPRET=1 before the first import of triton; a run never takes it by itself.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

MODES = ("auto", "triton", "reference")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _checked(mode: str, origin: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{origin} is {mode!r}; it must be one of {', '.join(MODES)}")
    return mode


_mode = _checked(os.environ.get("DMD2_KERNELS", "auto"), "DMD2_KERNELS")


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU in this process."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def implementation(tensor: Tensor) -> str:
    """The implementation that an op takes for this tensor: triton, triton-interpreter or reference."""
    if _mode == "reference" or (_mode == "auto" and not (tensor.is_cuda and _HAS_TRITON)):
        return "reference"
    return "triton" if tensor.is_cuda else "triton-interpreter"


@contextmanager
def use(mode: str) -> Iterator[None]:
    """Take one implementation (auto, triton or reference) inside the block, whatever DMD2_KERNELS says."""
    global _mode
    before, _mode = _mode, _checked(mode, "mode")
    try:
        yield
    finally:
        _mode = before
