"""Shared settings of all tests: one torch thread, so that timings and reductions do not depend on the machine."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves tests marked `gpu` out where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves tests marked `fuzz` out unless `-m` names them."""
    if "fuzz" not in config.option.markexpr and (fuzz := [item for item in items if item.get_closest_marker("fuzz")]):
        config.hook.pytest_deselected(items=fuzz)
        items[:] = [item for item in items if item not in fuzz]
