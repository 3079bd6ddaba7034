"""What an evaluation reads, made by the stages that make it: digits, extractor, reference, and networks by hand.

The networks have random weights: what is sampled is noise of a kind, and yet a function of seed, id and class.
"""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toy import shaken

from dmd2.config import Runtime
from dmd2.files import write_json
from dmd2.lineage.plan import Plan
from dmd2.lineage.records import write_record
from dmd2.metrics import Tally
from dmd2.stages import data, measure
from dmd2.teachers import load_teacher
from dmd2.training.checkpoint_store import save_weights

WORKFLOW = Path(__file__).parents[2] / "workflow"
RUNTIME = Runtime(sample_batch_size=64, device="cpu")
NUM, BLOCKS = 96, 2
BASE = {
    "evaluation": {"num_samples": NUM, "num_blocks": BLOCKS, "curve_samples": 60, "num_shown": 20},
    "samplers": {"ode": {"kind": "heun", "num_steps": 3}, "best": {"kind": "few_step", "checkpoint": "best"}},
    "runs": {"dmd2": {"num_snapshots": 4}},
}


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in over.items():
        found[key] = merged(found[key], value) if isinstance(value, Mapping) and key in found else value
    return found


class World:
    """A folder with the digits, an extractor, their reference, and models' weights as the workflow names them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        plan = self.plan()
        self.shards, self.extractor = folder / "shards/manifest.json", folder / "extractor.weights"
        self.reference = folder / "reference.npz"
        data.shards(plan.shards, self.shards, None, 0, 1)
        measure.features(plan.features, self.shards, self.extractor)
        measure.reference(plan.reference, self.shards, self.extractor, self.reference, RUNTIME)
        self.teacher = self.model("teacher", plan.teacher, seed=0, iterations=100)
        self.student = self.model(
            "generator", plan.train("dmd2"), seed=1, run="dmd2", checkpoint_step=20, train_cpu_s=9.0
        )
        self.snapshots = folder / "snapshots.json"
        steps = plan.run("dmd2").train.snapshot_steps()
        for step in steps:
            self.model(f"snapshot-{step}", plan.train("dmd2"), seed=step, checkpoint_step=step)
        listed = [{"step": step, "file": f"snapshot-{step}.safetensors"} for step in steps]
        write_json(self.snapshots, {"snapshots": listed, "digest": plan.train("dmd2").digest})

    def plan(self, **over: Any) -> Plan:
        return Plan(WORKFLOW, "smoke", merged(BASE, over))

    def model(self, name: str, spec: Any, seed: int, **facts: Any) -> Path:
        preset, path = self.plan().preset, self.folder / f"{name}.safetensors"
        network = shaken(load_teacher(preset.teacher, preset.data).denoiser, 0.05, seed)
        save_weights(path, network.state_dict())
        write_record(path, spec, seed=seed, **facts)
        return path

    def metrics(self, plan: Plan, entry: str, out: Path, runtime: Runtime = RUNTIME, **measured: Path) -> dict:
        """The record that the stage writes of an entry's `samples` or `weights`, without what names the making."""
        given = measure.SampleSource(measured.get("samples"), measured.get("weights"))
        state = self.folder / "state"
        measure.metrics(plan.metrics(entry), given, self.reference, self.extractor, state, out, runtime)
        found = json.loads(out.read_text())
        found.pop("provenance")
        return found


def measure_and_die(world: World, plan: Plan, out: Path, chunk: int, num_files: int) -> None:
    """Measures the teacher's samples in chunks, and is killed when so many of their files are written."""
    measure.CHUNK, save, saved = chunk, Tally.save, []

    def dying(tally: Tally, path: Path) -> None:
        save(tally, path)
        saved.append(path)
        if len(saved) == num_files:
            os.kill(os.getpid(), signal.SIGKILL)

    Tally.save = dying  # type: ignore[method-assign]
    world.metrics(plan, "teacher/ode", out, weights=world.teacher)
