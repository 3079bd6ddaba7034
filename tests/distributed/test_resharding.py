"""A checkpoint of one layout read in another: the same tensors, each rank taking the rows that it needs."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks
from members import loaded, saved
from tiny import distillation, results
from toy import DIGEST, assert_equal, flat

from dmd2.files import read_json
from dmd2.training.checkpoint_store import CheckpointStore

NUM = 3
LAYOUTS = ("replicate", "shard")
SOURCES = (*LAYOUTS, "one process", "damaged")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with checkpoints after 3 and 4 iterations: of two ranks in each layout, of one process, and one of a
    sharded run in which the newer one has a flipped bit in the file of the second rank."""
    root = tmp_path_factory.mktemp("made")
    folders = {name: root / name.replace(" ", "-") for name in SOURCES}
    on_ranks(2, saved, {layout: folders[layout] for layout in LAYOUTS}, NUM)
    shutil.copytree(folders["shard"], folders["damaged"])
    path = folders["damaged"] / f"step-{NUM + 1:08d}-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    run = distillation()
    for index in range(NUM + 1):
        run.step(index)
    with CheckpointStore(folders["one process"], DIGEST) as store:
        store.save(NUM + 1, run.state_dict())
    return folders


@pytest.fixture(scope="module")
def taken_up(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks have, each, after they took up each of the checkpoints, in each layout."""
    folder = tmp_path_factory.mktemp("taken")
    on_ranks(2, loaded, folder, made)
    return results(folder, 2)


def state_of(folder: Path) -> dict[str, Any]:
    """The whole state of the newest good checkpoint, as one process reads it."""
    found = CheckpointStore(folder, DIGEST).load()
    assert found is not None
    return found[0]


def test_every_rank_writes_its_rows_and_whole_tensors_are_written_once(made: dict[str, Path]):
    files = {layout: sorted(path.name for path in made[layout].glob("step-00000003*")) for layout in LAYOUTS}
    assert files["replicate"] == ["step-00000003-0.safetensors", "step-00000003.json"]
    assert files["shard"] == ["step-00000003-0.safetensors", "step-00000003-1.safetensors", "step-00000003.json"]
    manifest = read_json(made["shard"] / "step-00000003.json")
    first, second = (entry["rows"] for entry in manifest["files"])
    for name, shape in manifest["shapes"].items():
        ranges = [rows[name] for rows in (first, second) if name in rows]
        assert (ranges[0][0], ranges[-1][1]) == (0, shape[0])
        assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
    sizes = [entry["bytes"] for entry in manifest["files"]]
    assert max(sizes) < 1.2 * min(sizes), "no rank writes much more than another"


@pytest.mark.parametrize("source", SOURCES)
def test_one_process_takes_up_any_checkpoint(source: str, made: dict[str, Path]):
    state = state_of(made[source])
    run = distillation()
    run.load_state_dict(state)
    assert_equal(run.state_dict(), state)
    metrics = run.step(NUM)
    assert all(bool(torch.isfinite(value)) for value in metrics.values())


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", LAYOUTS)
def test_two_ranks_take_up_any_checkpoint(
    source: str, target: str, made: dict[str, Path], taken_up: list[dict[str, Any]]
):
    expected = flat(state_of(made[source]))
    one, other = (found[f"{source} {target}"] for found in taken_up)
    assert_equal(one["state"], expected)
    assert_equal(other["state"], expected)
    assert bool(one["rows"]) == (target == "shard")
    for name, rows in one["rows"].items():
        assert rows + other["rows"][name] == expected[f"/networks/{name}"].shape[0], "a rank holds its rows alone"


def test_damage_in_any_ranks_file_has_all_ranks_fall_back(taken_up: list[dict[str, Any]]):
    for source, step in {"shard": NUM + 1, "damaged": NUM}.items():
        assert [found[f"{source} {target}"]["step"] for found in taken_up for target in LAYOUTS] == [step] * 4
