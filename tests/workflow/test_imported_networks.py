"""Networks that were trained elsewhere, as a user names them: what is planned, what a move starts, what stops it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import Checkout
from safetensors.torch import load_file, save_file

from dmd2 import config
from dmd2.files import sha256
from dmd2.lineage.plan import Plan
from dmd2.teachers import load_teacher

TEACHER = "results/smoke/teacher/teacher.safetensors"
STUDENT = "results/smoke/released/student/metrics.json"


def write_weights(path: Path) -> dict[str, str]:
    """Initial weights of the smoke preset's network, and how a preset names them."""
    preset = Plan(Path(__file__).parents[2] / "workflow", "smoke").preset
    teacher: config.TeacherConfig = preset.teacher.model_copy(update={"training": None})
    save_file(load_teacher(teacher, preset.data).denoiser.state_dict(), path)
    return {"path": str(path), "sha256": sha256(path)}


def imported(weights: dict[str, str]) -> dict[str, Any]:
    return {"teacher": {"training": None, "weights": weights}}


def released(path: str) -> str:
    return json.dumps({"description": "Trained elsewhere.", "weights": {"path": path}})  # JSON is YAML


def stopped(checkout: Checkout, target: str, overlay: dict[str, Any] | None = None) -> str:
    """What a user reads when the planning stops."""
    run = checkout.snakemake(target, "-n", overlay=overlay)
    assert run.returncode != 0
    return run.stdout


def test_published_teacher_needs_no_data_and_may_be_moved(fresh: Checkout, tmp_path: Path):
    checkout = fresh.copy(tmp_path / "dmd2")
    weights = write_weights(tmp_path / "published.safetensors")
    assert checkout.planned(TEACHER, overlay=imported(weights)) == {"teacher"}
    run = checkout.snakemake(TEACHER, "--cores", "1", overlay=imported(weights))
    assert run.returncode == 0, run.stdout
    record = json.loads((checkout / TEACHER).with_suffix(".json").read_text())
    assert record["source"] == {"file": "published.safetensors", "sha256": weights["sha256"]}

    (tmp_path / "elsewhere").mkdir()
    moved = {**weights, "path": shutil.move(weights["path"], tmp_path / "elsewhere")}
    assert checkout.planned(TEACHER, overlay=imported(moved)) == set()
    other = {**moved, "sha256": "0" * 64}
    assert checkout.planned(TEACHER, overlay=imported(other)) == {"teacher"}


def test_listed_file_is_fetched_first(fresh: Checkout):
    weights = {"path": "data/downloads/edm-imagenet-64x64-cond-adm.pkl"}
    assert fresh.planned(TEACHER, overlay=imported(weights)) == {
        "download edm-imagenet-64x64-cond-adm.pkl",
        "teacher",
    }


def test_missing_weights_stop_the_planning_with_what_to_put_where(fresh: Checkout):
    reported = stopped(fresh, TEACHER, imported({"path": "/nowhere/teacher.pkl"}))
    assert "teacher.weights.path: /nowhere/teacher.pkl does not exist; put it there or correct the path" in reported
    with fresh.added("workflow/runs/released.yaml", released("/nowhere/student.bin")):
        assert "run released: weights: /nowhere/student.bin does not exist; put it there" in stopped(fresh, STUDENT)
        assert "train dmd2" in fresh.planned("results/smoke/dmd2/generator.safetensors"), "others can be planned"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_released_student_is_sampled_and_measured_but_not_trained(kind: str, fresh: Checkout, tmp_path: Path):
    path = tmp_path / "student.bin"
    path.mkdir() if kind == "folder" else path.touch()
    with fresh.added("workflow/runs/released.yaml", released(str(path))):
        planned = fresh.planned(STUDENT)
    assert {"import_student released", "sample released/student", "metrics released/student"} <= planned
    assert not any(job.split()[0] in ("train", "teacher", "latents", "curve") for job in planned)


def test_released_folder_is_imported_and_sampled(fresh: Checkout, tmp_path: Path):
    checkout, folder = fresh.copy(tmp_path / "dmd2"), tmp_path / "checkpoint_model_193500"
    folder.mkdir()
    source = write_weights(tmp_path / "student.safetensors")
    torch.save(load_file(source["path"]), folder / "pytorch_model.bin")
    samples = "results/smoke/released/student/samples/manifest.json"
    with checkout.added("workflow/runs/released.yaml", released(str(folder))):
        run = checkout.snakemake(samples, "--cores", "1")
        assert run.returncode == 0, run.stdout
        assert checkout.planned(samples) == set()
    record = json.loads((checkout / "results/smoke/released/generator.json").read_text())
    assert record["source"] == {"file": "pytorch_model.bin", "sha256": sha256(folder / "pytorch_model.bin")}
    assert sha256(checkout / "results/smoke/released/generator.safetensors") == source["sha256"]
    assert json.loads((checkout / samples).read_text())["facts"]["model"]["run"] == "released"


def test_run_can_start_from_a_released_one(fresh: Checkout, tmp_path: Path):
    child = json.dumps({"description": "Goes on.", "train": {"init_run": "released"}})
    with (
        fresh.added("workflow/runs/released.yaml", released(str(tmp_path))),
        fresh.added("workflow/runs/child.yaml", child),
    ):
        planned = fresh.planned("results/smoke/child/generator.safetensors")
    assert {"import_networks released", "train child"} <= planned
    assert "import_student released" not in planned
