"""Trainings on two ranks as a user starts them: `workflow/launch.sh 2 train ...`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from events import wait_until
from toy import SIZES, shaken

from dmd2.__main__ import main
from dmd2.lineage.plan import Plan
from dmd2.lineage.records import write_record
from dmd2.teachers import load_teacher
from dmd2.training.checkpoint_store import save_weights

ROOT = Path(__file__).parents[2]
ITERATIONS = 60
OVERRIDES: dict[str, Any] = {
    "teacher": {"network": SIZES},
    "train": {"batch_size": 8, "ema_decay": 0.9},
    "runs": {"dmd2": {"iterations": ITERATIONS, "num_snapshots": 2}},
}
PLAN = Plan(ROOT / "workflow", "smoke", OVERRIDES)
RUN = "dmd2"
RUNTIME: dict[str, Any] = {"device": "cpu", "log_every": 1, "checkpoint_every": 7, "collective_timeout_minutes": 2}


def options(**values: Any) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def dmd2(*arguments: str) -> int:
    """The exit status of the command line, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dmd2", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
    return int(stop.value.code or 0)


def make_inputs(folder: Path) -> None:
    """Latents of the digits, and a teacher that nobody trained: every weight random."""
    shards, latents = folder / "shards/manifest.json", folder / "latents/manifest.json"
    assert dmd2("shards", *options(spec=PLAN.shards.to_json(), manifest=shards)) == 0
    assert dmd2("latents", *options(spec=PLAN.latents.to_json(), images=shards, manifest=latents)) == 0
    denoiser = shaken(load_teacher(PLAN.preset.teacher, PLAN.preset.data, seed=3).denoiser, 0.02, seed=3)
    teacher = folder / "teacher/teacher.safetensors"
    teacher.parent.mkdir()
    save_weights(teacher, denoiser.state_dict())
    write_record(teacher, PLAN.teacher)


class Job:
    """One run's folder, in which it is started again and again."""

    def __init__(self, inputs: Path, folder: Path):
        self.inputs, self.folder = inputs, folder
        folder.mkdir(parents=True, exist_ok=True)

    def arguments(self, **runtime: Any) -> list[str]:
        names = {
            "generator": "generator.safetensors",
            "networks": "networks.safetensors",
            "snapshots": "snapshots.json",
            "train_log": "train_log.jsonl",
        }
        return [
            "train",
            *options(
                spec=PLAN.train(RUN).to_json(),
                runtime=json.dumps(RUNTIME | runtime),
                teacher=self.inputs / "teacher/teacher.safetensors",
                latents=self.inputs / "latents/manifest.json",
                state=self.folder / "state",
                **{key: self.folder / "out" / name for key, name in names.items()},
            ),
        ]

    def start(self, gpus: int = 2, env: dict[str, str] | None = None, **runtime: Any) -> subprocess.Popen[str]:
        """The run on `gpus` processes; stopped by the caller or at its end. A hung rank is killed after 2 s."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return subprocess.Popen(
            [str(ROOT / "workflow/launch.sh"), str(gpus), "--threads", "1", *self.arguments(**runtime)],
            env={**os.environ, "PATH": path, "DMD2_GRACE_S": "2", **(env or {})},
            stderr=subprocess.PIPE,
            text=True,
        )

    def state(self) -> Path:
        (folder,) = (self.folder / "state").iterdir()
        return folder

    def rows(self) -> list[dict[str, Any]]:
        """The complete rows of the log so far."""
        found = sorted((self.folder / "state").glob("*/log.jsonl"))
        lines = found[0].read_text().splitlines() if found else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def saved(self) -> int:
        """The iteration of the newest checkpoint; 0 if there is none."""
        return max((int(path.stem[5:]) for path in (self.folder / "state").glob("*/step-*.json")), default=0)

    def wait_for(self, step: int, process: subprocess.Popen[str]) -> None:
        """Waits until iteration `step` is in the log."""
        wait_until(lambda: any(row["step"] >= step for row in self.rows()), process)

    def result(self, name: str) -> bytes:
        return (self.folder / "out" / f"{name}.safetensors").read_bytes()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status and what was reported."""
    _, reported = process.communicate(timeout=600)
    return process.returncode, reported


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The process ids of a launcher's ranks, in their order."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == process.pid:
                variables = (entry / "environ").read_bytes().split(b"\0")
                rank = next(v for v in variables if v.startswith(b"RANK="))
                found[int(rank[5:])] = int(entry.name)
        except (FileNotFoundError, ProcessLookupError, StopIteration):
            continue
    return [found[rank] for rank in sorted(found)]
