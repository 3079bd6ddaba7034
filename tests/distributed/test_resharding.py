"""A checkpoint of one layout read in another: the same tensors, each rank taking the rows that it needs."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks
from members import loaded, saved
from tiny import DIGEST, assert_equal, distillation, flat, results

from dmd2.checkpoint import CheckpointStore
from dmd2.records import read_json

NUM = 3
LAYOUTS = ("replicate", "shard")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each layout, with a checkpoint of two ranks."""
    folders = {layout: tmp_path_factory.mktemp(layout) for layout in LAYOUTS}
    for layout, folder in folders.items():
        on_ranks(2, saved, folder, NUM, {"layout": layout})
    return folders


def state_of(folder: Path) -> dict[str, Any]:
    """The whole state, as one process reads it."""
    found = CheckpointStore(folder / "state", DIGEST).load()
    assert found is not None
    assert found[1]["step"] == NUM
    return found[0]


def test_every_rank_writes_its_rows_and_whole_tensors_are_written_once(made: dict[str, Path]):
    files = {layout: sorted(path.name for path in (made[layout] / "state").glob("step-*")) for layout in LAYOUTS}
    assert files["replicate"] == ["step-00000003-0.safetensors", "step-00000003.json"]
    assert files["shard"] == ["step-00000003-0.safetensors", "step-00000003-1.safetensors", "step-00000003.json"]
    manifest = read_json(made["shard"] / "state" / "step-00000003.json")
    first, second = (entry["rows"] for entry in manifest["files"])
    for name, shape in manifest["shapes"].items():
        ranges = [rows[name] for rows in (first, second) if name in rows]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == shape[0]
        assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
    sizes = [entry["bytes"] for entry in manifest["files"]]
    assert max(sizes) < 1.2 * min(sizes), "no rank writes much more than another"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_takes_up_a_checkpoint_of_two_ranks(layout: str, made: dict[str, Path]):
    state = state_of(made[layout])
    run = distillation()
    run.load_state_dict(state)
    assert_equal(run.state_dict(), state)
    metrics = run.step(NUM)
    assert all(bool(torch.isfinite(value)) for value in metrics.values())


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_two_ranks_take_up_a_checkpoint_of_either_layout(
    source: str, target: str, made: dict[str, Path], tmp_path: Path
):
    shutil.copytree(made[source] / "state", tmp_path / "state")
    on_ranks(2, loaded, tmp_path, {"layout": target})
    expected = flat(state_of(made[source]))
    parts = results(tmp_path, 2)
    for found in parts:
        assert_equal(found["state"], expected)
    for name, rows in parts[0]["rows"].items():
        total = expected[f"/networks/{name}"].shape[0]
        assert rows + parts[1]["rows"][name] == total, "a rank holds its rows alone"
    assert bool(parts[0]["rows"]) == (target == "shard")


def test_two_ranks_take_up_a_checkpoint_of_one_process(tmp_path: Path):
    run = distillation()
    for index in range(NUM):
        run.step(index)
    with CheckpointStore(tmp_path / "state", DIGEST) as store:
        store.save(NUM, run.state_dict())
    on_ranks(2, loaded, tmp_path, {"layout": "shard"})
    for found in results(tmp_path, 2):
        assert_equal(found["state"], flat(run.state_dict()))


def test_a_damaged_part_of_any_rank_has_all_ranks_fall_back(made: dict[str, Path], tmp_path: Path):
    shutil.copytree(made["shard"] / "state", tmp_path / "state")
    on_ranks(2, saved, tmp_path, NUM + 2, {"layout": "shard"})
    path = tmp_path / "state" / f"step-{NUM + 2:08d}-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    on_ranks(2, loaded, tmp_path, {"layout": "shard"})
    assert [found["step"] for found in results(tmp_path, 2)] == [NUM, NUM]
