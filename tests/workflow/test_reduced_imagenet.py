"""ImageNet-64's whole path on a network, images and extractor of its formats, all made here and small.

The teacher comes from a pickle in EDM's format, the images from a tree of JPEGs, the features from a TorchScript
detector, the published statistics from an .npz; every row of tables 1 and 3 is trained, streamed and measured.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkout import Checkout
from edm_pickles import edm_pickle
from PIL import Image
from torch import Tensor, nn

from dmd2 import config
from dmd2.files import sha256
from dmd2.teachers.edm import build_denoiser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
]

CLASSES, PER_CLASS, SIDE = 3, 12, 16
NETWORK: dict[str, Any] = {
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "channels_per_head": 16,
}
STEPS = {"iterations": 3, "batch_size": 4}


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


def write_released(folder: Path) -> None:
    """The released students where the catalogue of downloads has them, so that nothing is fetched."""
    folder.mkdir(parents=True, exist_ok=True)
    for fid in ("1.51", "2.61", "1.28"):
        torch.save(network(int(fid.replace(".", ""))).state_dict(), folder / f"dmd2-imagenet64-fid{fid}.bin")


def write_vgg(path: Path) -> None:
    """Random weights in the layout of torchvision's VGG-16, of which LPIPS reads the convolutions."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    torch.save({k: v for k, v in vgg16(weights=None).state_dict().items() if k.startswith("features.")}, path)


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
    runs["dmd"] = {**STEPS, "batch_size": 2, "num_snapshots": 1, "vgg_weights": weights_file(folder / "vgg16.pth")}
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
        "train": {**STEPS, "num_snapshots": 2, "warmup_iterations": 1},
        "runs": runs,
        "runtime": {"log_every": 1, "checkpoint_every": 2, "sample_batch_size": 6},
        "gpus": 0,
    }


@pytest.fixture(scope="module")
def done(fresh: Checkout, overlay: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = fresh.copy(tmp_path_factory.mktemp("reduced") / "dmd2")
    write_released(checkout / "data/downloads")
    targets = ("results/table1.csv", "results/table3.csv", "results/imagenet64/dmd2/student/grid.png")
    run = checkout.snakemake(*targets, "--cores", "2", overlay=overlay, config="preset=imagenet64")
    assert run.returncode == 0, run.stdout
    return checkout


def rows(checkout: Checkout, number: int) -> dict[str, dict[str, str]]:
    with (checkout / f"results/table{number}.csv").open(newline="") as file:
        return {row["row_id"]: row for row in csv.DictReader(file)}


def test_every_row_that_is_trained_here_is_measured(done: Checkout):
    measured = {key for n in (1, 3) for key, row in rows(done, n).items() if row["source"] == "measured"}
    assert measured >= {"t1.dmd", "t1.dmd2", "t1.dmd2_long", "t1.edm_ode", "t1.edm_sde", "t1.floor"}
    assert measured >= {"t1.dmd2_best", "t1.released_dmd2", "t1.released_dmd2_long", "t1.ours"}
    assert measured >= {"t3.ratio10", "t3.async5", "t3.released_noreg_ttur"}
    assert measured >= {"t3.dmd", "t3.noreg", "t3.noreg_ttur", "t3.full", "t3.gan", "t3.gan_ttur"}
    for row in (*rows(done, 1).values(), *rows(done, 3).values()):
        assert row["source"] in ("measured", "quoted", "pending"), row["row_id"]
        if row["source"] == "measured":
            assert np.isfinite(float(row["fid"])), row["row_id"]


def test_teacher_is_the_network_of_the_pickle(done: Checkout, overlay: dict[str, Any]):
    record = json.loads((done / "results/imagenet64/teacher/teacher.json").read_text())
    assert record["origin"] == "file"
    assert overlay["teacher"]["weights"]["sha256"] in json.dumps(record)


def test_released_student_is_measured_as_the_run_that_it_is_a_copy_of(
    done: Checkout, overlay: dict[str, Any], tmp_path: Path
):
    from safetensors.torch import load_file

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    torch.save(load_file(done / "results/imagenet64/dmd2/generator.safetensors"), folder / "pytorch_model.bin")
    run = json.dumps({"description": "A released student.", "weights": {"path": str(folder)}})  # JSON is YAML
    with done.added("workflow/runs/released.yaml", run):
        target = "results/imagenet64/released/student/metrics.json"
        made = done.snakemake(target, "--cores", "2", overlay=overlay, config="preset=imagenet64")
        assert made.returncode == 0, made.stdout
        assert "rule train" not in made.stdout
    own = json.loads((done / "results/imagenet64/dmd2/student/metrics.json").read_text())
    imported = json.loads((done / target).read_text())
    assert imported["metrics"]["fid"] == own["metrics"]["fid"]
    assert imported["model"]["run"] == "released"
