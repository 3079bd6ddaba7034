"""Guided training in four steps on prompts: two ranks train as one process that passes their shares in turn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks
from text_members import BATCH, distillation, trained
from tiny import assert_close, results
from tiny_pipelines import KINDS, write_pipeline
from toy import assert_equal, flat

NUM = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: write_pipeline(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def states(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The state after some iterations on two ranks, equal on both."""
    out = tmp_path_factory.mktemp("states")
    on_ranks(2, trained, out, NUM, folders)
    one, other = results(out, 2)
    for kind in KINDS:
        assert_equal(one[kind], other[kind])
    return one


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one_process_with_two_micro_batches(
    kind: str, folders: dict[str, Path], states: dict[str, Any]
) -> None:
    alone = distillation(kind, folders[kind], micro_batch_size=BATCH // 2)
    before = {name: value.clone() for name, value in flat(alone.networks()).items()}
    for index in range(NUM):
        alone.step(index)
    assert_close(_with_gradient(states[kind]), _with_gradient(flat(alone.state_dict())), rtol=1e-4, atol=1e-6)
    moved = [name for name, value in before.items() if not torch.equal(value, states[kind][f"/networks{name}"])]
    assert len(moved) > 0.9 * len(before), "nearly everything has moved"


def _with_gradient(state: dict[str, Any]) -> dict[str, Any]:
    """Without what has no gradient but rounding, which AdamW blows up to a step of its usual size: keys' biases."""
    return {name: value for name, value in state.items() if "to_k.bias" not in name}
