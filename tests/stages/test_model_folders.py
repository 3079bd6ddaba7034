"""Stages around a model folder of diffusers: the U-Net imported, captions that are too long, another autoencoder."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import KINDS, RESOLUTION, UNETS, write_pipeline
from world import WORKFLOW

from dmd2.config import Runtime
from dmd2.datasets.shards import read_manifest
from dmd2.errors import UserError
from dmd2.files import sha256
from dmd2.lineage.plan import Plan
from dmd2.lineage.records import read_record
from dmd2.stages import data, imports
from dmd2.stages.batches import data_batches
from dmd2.stages.components import components
from dmd2.teachers import load_teacher

CAPTIONS = ("a cat", "a dog", "red photo of a cat", "a three left of a seven" * 2)
RUNTIME = Runtime(device="cpu", sample_batch_size=4, micro_batch_size=4)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def plan_of(kind: str, folder: Path) -> Plan:
    over = {
        "data": {"source": "image_folder", "path": "images", "resolution": RESOLUTION, "min_side": RESOLUTION},
        "teacher": {
            "network": UNETS[kind],
            "latent_factor": 2,
            "min_psnr": 0.01,  # the autoencoder is random
            "weights": {"path": str(folder / "model"), "revision": None},
        },
    }
    return Plan(WORKFLOW, kind, over)


def test_the_folders_network_is_imported_with_its_files_in_the_record(kind: str, tmp_path: Path) -> None:
    model, out = write_pipeline(kind, tmp_path / "model"), tmp_path / "teacher.safetensors"
    file = model / "unet/diffusion_pytorch_model.safetensors"
    plan = plan_of(kind, tmp_path)
    imports.teacher(plan.teacher, out)
    written, stored = load_file(out), load_file(file)
    assert written.keys() == stored.keys()
    assert all(torch.equal(value, written[name]) for name, value in stored.items())
    source = {"model": str(model), "revision": None, "sha256": {f"unet/{file.name}": sha256(file)}}
    assert read_record(out)["source"] == source


def test_another_network_than_the_configured_one_is_not_imported(tmp_path: Path) -> None:
    write_pipeline("sdxl", tmp_path / "model")
    with pytest.raises(UserError, match=r"unet/config.json: .*teacher\.network"):
        imports.teacher(plan_of("sd15", tmp_path).teacher, tmp_path / "teacher.safetensors")
    assert not (tmp_path / "teacher.safetensors").exists()


def write_shards(plan: Plan, folder: Path) -> Path:
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number, caption in enumerate(CAPTIONS):
        pixels = rng.integers(256, size=(RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{number}.png")
        (folder / f"images/{number}.txt").write_text(caption)
    manifest = folder / "shards/manifest.json"
    data.shards(plan.shards, manifest, str(folder / "images"), {}, 1)
    return manifest


def test_latents_report_captions_that_are_cut_and_are_not_used_with_another_autoencoder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan, record = plan_of("sd15", tmp_path), tmp_path / "components/components.json"
    shards, manifest = write_shards(plan, tmp_path), tmp_path / "latents/manifest.json"
    made = []
    for seed in (0, 1):  # the second model replaces the first in its place
        write_pipeline("sd15", tmp_path / "model", seed=seed)
        components(plan.components, None, record)
        if made:
            teacher = load_teacher(plan.preset.teacher, plan.preset.data)
            batches = {"batch_size": 4, "seed": 0, "device": torch.device("cpu")}
            with pytest.raises(
                UserError, match=r"manifest.json: latents of another autoencoder: encoder_sha256 is \w+"
            ):
                data_batches(plan.train("dmd2_stage1"), manifest, teacher, **batches)
        with caplog.at_level(logging.WARNING):
            data.latents(plan.latents, shards, manifest, RUNTIME, record)
        assert caplog.messages == ["latents: 1 of 4 captions are longer than the tokenizer takes and are cut"]
        caplog.clear()
        made.append(read_manifest(manifest)["shards"][0]["sha256"])
    assert made[0] != made[1], "shards of the first autoencoder are not kept"
    data_batches(plan.train("dmd2_stage1"), manifest, teacher, **batches)
