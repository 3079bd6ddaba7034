"""The text-to-image preset for tests through the workflow, and what a user does with its students afterwards."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from checkout import Checkout, jobs_in
from PIL import Image
from safetensors.torch import load_file

from dmd2.datasets import ShardReader
from dmd2.stages.generate import export, generate

PRESET = "smoke-t2i"
RUNS = ("dmd2_1step", "dmd2_4step_lora")


@pytest.fixture(scope="module")
def run(fresh: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = fresh.copy(tmp_path_factory.mktemp("text") / "dmd2")
    targets = [f"results/{PRESET}/{name}/student/metrics.json" for name in RUNS]
    targets.append(f"results/{PRESET}/teacher/ddim4/grid.png")
    done = checkout.snakemake(*targets, "--cores", "2", config=f"preset={PRESET}")
    assert done.returncode == 0, done.stdout
    return checkout


def results(run: Checkout) -> Path:
    return run.folder / "results" / PRESET


def test_held_out_compositions_are_in_no_training(run: Checkout):
    from dmd2.config.digit_pairs import composition, is_held_out

    images, latents = (
        ShardReader(run.folder / "data" / PRESET / name / "manifest.json") for name in ("shards", "latents")
    )
    assert (len(images), len(latents)) == (6000, 4800)
    captions = latents.read(range(len(latents)), ["txt"])["txt"]
    assert not any(is_held_out(*composition(str(caption))) for caption in captions)
    assert set(latents.fields) == {"latent", "cond.ids", "txt"}


def test_metrics_are_of_prompts_and_count_guided_passes(run: Checkout):
    record = json.loads((results(run) / "dmd2_1step/student/metrics.json").read_text())
    assert record["nfe"] == 1
    assert {"fid", "patch_fid", "alignment", "alignment_held_out", "prompt_diversity"} <= set(record["metrics"])
    manifest = json.loads((results(run) / "teacher/ddim4/samples/manifest.json").read_text())
    assert manifest["facts"]["nfe"] == 8, "four guided steps"


def test_the_one_step_student_starts_from_the_regression_at_level_399(run: Checkout):
    spec = json.loads((results(run) / "dmd2_1step/generator.json").read_text())["provenance"]["spec"]
    assert spec["train"]["student_levels"] == [399]
    log = [json.loads(line) for line in (results(run) / "ode_regression/train_log.jsonl").read_text().splitlines()]
    assert all("regression_loss" in row and "denoising_loss" not in row for row in log)


def test_adapters_are_trained_and_exported_as_a_whole_network(run: Checkout):
    folder = results(run) / "dmd2_4step_lora"
    whole, teacher = (
        load_file(folder / "generator.safetensors"),
        load_file(results(run) / "teacher/teacher.safetensors"),
    )
    assert whole.keys() == teacher.keys()
    changed = [name for name, value in whole.items() if not np.array_equal(value, teacher[name])]
    assert changed
    assert not any("norm" in name for name in changed), "adapters change matrices and convolutions alone"
    trained = load_file(folder / "networks.safetensors")
    assert all("lora_" in name for name in trained if name.startswith("generator."))
    assert sum(v.numel() for k, v in trained.items() if k.startswith("generator.")) < sum(
        v.numel() for v in whole.values()
    )


def test_images_are_generated_for_prompts(run: Checkout, tmp_path: Path):
    prompts = ["a three left of a seven", "an eight right of a one"]
    written = generate(results(run) / "dmd2_1step", prompts, tmp_path, num=2, seed=3, steps=4, guidance_scale=2.0)
    assert [path.name for path in written] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    images = [np.asarray(Image.open(path)) for path in written]
    assert {image.shape for image in images} == {(16, 16)}
    assert len({image.tobytes() for image in images}) == 4


def test_students_are_exported_for_stock_pipelines(run: Checkout, tmp_path: Path):
    export(results(run) / "dmd2_1step", tmp_path / "one", lora=False)
    assert (tmp_path / "one/unet/diffusion_pytorch_model.safetensors").exists()
    scheduler = json.loads((tmp_path / "one/scheduler/scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["num_train_timesteps"]) == ("LCMScheduler", 400)
    export(results(run) / "dmd2_4step_lora", tmp_path / "lora", lora=True)
    assert (tmp_path / "lora/pytorch_lora_weights.safetensors").exists()


def test_a_text_table_is_left_alone_by_a_preset_of_classes(run: Checkout):
    planned = run.snakemake("-n")
    assert planned.returncode == 0, planned.stdout
    assert "results/table1.csv" in planned.stdout
    assert "results/table2.csv" not in planned.stdout
    requested = run.snakemake("results/table2.csv", "--cores", "1")
    assert requested.returncode == 0, requested.stdout
    rows = list(csv.DictReader((run.folder / "results/table2.csv").open()))
    assert {row["source"] for row in rows} == {"quoted", "pending"}
    assert all("selected preset" in row["note"] for row in rows if row["source"] == "pending")


@pytest.mark.parametrize(("preset", "tables", "num_trained"), [("sdxl", (2, 4, 6), 7), ("sd15", (5,), 2)])
def test_presets_at_paper_scale_plan_their_tables(
    fresh: Checkout, preset: str, tables: tuple[int, ...], num_trained: int
):
    done = fresh.snakemake("-n", config=f"preset={preset}")
    assert done.returncode == 0, done.stdout
    jobs = {job.removeprefix(f"{preset}: ") for job in jobs_in(done.stdout)}
    assert {f"table table{number}" for number in range(1, 7)} & jobs == {f"table table{number}" for number in tables}
    assert sum(job.startswith("train ") for job in jobs) == num_trained
    assert {"components", "latents", "reference_shards"} <= jobs
    assert any(job.startswith("download ") for job in jobs)
