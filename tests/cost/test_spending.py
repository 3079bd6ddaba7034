"""What finished jobs took, from Snakemake's records as it writes them and those beside the outputs."""

import base64
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from dmd2.commands import results
from dmd2.cost import spending
from dmd2.cost.finished import read_finished
from dmd2.errors import UserError

A100 = "NVIDIA A100-SXM4-80GB"


def finish(
    folder: Path, output: str, rule: str, start: float, end: float, launched: str, made: dict[str, Any] | None = None
) -> None:
    """A finished job as Snakemake and the stage leave it; `launched` is what follows `launch.sh`."""
    preset, *names = Path(output).parts[1:-1]
    log = f"logs/{preset}/{rule}.log" if not names else f"logs/{preset}/{rule}/{'-'.join(names)}.log"
    times = {"starttime": start, "endtime": end, "incomplete": False}
    record = {"rule": rule, "log": [log], "shellcmd": f'bash "$DMD2_LAUNCH" {launched} {rule}', **times}
    name = base64.b64encode(output.encode()).decode()
    parts = [f"@{name[i : i + 50]}" for i in range(0, len(name), 50)]  # long names are cut into folders
    path = (folder / ".snakemake/metadata").joinpath(*parts[:-1], parts[-1].removeprefix("@"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    beside = (folder / output).with_suffix(".json")
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps({"provenance": {"digest": "ab", "spec": {}}, **(made or {})}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A teacher on two cores; two trainings of one hour on two GPUs, one of them over two attempts; samples later."""
    facts = {"device": "cuda", "device_name": A100, "energy_j": 3.6e6, "train_wall_s": 3000.0}
    finish(tmp_path, "results/p/teacher.safetensors", "teacher", 0, 3600, "cpu:2")
    finish(tmp_path, "results/p/dmd2/generator.safetensors", "train", 3600, 7200, "2 --threads 1", facts)
    long = {**facts, "train_wall_s": 7200.0}
    finish(tmp_path, "results/p/dmd/generator.safetensors", "train", 3600, 7200, "2 --threads 1", long)
    finish(tmp_path, "results/p/dmd2/student/samples.json", "sample", 7200, 10800, "2 --threads 1")
    return tmp_path


def test_hours_energy_and_idle_devices(folder: Path):
    jobs = read_finished(folder)
    found = spending.report(jobs, cores=2)
    assert [(job.rule, job.model, job.gpus, job.threads, job.device) for job in jobs] == [
        ("teacher", "teacher", 0, 2, "cpu"), ("train", "dmd", 2, 1, A100), ("train", "dmd2", 2, 1, A100),
        ("sample", "dmd2", 2, 1, A100),
    ]  # fmt: skip
    assert found["total"] == {"jobs": 4, "wall_s": 18000, "gpu_hours": 8, "cpu_hours": 6, "energy_kwh": 2}
    assert found["gpus"] == 4
    assert found["idle_gpu_share"] == pytest.approx(1 - 6 / 12)  # three hours of four GPUs
    assert found["idle_core_share"] == pytest.approx(1 - 5 / 6)
    assert {row["model"]: row["gpu_hours"] for row in found["by_model"]} == {"dmd": 4, "dmd2": 4, "teacher": 0}
    assert "8 GPU-hours, 6 CPU-hours" in spending.text(found)


def test_command_writes_a_row_per_job(folder: Path, capsys: pytest.CaptureFixture[str]):
    results.costs(folder, cores=2, gpus=8, as_json=True)
    assert json.loads(capsys.readouterr().out)["idle_gpu_share"] == pytest.approx(1 - 6 / 24)
    with (folder / "results/costs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["energy_kwh"] for row in rows] == ["", "1", "1", ""]
    assert sum(float(row["gpu_hours"]) for row in rows) == 8


def test_folder_in_which_nothing_ran(tmp_path: Path):
    with pytest.raises(UserError, match="run the workflow in this folder first"):
        results.costs(tmp_path)
