"""The command line, called as a person calls it, on a configuration that takes seconds."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import SIZES, shaken

from dmd2.__main__ import main
from dmd2.datasets import ShardReader
from dmd2.lineage.plan import Plan
from dmd2.lineage.records import write_record
from dmd2.teachers import load_teacher
from dmd2.training.checkpoint_store import save_weights

ROOT = Path(__file__).parents[2]
OVERRIDES: dict[str, Any] = {
    "teacher": {
        "training": {"iterations": 5},
        "network": {**SIZES, "channel_mult": [1], "attn_resolutions": []},
    },
    "train": {"iterations": 4, "batch_size": 16, "num_snapshots": 2},
    "runs": {"dmd2_long": {"iterations": 60}},
    "pairs": {"num_pairs": 32},
    "features": {"epochs": 1},
    "evaluation": {"num_samples": 40, "num_blocks": 2, "curve_samples": 40},
    "samplers": {"ode": {"num_steps": 3}},
}
PLAN = Plan(ROOT / "workflow", "smoke", OVERRIDES)


def runtime(device: str = "cpu", **keys: Any) -> str:
    return json.dumps({"log_every": 1, "checkpoint_every": 50, "sample_batch_size": 64, "device": device, **keys})


RUNTIME = runtime()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def dmd2(*arguments: Any) -> int:
    """The exit status of the command line, run here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dmd2", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    return int(stop.value.code or 0)


def options(**paths: Any) -> list[str]:
    return [text for name, path in paths.items() for text in (f"--{name.replace('_', '-')}", str(path))]


def train_options(
    folder: Path, run: str, out: str, state: str = "state", *, runtime: str = RUNTIME, **more: Path
) -> list[str]:
    here = folder / out
    names = {"generator": "generator.safetensors", "networks": "networks.safetensors", "snapshots": "snapshots.json"}
    outputs = {key: here / name for key, name in names.items()} | {"train_log": here / "train_log.jsonl"}
    inputs = {"teacher": folder / "teacher/teacher.safetensors", "latents": folder / "latents/manifest.json"}
    spec = PLAN.train(run).to_json()
    return ["train", *options(spec=spec, runtime=runtime, state=folder / state, **inputs, **outputs, **more)]


def sample_options(weights: Path, entry: str, manifest: Path, batch: int = 64, device: str = "cpu") -> list[str]:
    how = runtime(device, sample_batch_size=batch)
    spec = PLAN.sample(entry).to_json()
    return ["sample", *options(spec=spec, runtime=how, weights=weights, manifest=manifest)]


def random_model(folder: Path, name: str) -> Path:
    """A model nobody trained, whose images all differ: every weight random, recorded as the run's or the teacher's."""
    model = shaken(load_teacher(PLAN.preset.teacher, PLAN.preset.data, seed=3).denoiser, 0.2, seed=3)
    path = folder / "generator.safetensors"
    save_weights(path, model.state_dict())
    write_record(path, PLAN.teacher if name == "teacher" else PLAN.train(name))
    return path


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def images(manifest: Path) -> np.ndarray:
    return ShardReader(manifest).read(range(80), ["image"])["image"]
