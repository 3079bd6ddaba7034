"""Streamed evaluation: the same samples, measured without being stored, in parts that outlive a killed job."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import start
from world import BLOCKS, NUM, RUNTIME, WORKFLOW, World, measure_and_die

from dmd2.datasets import ShardReader
from dmd2.lineage.plan import Plan
from dmd2.metrics import Tally
from dmd2.metrics.images import batches
from dmd2.stages import measure
from dmd2.stages.sample import sample

BOTH = ["edm", "dmd2"]
MEASURES = ["fid", "fid_dmd2", "pixel_fd", "nearest_distance", "diversity", "accuracy", "precision", "recall"]


def streamed(world: World, **evaluation: Any) -> Plan:
    return world.plan(evaluation={"streamed": True, "protocols": BOTH, **evaluation})


def blocks_of(record: dict) -> dict[str, list[float]]:
    return {name: value["blocks"] for name, value in record["metrics"].items()}


def assert_close(a: dict, b: dict, rel: float) -> None:
    assert list(a["metrics"]) == list(b["metrics"])
    for name, values in blocks_of(a).items():
        np.testing.assert_allclose(values, blocks_of(b)[name], rtol=rel, err_msg=name)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CHUNK", 40)  # 96 samples are parts of 40, 40 and 16


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """The ids that were sampled, in the order in which they were."""
    from dmd2.stages import sample as stage

    ids: list[range] = []
    make = stage.sample_x0

    def recording(spec: Any, teacher: Any, some: range, *rest: Any) -> Any:
        ids.append(some)
        return make(spec, teacher, some, *rest)

    monkeypatch.setattr(stage, "sample_x0", recording)
    return ids


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The record of the teacher's streamed samples, made at one go."""
    return world.metrics(
        streamed(world), "teacher/ode", tmp_path_factory.mktemp("whole") / "m.json", weights=world.teacher
    )


@pytest.mark.parametrize("entry", ["teacher/ode", "dmd2/student"])
def test_streamed_samples_measure_what_stored_ones_do(world: World, tmp_path: Path, entry: str):
    weights = world.teacher if entry == "teacher/ode" else world.student
    stored = world.plan(evaluation={"protocols": BOTH})
    sample(stored.sample(entry), weights, tmp_path / "samples/manifest.json", RUNTIME)
    a = world.metrics(stored, entry, tmp_path / "a.json", samples=tmp_path / "samples/manifest.json")
    b = world.metrics(streamed(world), entry, tmp_path / "b.json", weights=weights)
    assert list(a["metrics"]) == [*MEASURES, "inception_score"]
    assert_close(a, b, rel=1e-6)
    assert a["protocols"] == b["protocols"]
    assert {key: value for key, value in a.items() if key != "metrics"} == {
        key: value for key, value in b.items() if key != "metrics"
    }
    fids = blocks_of(a)
    assert fids["fid"] != pytest.approx(fids["fid_dmd2"], rel=1e-4), "the protocols do not differ"


def test_parts_of_any_size_measure_the_same(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runtime = RUNTIME.model_copy(update={"sample_batch_size": 8})
    found = {}
    for size in (NUM, 40, 8):  # whole batches of 8, so that the networks see the same
        monkeypatch.setattr(measure, "CHUNK", size)
        found[size] = world.metrics(
            streamed(world), "dmd2/student", tmp_path / "m.json", runtime, weights=world.student
        )
    assert_close(found[NUM], found[40], rel=1e-7)
    assert_close(found[NUM], found[8], rel=1e-7)


def test_batches_of_any_size_measure_the_same(world: World, whole: dict, tmp_path: Path):
    runtime = RUNTIME.model_copy(update={"sample_batch_size": 7})
    found = world.metrics(streamed(world), "teacher/ode", tmp_path / "m.json", runtime, weights=world.teacher)
    assert_close(whole, found, rel=1e-3)  # a last digit can tip a pixel over to the next of 17 grey levels


def command(world: World, plan: Plan, entry: str, folder: Path, gpus: int = 1) -> tuple[list[str], dict[str, str]]:
    """The stage as the workflow starts it, and the environment for it."""
    options: dict[str, Any] = {
        "spec": plan.metrics(entry).to_json(),
        "weights": world.teacher,
        "reference": world.reference,
        "extractor": world.extractor,
        "state": folder / "state",
        "out": folder / "m.json",
        "runtime": RUNTIME.model_dump_json(),
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "DMD2_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    launcher = [str(WORKFLOW / "launch.sh"), str(gpus), "--threads", "1", "metrics"]
    return [*launcher, *arguments], {**clean, "PATH": path}


def test_two_processes_measure_what_one_does(world: World, whole: dict, tmp_path: Path):
    arguments, env = command(world, streamed(world), "teacher/ode", tmp_path, gpus=2)
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "m.json").read_text())
    assert blocks_of(found) == blocks_of(whole), "each block is one process's share, made in the same batches"
    assert list((tmp_path / "state").iterdir()) == []


def test_evaluation_killed_without_warning_loses_no_finished_part(
    world: World, whole: dict, tmp_path: Path, small_chunks, made: list[range], caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    process = start(measure_and_die, world, streamed(world), tmp_path / "m.json", measure.CHUNK, 2)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "m.json").exists()
    resumed = world.metrics(streamed(world), "teacher/ode", tmp_path / "m.json", weights=world.teacher)
    assert "resuming with 2 finished files of an interrupted job" in caplog.text
    assert min(i for ids in made for i in ids) == 2 * measure.CHUNK
    assert_close(resumed, whole, rel=1e-3)


def test_killed_evaluation_goes_on_where_it_was(
    world: World, whole: dict, tmp_path: Path, small_chunks, made: list[range], monkeypatch: pytest.MonkeyPatch
):
    save, saved = Tally.save, []

    def dying(tally: Tally, path: Path) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(tally, path)

    monkeypatch.setattr(Tally, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        world.metrics(streamed(world), "teacher/ode", tmp_path / "m.json", weights=world.teacher)
    assert not (tmp_path / "m.json").exists()
    monkeypatch.setattr(Tally, "save", save)
    made.clear()
    resumed = world.metrics(streamed(world), "teacher/ode", tmp_path / "m.json", weights=world.teacher)
    assert sorted(i for ids in made for i in ids) == list(range(NUM, NUM * BLOCKS)), "the first block was finished"
    made.clear()
    straight = world.metrics(streamed(world), "teacher/ode", tmp_path / "m.json", weights=world.teacher)
    assert sorted(i for ids in made for i in ids) == list(range(NUM * BLOCKS)), "a finished job leaves nothing"
    assert resumed == straight
    assert_close(resumed, whole, rel=1e-3)


def test_damaged_part_is_made_again(
    world: World, tmp_path: Path, small_chunks, made: list[range], monkeypatch: pytest.MonkeyPatch
):
    save, saved = Tally.save, []

    def damaging(tally: Tally, path: Path) -> None:
        save(tally, path)
        saved.append(path)
        if len(saved) == 2:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        if len(saved) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Tally, "save", damaging)
    with pytest.raises(KeyboardInterrupt):
        world.metrics(streamed(world), "dmd2/student", tmp_path / "m.json", weights=world.student)
    monkeypatch.setattr(Tally, "save", save)
    made.clear()
    resumed = world.metrics(streamed(world), "dmd2/student", tmp_path / "m.json", weights=world.student)
    assert sorted(i for ids in made for i in ids) == [*range(40, 80), *range(NUM + 40, NUM * BLOCKS)]
    assert resumed == world.metrics(streamed(world), "dmd2/student", tmp_path / "m.json", weights=world.student)


def test_parts_of_other_weights_are_not_used(
    world: World, tmp_path: Path, made: list[range], monkeypatch: pytest.MonkeyPatch
):
    save = Tally.save
    monkeypatch.setattr(Tally, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        world.metrics(streamed(world), "teacher/ode", tmp_path / "m.json", weights=world.teacher)
    monkeypatch.setattr(Tally, "save", save)
    other = world.model("other", world.plan().teacher, seed=7)
    made.clear()
    found = world.metrics(streamed(world), "teacher/ode", tmp_path / "m.json", weights=other)
    assert len({i for ids in made for i in ids}) == NUM * BLOCKS
    assert found["metrics"]["fid"]["mean"] > 0


def test_only_the_samples_of_the_sheet_are_stored(world: World, tmp_path: Path):
    sample(streamed(world).sample("teacher/ode"), world.teacher, tmp_path / "few/manifest.json", RUNTIME)
    sample(
        world.plan(evaluation={"protocols": BOTH}).sample("teacher/ode"),
        world.teacher,
        tmp_path / "all/manifest.json",
        RUNTIME,
    )
    few, everything = ShardReader(tmp_path / "few/manifest.json"), ShardReader(tmp_path / "all/manifest.json")
    assert (len(few), len(everything)) == (20, NUM * BLOCKS)
    for name, values in few.read(range(20)).items():
        np.testing.assert_array_equal(values, everything.read(range(20))[name])
    images = everything.read(range(NUM))
    assert set(images) == {"image", "image_dmd2", "cls"}
    darker = images["image_dmd2"].astype(int) - images["image"]
    assert darker.max() == 0, "truncation never goes up"
    assert darker.min() < 0


def test_stored_samples_are_never_all_in_memory(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = world.plan()
    sample(plan.sample("dmd2/student"), world.student, tmp_path / "samples/manifest.json", RUNTIME)
    in_parts = batches
    monkeypatch.setattr("dmd2.metrics.blocks.batches", lambda num, _: in_parts(num, 32))
    sizes, read = [], ShardReader.read

    def recording(self: ShardReader, ids: Any, names: Any = None) -> Any:
        sizes.append(len(ids))
        return read(self, ids, names)

    monkeypatch.setattr(ShardReader, "read", recording)
    world.metrics(plan, "dmd2/student", tmp_path / "m.json", samples=tmp_path / "samples/manifest.json")
    assert sizes == [32] * (NUM * BLOCKS // 32)


def test_network_computes_in_the_samplers_precision(world: World, tmp_path: Path):
    images = {}
    for precision in ("fp32", "bf16"):
        plan = world.plan(samplers={"student": {"kind": "few_step", "precision": precision}})
        manifest = tmp_path / precision / "manifest.json"
        sample(plan.sample("dmd2/student"), world.student, manifest, RUNTIME)
        images[precision] = ShardReader(manifest).read(range(NUM))["image"].astype(int)
    difference = np.abs(images["fp32"] - images["bf16"])
    assert difference.max() > 0, "bf16 rounded nothing"
    assert difference.mean() < 8, "a grey level of these images is 16"
