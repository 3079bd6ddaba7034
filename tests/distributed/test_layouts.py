"""One training on two ranks in either layout, and on one process that passes the same parts: the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks
from members import steps
from tiny import BATCH, assert_close, assert_equal, distillation, flat, results

NUM = 5


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The state after some iterations on two ranks that hold whole networks."""
    folder = tmp_path_factory.mktemp("replicated")
    on_ranks(2, steps, folder, NUM, {"layout": "replicate"})
    one, other = results(folder, 2)
    assert_equal(one, other)
    return one


def test_two_ranks_equal_one_process_that_passes_two_parts(replicated: dict[str, Any]):
    alone = distillation(micro_batch_size=BATCH // 2)
    for index in range(NUM):
        alone.step(index)
    assert_close(replicated, flat(alone.state_dict()), rtol=1e-4, atol=1e-6)
    untouched = flat(distillation(micro_batch_size=BATCH // 2).state_dict())
    moved = [
        name
        for name in untouched
        if not torch.equal(torch.as_tensor(untouched[name]), torch.as_tensor(replicated[name]))
    ]
    assert len(moved) > 0.9 * len(untouched), "nearly everything has moved"


def test_sharded_networks_equal_whole_ones(replicated: dict[str, Any], tmp_path: Path):
    on_ranks(2, steps, tmp_path, NUM, {"layout": "shard"})
    one, other = results(tmp_path, 2)
    assert_equal(one, other)
    # A bias of attention's keys has no gradient but rounding, which AdamW blows up to a step of its usual size.
    wanted, found = (without(state, "qkv.bias") for state in (replicated, one))
    assert_close(wanted, found, rtol=1e-4, atol=1e-6)


def test_sharded_networks_with_parts_equal_whole_ones_with_parts(tmp_path: Path):
    """Gradients of the parts are added on each rank and exchanged once."""
    states = []
    for layout in ("replicate", "shard"):
        folder = tmp_path / layout
        folder.mkdir()
        on_ranks(2, steps, folder, NUM, {"layout": layout, "micro_batch_size": BATCH // 4})
        states.append(without(results(folder, 2)[0], "qkv.bias"))
    assert_close(states[0], states[1], rtol=1e-4, atol=1e-6)


def without(state: dict[str, Any], part: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if part not in name}
