"""A tiny chain of stages, and samples that depend on nothing but their model, seed and number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import PLAN, dmd2, images, options, random_model, sample_options
from forked import command, on_ranks
from safetensors.torch import load_file

from dmd2.files import read_json
from dmd2.lineage.records import read_record


def test_chain_of_stages_leaves_records_logs_and_no_state(folder: Path):
    for name, iterations in (("teacher/teacher", 5), ("dmd/generator", 4), ("noreg_ttur/networks", 4)):
        record = read_record(folder / f"{name}.safetensors")
        assert record["iterations"] == iterations
    assert [item["step"] for item in read_json(folder / "dmd/snapshots.json")["snapshots"]] == [2, 4]
    rows = [json.loads(line) for line in (folder / "dmd/train_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["regression_loss"]) for row in rows)
    assert list((folder / "state").iterdir()) == [], "checkpoints are removed once the results are there"
    last = load_file(folder / "dmd/snapshots/00000004.safetensors")
    final = load_file(folder / "dmd/generator.safetensors")
    assert all(torch.equal(last[name], final[name]) for name in final)


def test_samples_are_measured_with_their_floor(folder: Path):
    shards, samples = folder / "shards/manifest.json", folder / "samples/manifest.json"
    extractor, stats = folder / "features/extractor.weights", folder / "features/reference.npz"
    assert dmd2("features", *options(spec=PLAN.features.to_json(), images=shards, weights=extractor)) == 0
    spec = PLAN.reference.to_json()
    assert dmd2("reference", *options(spec=spec, images=shards, extractor=extractor, out=stats)) == 0
    assert dmd2(*sample_options(folder / "dmd/generator.safetensors", "dmd/student", samples)) == 0
    found, state = {}, folder / "state"
    for entry, extra in (("dmd/student", {"samples": samples}), ("floor", {})):
        out = folder / f"{entry.replace('/', '-')}.json"
        given = {"reference": stats, "extractor": extractor, "state": state, **extra}
        assert dmd2("metrics", *options(spec=PLAN.metrics(entry).to_json(), out=out, **given)) == 0
        found[entry] = read_json(out)
    assert found["dmd/student"]["nfe"] == 1
    assert found["dmd/student"]["provenance"]["digest"] == PLAN.metrics("dmd/student").digest
    shared = found["dmd/student"]["metrics"].keys() & found["floor"]["metrics"].keys()
    distances = [name for name in shared if "distance" in name or "fid" in name]
    assert distances
    for name in distances:
        assert found["dmd/student"]["metrics"][name]["mean"] > found["floor"]["metrics"][name]["mean"]


def test_samples_do_not_depend_on_the_batch_size(tmp_path: Path):
    for model, entry in (("noreg_ttur", "noreg_ttur/student"), ("teacher", "teacher/sde")):
        weights = random_model(tmp_path / model, model)
        for batch in (1, 64):
            assert dmd2(*sample_options(weights, entry, tmp_path / model / str(batch) / "manifest.json", batch)) == 0
        one, many = (images(tmp_path / model / str(batch) / "manifest.json") for batch in (1, 64))
        assert one.shape == (80, 8, 8, 1)
        np.testing.assert_array_equal(one, many)
        assert len({image.tobytes() for image in many}) == 80, "all samples differ"


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "entry"), [("noreg_ttur", "noreg_ttur/student"), ("teacher", "teacher/sde")])
def test_samples_of_a_gpu_are_those_of_the_cpu(model: str, entry: str, tmp_path: Path):
    weights = random_model(tmp_path, model)
    for device in ("cpu", "cuda"):
        assert dmd2(*sample_options(weights, entry, tmp_path / device / "manifest.json", device=device)) == 0
    here, there = (images(tmp_path / device / "manifest.json") for device in ("cpu", "cuda"))
    assert (here != there).mean() < 0.05, "rounded to another grey level"


def test_samples_do_not_depend_on_the_number_of_processes(tmp_path: Path):
    weights = random_model(tmp_path, "noreg_ttur")
    arguments = sample_options(weights, "noreg_ttur/student", tmp_path / "two/manifest.json", 7)
    on_ranks(2, command, arguments, {"dmd2.stages.sample.SHARD": 16})
    assert len(list((tmp_path / "two").glob("*.tar"))) == 5
    assert dmd2(*sample_options(weights, "noreg_ttur/student", tmp_path / "one/manifest.json")) == 0
    np.testing.assert_array_equal(images(tmp_path / "two/manifest.json"), images(tmp_path / "one/manifest.json"))
