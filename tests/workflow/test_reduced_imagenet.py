"""ImageNet-64's whole path on a network, images and extractor of its formats, all made here and small.

The teacher comes from a pickle in EDM's format, the images from a tree of JPEGs, the features from a TorchScript
detector, the published statistics from an .npz. Of each kind of row in tables 1 and 3 one is measured; the others are
planned. They differ in keys of training alone, with which preset smoke trains them.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkout import Checkout, jobs_in
from edm_pickles import edm_pickle
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd2 import config
from dmd2.files import sha256
from dmd2.teachers.edm import build_denoiser

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

CLASSES, PER_CLASS, SIDE = 2, 12, 16
NETWORK: dict[str, Any] = {
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "channels_per_head": 16,
}
STEPS = {"iterations": 2, "batch_size": 4}
RESULTS = "results/imagenet64"
TRAINED = {"dmd", "noreg", "noreg_ttur", "dmd2", "dmd2_long", "ours", "gan", "gan_ttur", "ratio10", "async5"}
RELEASED = {"released_dmd2", "released_dmd2_long", "released_noreg_ttur"}
BEST = {"dmd2/best", "dmd2_long/best"}
ENTRIES = {f"{run}/student" for run in TRAINED | RELEASED} | BEST | {"teacher/ode", "teacher/sde"}
MEASURED = {1: {"t1.dmd2", "t1.released_dmd2", "t1.edm_ode", "t1.floor"}, 3: {"t3.full", "t3.floor"}}


class Detector(nn.Module):
    """Called as the published detector is: pooled features, or class probabilities without the last layer's bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.output = nn.Linear(6, 5)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        features = self.conv(img.float() / 128 - 1).relu().mean(dim=[2, 3])
        if return_features:
            return features
        logits = nn.functional.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return logits.softmax(dim=1)


def weights_file(path: Path) -> dict[str, str]:
    return {"path": str(path), "sha256": sha256(path)}


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"n{label:08d}").mkdir(parents=True)
        for number in range(PER_CLASS):
            height, width = rng.integers(SIDE, 3 * SIDE, size=2)
            pixels = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"n{label:08d}" / f"{number:03d}.JPEG")


def network(seed: int) -> nn.Module:
    data = config.Data(source="image_folder", resolution=SIDE, num_classes=CLASSES)
    denoiser = build_denoiser(config.TeacherConfig(kind="edm", network=config.Network(**NETWORK)), data)
    denoiser.model.reset(torch.Generator().manual_seed(seed))
    return denoiser


def write_vgg(path: Path) -> None:
    """Random weights in the layout of torchvision's VGG-16, of which LPIPS reads the convolutions."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    torch.save(nn.ModuleDict({"features": make_layers(cfgs["D"])}).state_dict(), path)


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("supplied")
    write_images(folder / "train")
    (folder / "teacher.pkl").write_bytes(edm_pickle(network(0)))
    torch.manual_seed(0)
    torch.jit.script(Detector()).save(str(folder / "detector.pt"))
    np.savez(folder / "statistics.npz", mu=np.zeros(6), sigma=np.eye(6))
    write_vgg(folder / "vgg16.pth")
    heun = {"kind": "heun", "num_steps": 2}
    runs: dict[str, dict[str, Any]] = {name: dict(STEPS) for name in ("noreg_ttur", "dmd2_long", "ours")}
    runs["dmd"] = {**STEPS, "batch_size": 2, "vgg_weights": weights_file(folder / "vgg16.pth")}
    return {
        "data": {
            "source": "image_folder",
            "path": str(folder / "train"),
            "resolution": SIDE,
            "num_classes": CLASSES,
            "shard_size": 10,
        },
        "teacher": {"network": NETWORK, "weights": weights_file(folder / "teacher.pkl")},
        "features": {
            "weights": weights_file(folder / "detector.pt"),
            "reference": weights_file(folder / "statistics.npz"),
        },
        "pairs": {"num_pairs": 8, "shard_size": 4},
        "samplers": {"ode": heun, "sde": {**heun, "s_churn": 1}},
        "evaluation": {"num_samples": 12, "num_blocks": 2, "num_shown": 6, "curve_samples": 12},
        "train": {**STEPS, "num_snapshots": 1, "warmup_iterations": 1},
        "runs": runs,
        "runtime": {"log_every": 1, "checkpoint_every": 2, "sample_batch_size": 6},
        "gpus": 0,
    }


@pytest.fixture(scope="module")
def done(fresh: Checkout, overlay: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A student, the teacher and the floor measured, another student trained in LPIPS; the first as a released one."""
    checkout = fresh.copy(tmp_path_factory.mktemp("reduced") / "dmd2")
    made = ("dmd2/student/metrics.json", "dmd2/student/grid.png", "teacher/ode/metrics.json", "floor/metrics.json")
    make(checkout, overlay, *(f"{RESULTS}/{name}" for name in (*made, "dmd/generator.safetensors")))
    released = checkout / "data/downloads/dmd2-imagenet64-fid1.51.bin"  # where the catalogue has it: nothing is fetched
    released.parent.mkdir(parents=True, exist_ok=True)
    torch.save(load_file(checkout / f"{RESULTS}/dmd2/generator.safetensors"), released)
    said = make(checkout, overlay, f"{RESULTS}/released_dmd2/student/metrics.json")
    job = "imagenet64: {} released_dmd2{}"
    record = f"download {released.name}"
    assert jobs_in(said) == {record, job.format("import_student", ""), job.format("metrics", "/student")}
    make(checkout, overlay, "results/table1.csv", "results/table3.csv", config="pending=true")
    return checkout


def make(checkout: Checkout, overlay: dict[str, Any], *targets: str, config: str = "") -> str:
    done = checkout.snakemake(*targets, "--cores", "2", overlay=overlay, config=f"preset=imagenet64 {config}")
    assert done.returncode == 0, done.stdout
    return done.stdout


def rows(checkout: Checkout, number: int) -> dict[str, dict[str, str]]:
    with (checkout / f"results/table{number}.csv").open(newline="") as file:
        return {row["row_id"]: row for row in csv.DictReader(file)}


def test_every_row_is_planned(fresh: Checkout, overlay: dict[str, Any]):
    arguments = ("results/table1.csv", "results/table3.csv", "-n")
    done = fresh.snakemake(*arguments, overlay=overlay, config="preset=imagenet64")
    assert done.returncode == 0, done.stdout
    jobs = {job.removeprefix("imagenet64: ") for job in jobs_in(done.stdout)}
    assert {job for job in jobs if job.startswith("metrics ")} == {f"metrics {entry}" for entry in ENTRIES}
    assert {job for job in jobs if job.startswith("train ")} == {f"train {run}" for run in TRAINED}
    assert {job for job in jobs if job.startswith("import_student ")} == {f"import_student {run}" for run in RELEASED}
    assert {"floor", "teacher", "pairs", "curve dmd2", "curve dmd2_long", "select dmd2/best"} <= jobs


def test_rows_of_each_kind_are_measured(done: Checkout):
    for number, ids in MEASURED.items():
        assert {key for key, row in rows(done, number).items() if row["source"] == "measured"} == ids
        for row in rows(done, number).values():
            assert row["source"] in ("measured", "quoted", "pending"), row["row_id"]
            if row["source"] == "measured":
                assert np.isfinite(float(row["fid"])), row["row_id"]


def test_student_is_trained_in_lpips(done: Checkout):
    log = (done / f"{RESULTS}/dmd/train_log.jsonl").read_text().splitlines()
    assert all(json.loads(line)["regression_loss"] > 0 for line in log)


def test_teacher_is_the_network_of_the_pickle(done: Checkout, overlay: dict[str, Any]):
    record = json.loads((done / f"{RESULTS}/teacher/teacher.json").read_text())
    assert record["origin"] == "file"
    assert overlay["teacher"]["weights"]["sha256"] in json.dumps(record)


def test_released_student_is_measured_as_the_run_that_it_is_a_copy_of(done: Checkout):
    own, imported = (
        json.loads((done / f"{RESULTS}/{run}/student/metrics.json").read_text()) for run in ("dmd2", "released_dmd2")
    )
    assert imported["metrics"]["fid"] == own["metrics"]["fid"]
    assert imported["model"]["run"] == "released_dmd2"
