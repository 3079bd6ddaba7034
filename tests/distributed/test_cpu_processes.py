"""A teacher whose batch two CPU processes share is the teacher that one process trains, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launched import OVERRIDES, ROOT, options

from dmd2.__main__ import settings
from dmd2.errors import UserError
from dmd2.lineage.plan import Plan

TRAINING = {"iterations": 12, "batch_size": 16, "cpu_processes": 2}


def plan(**training: Any) -> Plan:
    teacher = {**OVERRIDES["teacher"], "training": TRAINING | training}
    return Plan(ROOT / "workflow", "smoke", {**OVERRIDES, "teacher": teacher})


def trained(inputs: Path, out: Path, processes: str, threads: int) -> tuple[bytes, dict[str, Any]]:
    """Weights and record of a teacher that `launch.sh PROCESSES` trains."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    arguments = options(
        spec=plan().teacher.to_json(), latents=inputs / "latents/manifest.json", state=out / "state",
        weights=out / "teacher.safetensors", train_log=out / "log.jsonl", runtime=json.dumps({"log_every": 4}),
    )  # fmt: skip
    subprocess.run(
        [str(ROOT / "workflow/launch.sh"), processes, "--threads", str(threads), "teacher", *arguments],
        # As Snakemake sets them for a job: a process takes its share of the threads all the same.
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        check=True,
    )
    return (out / "teacher.safetensors").read_bytes(), json.loads((out / "teacher.json").read_text())


def test_two_processes_train_what_one_trains(inputs: Path, tmp_path: Path):
    one, of_one = trained(inputs, tmp_path / "one", "0", 1)
    two, of_two = trained(inputs, tmp_path / "two", "cpu:2", 2)
    assert (of_one["num_processes"], of_two["num_processes"]) == (1, 2)
    assert of_one["provenance"]["digest"] == of_two["provenance"]["digest"]
    assert one == two


def test_processes_share_the_threads_of_their_job(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}.items():
        monkeypatch.setenv(name, value)
    settings(threads=4)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == ("2", "2")


def test_batch_that_the_processes_do_not_divide_is_refused():
    with pytest.raises(UserError, match="batch_size 15 is not divisible by cpu_processes 2"):
        plan(batch_size=15)


@pytest.mark.parametrize(
    ("processes", "limit", "device", "expected"),
    [(2, None, "cpu", 8), (2, 4, "cpu", 4), (2, 64, "cpu", 8), (2, None, "cuda", None), (1, None, "cpu", None)],
)
def test_micro_batches_are_those_of_the_processes(processes: int, limit: int | None, device: str, expected: int | None):
    training = plan(cpu_processes=processes).preset.teacher.training
    assert training is not None
    assert training.micro_batch_size(limit, device) == expected
