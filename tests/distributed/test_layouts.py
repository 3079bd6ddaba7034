"""One training on two ranks in either layout, and on one process that passes the same parts: the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks
from members import trained
from tiny import BATCH, FLAT, assert_close, distillation, results
from toy import assert_equal, flat

NUM = 3  # of which the first and the last move the generator
SETTINGS: dict[str, dict[str, Any]] = {
    "replicate": {"layout": "replicate"},
    "shard": {"layout": "shard"},
    "replicate in parts": {"layout": "replicate", "micro_batch_size": BATCH // 4},
    "shard in parts": {"layout": "shard", "micro_batch_size": BATCH // 4},
    "shard, teacher's features": {"layout": "shard", "train": {"gan_features": "teacher"}},
    "shard, recomputed": {"layout": "shard", "prepare": {"activation_checkpointing": True}},
    "replicate, teacher's features": {"layout": "replicate", "train": {"gan_features": "teacher"}},
}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The state after some iterations on two ranks under each of the settings."""
    folder = tmp_path_factory.mktemp("states")
    on_ranks(2, trained, folder, NUM, SETTINGS)
    one, other = results(folder, 2)
    for name in SETTINGS:
        assert_equal(one[name], other[name])
    return one


@pytest.mark.parametrize(("name", "parts"), [("replicate", 2), ("replicate in parts", 4)])
def test_two_ranks_equal_one_process_that_passes_all_their_parts(name: str, parts: int, states: dict[str, Any]):
    alone = distillation(micro_batch_size=BATCH // parts)
    for index in range(NUM):
        alone.step(index)
    assert_close(without_noise(states[name]), without_noise(flat(alone.state_dict())), rtol=1e-4, atol=1e-6)
    before = flat(distillation().networks())
    moved = [key for key, value in before.items() if not torch.equal(value, states[name][f"/networks{key}"])]
    assert len(moved) > 0.9 * len(before), "nearly everything has moved"


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.startswith("shard")])
def test_sharded_networks_train_to_the_same_weights_as_whole_ones(name: str, states: dict[str, Any]):
    wanted = states.get(name.replace("shard", "replicate"), states["replicate"])
    assert_close(without_noise(wanted), without_noise(states[name]), rtol=1e-4, atol=1e-6)


def test_sharded_networks_with_compiled_blocks_train_to_the_same_weights(tmp_path: Path):
    compiled = {"layout": "shard", "prepare": {"compile": True, "backend": "eager"}}
    settings = {"eager": {"network": FLAT}, "compiled": {"network": FLAT, **compiled}}
    on_ranks(2, trained, tmp_path, NUM, settings)
    found, _ = results(tmp_path, 2)
    assert_close(without_noise(found["eager"]), without_noise(found["compiled"]), rtol=1e-4, atol=1e-6)


def without_noise(state: dict[str, Any]) -> dict[str, Any]:
    """Without what has no gradient but rounding, which AdamW blows up to a step of its usual size: keys' biases."""
    return {name: value for name, value in state.items() if "qkv.bias" not in name}
