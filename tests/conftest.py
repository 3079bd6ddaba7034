"""Shared settings of all tests: one torch thread, so that timings and reductions do not depend on the machine."""

import gc
import os
from collections.abc import Generator
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
LONGEST = (
    "workflow/test_slurm.py",
    "workflow/test_reduced_text.py",
    "workflow/test_reduced_imagenet.py",
    "workflow/test_text_to_image.py",
    "workflow/",
    "distributed/",
    "teachers/test_full_size.py",
    "teachers/test_prepare",
    "stages/test_streamed.py",
    "method/test_recovery.py",
    "commands/",
    "kernels/",
    "cost/",
    "datasets/test_write_images.py",
    "training/",
)
"""Those that take longest start first, so that no worker of `--dist loadfile` is left alone with one at the end."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Spares the garbage collector the hundreds of thousands of objects that imports make, now and in every test."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sorts by `LONGEST`, marks the slow files, before `-m` is looked at, and deselects `fuzz` unless `-m` names it."""

    def path(item: pytest.Item) -> str:
        return os.path.relpath(item.path, TESTS)

    items.sort(
        key=lambda item: next((i for i, name in enumerate(LONGEST) if path(item).startswith(name)), len(LONGEST))
    )
    for item in items:
        if path(item).startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    if "fuzz" not in config.option.markexpr and (fuzz := [item for item in items if item.get_closest_marker("fuzz")]):
        config.hook.pytest_deselected(items=fuzz)
        items[:] = [item for item in items if item not in fuzz]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves tests marked `gpu` out where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
