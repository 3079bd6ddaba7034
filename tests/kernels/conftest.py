"""Runs the Triton kernels on a GPU where there is one, else in Triton's interpreter, and says which."""

from collections.abc import Iterator

import numpy as np
import pytest
from triton_mode import HAS_GPU

if not HAS_GPU:
    from triton_interpreter import repair_bf16

    repair_bf16()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how the kernels ran."""
    terminalreporter.write_line(f"dmd2_kernels mode: {'gpu' if HAS_GPU else 'interpreter'}")


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
