"""Runs the Triton kernels on a GPU where there is one, else in Triton's interpreter, and says which.

TRITON_INTERPRET must be set before triton is imported, so it is set here, before any test module of this folder. If
other tests imported triton already, this folder's Triton tests run in a process of their own: `test_own_process.py`.
The interpreter changes nothing for other folders: a CPU tensor takes the reference unless a test says `use("triton")`.
"""

import ctypes
import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest


def _gpu() -> bool:
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


HAS_GPU = _gpu()
TRITON_TAKEN = not HAS_GPU and "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ
TRITON_TESTS = ["test_triton_*.py"]

if TRITON_TAKEN:
    collect_ignore_glob = TRITON_TESTS
    MODE = "interpreter, in a process of its own"
else:
    collect_ignore_glob = ["test_own_process.py"]
    MODE = "gpu" if HAS_GPU else "interpreter"
    if not HAS_GPU:
        os.environ["TRITON_INTERPRET"] = "1"
        from triton_interpreter import repair_bf16

        repair_bf16()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how the kernels ran."""
    terminalreporter.write_line(f"dmd2_kernels mode: {MODE}")


@pytest.fixture(scope="session")
def device() -> str:
    """The device whose tensors the Triton kernels take here."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def triton_path() -> Iterator[None]:
    """Take the Triton kernels inside a test, on either device; numpy keeps quiet about the NaN that a GPU would."""
    import dmd2_kernels

    with dmd2_kernels.use("triton"), np.errstate(all="ignore"):
        yield
