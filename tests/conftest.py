"""Shared settings of all tests: one torch thread, so that timings and reductions do not depend on the machine."""

import os
from pathlib import Path

import pytest
import torch
from triton_mode import HAS_GPU

torch.set_num_threads(1)
if not HAS_GPU:  # Triton reads it once, when it is imported; a CPU tensor takes the reference unless a test says not
    os.environ["TRITON_INTERPRET"] = "1"
TESTS = Path(__file__).parent
SLOW = (
    "commands/test_cli_chain.py",
    "commands/test_cli_stopping.py",
    "cost/test_bench.py",
    "cost/test_flops.py",
    "cost/test_memory.py",
    "datasets/test_write_images.py",
    "distributed/",
    "kernels/test_kernels_aot.py",
    "kernels/test_triton_",
    "method/test_recovery.py",
    "stages/test_streamed.py",
    "teachers/test_full_size.py",
    "teachers/test_prepare",
    "workflow/",
)
"""Beginnings of the paths of tests that start workflows, ranks or compilers, or count large networks."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the slow folders and files, before `-m` is looked at, and leaves `fuzz` out unless `-m` names it."""
    for item in items:
        if item.path.is_relative_to(TESTS) and item.path.relative_to(TESTS).as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    if "fuzz" not in config.option.markexpr and (fuzz := [item for item in items if item.get_closest_marker("fuzz")]):
        config.hook.pytest_deselected(items=fuzz)
        items[:] = [item for item in items if item not in fuzz]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves tests marked `gpu` out where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
