"""Every row of tables 2, 4, 5 and 6 by the presets sdxl and sd15, on pipelines of their shape made here and small.

The model folders are those of diffusers, the images a folder with captions, the features a TorchScript detector; the
released students and the baselines are weight files of the published formats, where the catalogue has them.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkout import Checkout, jobs_in
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from test_reduced_imagenet import Detector, weights_file
from tiny_pipelines import RESOLUTION, UNETS, write_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

NUM = 24
RANK = 64  # of the released adapters
CAPTIONS = ("a cat", "a dog", "red photo of a cat", "a three left of a seven", "a seven right of a three", "dog")
STEPS = {"iterations": 2, "num_snapshots": 1}
TABLES = {"sdxl": (2, 4, 6), "sd15": (5,)}
SAMPLERS = {"sdxl": ("low_guidance", "high_guidance", "pairs"), "sd15": ("pndm", "ddpm")}
RUNS = {"sdxl": ("ode_regression", "dmd2_1step", "dmd2_4step_lora"), "sd15": ("dmd2_stage2",)}
OWN = {"block_out_channels": [4, 8], "attention_head_dim": 1}
"""In what a user's own U-Net, of another prediction too, differs from SDXL's."""
LATER = "dmd2-sdxl-4step-unet.bin"
"""The released student that is a copy of the one that is trained."""


def overlay_of(kind: str, folder: Path) -> dict[str, Any]:
    """The keys over the preset's: everything is small, and comes from `folder`."""
    images = {"source": "image_folder", "path": str(folder / "images"), "resolution": RESOLUTION, "shard_size": 10}
    images["captions"] = {"max_missing": 0}
    prompts = {"source": "file", "path": str(folder / "prompts.txt")}
    return {
        "data": {**images, "min_side": RESOLUTION, "max_unreadable": 0},
        "reference_data": images,
        "prompts": prompts,
        "teacher": {
            "network": UNETS[kind],
            "latent_factor": 2,
            "min_psnr": 0.01,  # the autoencoder is random
            "weights": {"path": str(folder / kind), "revision": None},
        },
        "features": {"weights": weights_file(folder / "detector.pt")},
        "pairs": {"num_pairs": 8, "shard_size": 4},
        "samplers": {name: {"num_steps": 2} for name in SAMPLERS[kind]},
        "evaluation": {
            "num_samples": 12,
            "num_blocks": 2,
            "num_shown": 6,
            "curve_samples": 12,
            "prompts": prompts,
            "protocols": ["edm"],
            "measures": ["fid"],
            "clip": None,
            "latency": {"warm_up": 0, "repeats": 2, "precision": "fp32"} if kind == "sd15" else None,
        },
        "train": {**STEPS, "batch_size": 4, "precision": "fp32", "warmup_iterations": 1},
        "runs": {name: {**STEPS, "batch_size": 4} for name in RUNS[kind]},
        "runtime": {
            "log_every": 1,
            "checkpoint_every": 2,
            "sample_batch_size": 6,
            "micro_batch_size": 2,
            "layout": "replicate",
        },
        "gpus": 0,
    }


def network(kind: str, seed: int, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**{**UNETS[kind], **changes})
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return unet


def adapters(kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Adapters of the queries, with the names of the released files."""
    rng, found = torch.Generator().manual_seed(seed), {}
    for name, weight in network(kind, 0).state_dict().items():
        if name.endswith("to_q.weight"):
            module = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            found[f"{module}.lora_down.weight"] = torch.randn(RANK, weight.shape[1], generator=rng)
            found[f"{module}.lora_up.weight"] = torch.randn(weight.shape[0], RANK, generator=rng)
            found[f"{module}.alpha"] = torch.tensor(8.0)
    return found


def write_supplied(folder: Path) -> None:
    """Model folders, images with captions, prompts and the detector."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(NUM):
        pixels = rng.integers(256, size=(RESOLUTION + number, RESOLUTION + 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{number:03d}.png")
        (folder / f"images/{number:03d}.txt").write_text(CAPTIONS[number % len(CAPTIONS)])
    (folder / "prompts.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    torch.manual_seed(0)
    torch.jit.script(Detector()).save(str(folder / "detector.pt"))
    for kind in TABLES:
        write_pipeline(kind, folder / kind)


def write_downloads(folder: Path) -> None:
    """The released students and the baselines, where the catalogue has them: nothing is fetched."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: value.half() for name, value in network("sdxl", 1).state_dict().items()}
    torch.save(half, folder / "dmd2-sdxl-1step-unet.bin")
    save_file(adapters("sdxl", 2), folder / "dmd2-sdxl-4step-lora.safetensors")
    save_file(network("sdxl", 3, time_cond_proj_dim=256).state_dict(), folder / "lcm-sdxl.safetensors")
    for seed, name in enumerate(("turbo-unet", "lightning-1step-unet-x0", "lightning-4step-unet"), start=4):
        save_file(network("sdxl", seed).state_dict(), folder / f"sdxl-{name}.safetensors")
    torch.save(network("sd15", 8).state_dict(), folder / "dmd2-sd15-fid8.35.bin")
    save_file(adapters("sd15", 7), folder / "lcm-lora-sdv1-5.safetensors")


def write_row_of_ones_own(checkout: Checkout) -> None:
    """A row of table 2 for a user's own U-Net: a run file, and a line of the table."""
    path = checkout / "data/downloads/mine.safetensors"
    save_file(network("sdxl", 9, **OWN).state_dict(), path)
    own = {"network": OWN, "prediction": "v_prediction"}
    run = {"description": "A U-Net of one's own.", "weights": {"path": str(path)}, "own": own}
    (checkout / "workflow/runs/mine.yaml").write_text(json.dumps(run))  # JSON is YAML
    with (checkout / "workflow/tables/table2.yaml").open("a") as table:
        table.write(
            '  - {id: t2.mine, group: Mine, method: "My U-Net", nfe: 4, measure: mine/lightning4, only: [sdxl]}\n'
        )


@pytest.fixture(scope="module")
def overlays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("supplied")
    write_supplied(folder)
    return {kind: overlay_of(kind, folder) for kind in TABLES}


def make(checkout: Checkout, kind: str, overlay: dict[str, Any], *targets: str) -> str:
    done = checkout.snakemake(*targets, "--cores", "2", overlay=overlay, config=f"preset={kind}")
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def done(fresh: Checkout, overlays: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """Both presets' tables, and the jobs that were run for them in `jobs.txt`."""
    checkout = fresh.copy(tmp_path_factory.mktemp("reduced") / "dmd2")
    downloads = checkout / "data/downloads"
    write_downloads(downloads)
    write_row_of_ones_own(checkout)
    said = make(checkout, "sdxl", overlays["sdxl"], "results/sdxl/dmd2_4step/generator.safetensors")
    torch.save(load_file(checkout / "results/sdxl/dmd2_4step/generator.safetensors"), downloads / LATER)
    for kind, numbers in TABLES.items():
        said += make(checkout, kind, overlays[kind], *(f"results/table{number}.csv" for number in numbers))
    (checkout / "jobs.txt").write_text("\n".join(jobs_in(said)))
    return checkout


def rows(checkout: Checkout, number: int) -> dict[str, dict[str, str]]:
    with (checkout / f"results/table{number}.csv").open(newline="") as file:
        return {row["row_id"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize(("kind", "number"), [(kind, n) for kind, numbers in TABLES.items() for n in numbers])
def test_rows_are_measured(kind: str, number: int, done: Checkout):
    found = rows(done, number)
    measured = {row_id for row_id, row in found.items() if row["source"] == "measured"}
    if kind == "sdxl":
        assert measured == set(found), "every row of these tables"
        assert ("t2.mine" in found) == (number == 2)
    else:
        own = {"dpmpp4", "unipc4", "lcmlora4", "dmd2", "released", "teacher_ode", "teacher_sde"}
        assert measured == {f"t5.{name}" for name in own}
        assert {row["source"] for row in found.values()} == {"measured", "quoted"}
    for row_id in measured:
        assert np.isfinite(float(found[row_id]["fid"])), row_id
        assert found[row_id]["preset"] == kind


def test_passes_are_those_of_each_rows_sampler(done: Checkout):
    found = rows(done, 2)
    for row_id, row in found.items():
        if not row_id.startswith(("t2.teacher", "t2.floor")):
            assert row["nfe"] == row["paper_nfe"], row_id
    assert found["t2.teacher_cfg6"]["nfe"] == "4", "two guided steps"
    assert rows(done, 5)["t5.lcmlora4"]["nfe"] == "4"


def test_a_released_student_is_measured_as_the_run_that_it_is_a_copy_of(done: Checkout):
    found = rows(done, 2)
    assert found["t2.released_4"]["fid"] == found["t2.dmd2_4"]["fid"]
    others = [row["fid"] for row_id, row in found.items() if row_id != "t2.released_4"]
    assert len(set(others)) == len(others), "each of the others is a model or sampler of its own"


def test_imported_models_are_not_trained(done: Checkout):
    jobs = (done / "jobs.txt").read_text().splitlines()
    imported = {job.partition("import_student ")[2] for job in jobs if "import_student " in job}
    trained = {job.partition("train ")[2] for job in jobs if " train " in job}
    assert imported == {
        *("released_dmd2_1step", "released_dmd2_4step", "released_dmd2_4step_lora", "lcm_sdxl", "sdxl_turbo"),
        *("mine", "released_dmd2_stage2", "sdxl_lightning_1step", "sdxl_lightning_4step", "lcm_lora_sd15"),
    }
    assert not imported & trained


@pytest.mark.parametrize(("kind", "run"), [("sdxl", "released_dmd2_4step_lora"), ("sd15", "lcm_lora_sd15")])
def test_adapters_are_added_to_the_teachers_weights(kind: str, run: str, done: Checkout):
    teacher = load_file(done / f"results/{kind}/teacher/teacher.safetensors")
    merged = load_file(done / f"results/{kind}/{run}/generator.safetensors")
    assert merged.keys() == teacher.keys()
    changed = {name for name, value in teacher.items() if not torch.equal(value, merged[name])}
    assert changed == {name for name in teacher if name.endswith("to_q.weight")}
    record = json.loads((done / f"results/{kind}/{run}/generator.json").read_text())
    assert record["source"]["file"].endswith(".safetensors")


def test_the_models_files_are_fetched_before_anything_reads_them(fresh: Checkout):
    done = fresh.snakemake("results/sdxl/components/components.json", "-n", config="preset=sdxl")
    assert jobs_in(done.stdout) == {"download stable-diffusion-xl-base-1.0", "sdxl: components"}, done.stdout


def test_a_hub_id_that_is_not_in_the_cache_is_refused_in_planning(fresh: Checkout):
    weights = {"path": "owner/name", "revision": "0" * 40}
    done = fresh.snakemake("results/table2.csv", "-n", overlay={"teacher": {"weights": weights}}, config="preset=sdxl")
    assert done.returncode != 0
    assert f"run `hf download owner/name --revision {weights['revision']}` where there is a network" in done.stdout
