"""What the records of a run's snapshots say: the run's facts, and how far it had come."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dmd2.files import read_json
from dmd2.lineage.plan import Plan
from dmd2.lineage.records import read_record
from dmd2.stages.train import _publish_snapshots
from dmd2.training.checkpoint_store import save_weights

PLAN = Plan(Path(__file__).parents[2] / "workflow", "smoke")
FACTS = {"run": "dmd2", "iterations": 20, "train_wall_s": 9.0, "train_cpu_s": 8.0, "device": "cpu", "num_processes": 1}


@pytest.mark.parametrize("lost", [False, True], ids=["whole log", "a row lost to a power cut"])
def test_snapshot_says_what_the_run_had_taken_up_to_it(tmp_path: Path, lost: bool):
    rows: list[dict[str, Any]] = [{"step": 10, "wall_s": 5.0, "cpu_s": 4.0}, {"step": 20, "wall_s": 9.0, "cpu_s": 8.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[lost:]))
    for step in (10, 20):
        save_weights(tmp_path / f"snapshot-{step:08d}.safetensors", {"x": torch.full((1,), float(step))})
    store: Any = SimpleNamespace(folder=tmp_path)
    manifest = tmp_path / "out/snapshots.json"
    manifest.parent.mkdir()
    _publish_snapshots(store, FACTS, manifest, PLAN.train("dmd2"))
    files = [manifest.parent / item["file"] for item in read_json(manifest)["snapshots"]]
    first, last = map(read_record, files)
    assert (first["run"], first["checkpoint_step"], first["generator_updates"]) == ("dmd2", 10, 2)
    assert (last["checkpoint_step"], last["generator_updates"], last["train_cpu_s"]) == (20, 4, 8.0)
    assert (first.get("train_wall_s"), first.get("train_cpu_s")) == ((None, None) if lost else (5.0, 4.0))
