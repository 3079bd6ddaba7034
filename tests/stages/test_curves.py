"""The curve of a run's snapshots, resumed snapshot by snapshot, and the choice of the best by it."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from world import RUNTIME, World

from dmd2.datasets import ShardReader
from dmd2.errors import UserError
from dmd2.lineage.plan import CURVE_SEED_OFFSET, Plan
from dmd2.lineage.records import read_record, write_record
from dmd2.metrics import Meter
from dmd2.stages import curves
from dmd2.stages.sample import sample, sample_x0

COLUMNS = ["step", "generator_updates", "fid", "pixel_fd", "nearest_distance", "diversity", "accuracy"]


def make(world: World, out: Path, plan: Plan | None = None) -> None:
    spec = (plan or world.plan()).curve("dmd2")
    curves.curve(spec, world.snapshots, world.reference, world.extractor, out.parent / "state", out, RUNTIME)


def draw(world: World, out: Path, plan: Plan | None = None) -> list[dict[str, str]]:
    make(world, out, plan)
    return read(out)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each snapshot that was measured."""
    calls: list[int] = []
    measures = Meter.measures

    def recording(self: Meter, tally: Any) -> Any:
        calls.append(tally.count)
        return measures(self, tally)

    monkeypatch.setattr(Meter, "measures", recording)
    return calls


@pytest.fixture(scope="module")
def curve(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("curve") / "curve.csv"
    draw(world, path)
    return path


def test_every_snapshot_is_measured_with_the_requested_samples(world: World, curve: Path, measured: list[int]):
    rows = read(curve)
    assert list(rows[0]) == COLUMNS
    assert [row["step"] for row in rows] == ["5", "10", "15", "20"]
    assert [row["generator_updates"] for row in rows] == ["1", "2", "3", "4"]
    assert len({row["fid"] for row in rows}) == 4
    assert (read_record(curve)["num_samples"], read_record(curve)["seed"]) == (60, 0)


def test_further_protocols_leave_the_curve_as_it_is(world: World, curve: Path, tmp_path: Path):
    assert draw(world, tmp_path / "curve.csv", world.plan(evaluation={"protocols": ["edm", "dmd2"]})) == read(curve)


def test_killed_curve_goes_on_with_the_next_snapshot(
    world: World, curve: Path, tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
):
    written, write_json = [], curves.write_json

    def dying(path: Path, row: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write_json(path, row)

    monkeypatch.setattr(curves, "write_json", dying)
    with pytest.raises(KeyboardInterrupt):
        draw(world, tmp_path / "curve.csv")
    monkeypatch.setattr(curves, "write_json", write_json)
    measured.clear()
    assert draw(world, tmp_path / "curve.csv") == read(curve)
    assert len(measured) == 1
    assert list((tmp_path / "state").iterdir()) == []


def test_two_processes_share_the_snapshots(
    world: World, curve: Path, tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, done in ((1, 2), (0, 4)):  # the first waits for the second, which therefore goes first here
        monkeypatch.setenv("RANK", str(rank))
        if rank == 1:
            spec, state = world.plan().curve("dmd2"), tmp_path / "state"
            curves.curve(
                spec, world.snapshots, world.reference, world.extractor, state, tmp_path / "curve.csv", RUNTIME
            )
            assert not (tmp_path / "curve.csv").exists()
        else:
            draw(world, tmp_path / "curve.csv")
        assert len(measured) == done
    assert read(tmp_path / "curve.csv") == read(curve)


def chosen(world: World, curve: Path, out: Path) -> dict[str, Any]:
    curves.select(world.plan().select("dmd2/best"), curve, world.snapshots, world.student, out)
    return read_record(out)


def altered(world: World, curve: Path, out: Path, fids: list[float]) -> Path:
    """The curve with other distances."""
    rows = [{**row, "fid": fid} for row, fid in zip(read(curve), fids, strict=True)]
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    write_record(out, world.plan().curve("dmd2"), num_samples=60, seed=0)
    return out


@pytest.mark.parametrize(
    ("fids", "best"), [([3.0, 1.5, 2.0, 2.5], 10), ([2.0, 2.0, 2.0, 2.0], 5), ([4, 3, 2, 1.0], 20)]
)
def test_best_is_the_snapshot_of_the_lowest_distance_and_the_earliest_of_equals(
    world: World, curve: Path, tmp_path: Path, fids: list[float], best: int
):
    found = chosen(world, altered(world, curve, tmp_path / "curve.csv", fids), tmp_path / "best.safetensors")
    snapshot = world.folder / f"snapshot-{best}.safetensors"
    assert (tmp_path / "best.safetensors").read_bytes() == snapshot.read_bytes()
    assert (found["checkpoint_step"], found["selection"], found["curve_fid"]) == (best, "best", min(fids))
    assert found["chosen"] == "by the FID of 60 samples, seed 0, over 4 snapshots"
    assert found["run"] == "dmd2"


def test_curve_of_other_snapshots_chooses_nothing(world: World, curve: Path, tmp_path: Path):
    path = tmp_path / "curve.csv"
    path.write_text("".join(curve.read_text().splitlines(keepends=True)[:-1]))
    write_record(path, world.plan().curve("dmd2"), num_samples=60, seed=0)
    with pytest.raises(UserError, match=r"curve\.csv: has other steps than"):
        chosen(world, path, tmp_path / "best.safetensors")
    assert not (tmp_path / "best.safetensors").exists()


def test_best_and_last_are_separate_entries_and_say_so(world: World, curve: Path, tmp_path: Path):
    plan = world.plan()
    chosen(world, altered(world, curve, tmp_path / "curve.csv", [3, 1, 2, 2]), tmp_path / "best.safetensors")
    facts = {}
    for entry, weights in (("dmd2/best", tmp_path / "best.safetensors"), ("dmd2/student", world.student)):
        manifest = tmp_path / entry / "manifest.json"
        sample(plan.sample(entry), weights, manifest, RUNTIME)
        facts[entry] = ShardReader(manifest).manifest["facts"]["model"]
    assert (facts["dmd2/best"]["selection"], facts["dmd2/best"]["checkpoint_step"]) == ("best", 10)
    assert (facts["dmd2/student"]["selection"], facts["dmd2/student"]["checkpoint_step"]) == ("last", 20)
    with pytest.raises(UserError, match="made with configuration"):
        sample(plan.sample("dmd2/best"), world.student, tmp_path / "mixed/manifest.json", RUNTIME)


def test_snapshot_of_an_iteration_needs_no_curve_and_keeps_what_the_run_says_of_itself(world: World, tmp_path: Path):
    plan, out = (
        world.plan(samplers={"early": {"kind": "few_step", "checkpoint": 10}}),
        tmp_path / "snapshot.safetensors",
    )
    spec = plan.select("dmd2/early")
    assert set(spec.upstream) == {"model"}
    curves.select(spec, None, world.snapshots, world.student, out)
    assert out.read_bytes() == (world.folder / "snapshot-10.safetensors").read_bytes()
    found = read_record(out)
    assert (found["run"], found["checkpoint_step"], found["selection"]) == ("dmd2", 10, "snapshot")
    assert (found["iterations"], "train_cpu_s" in found) == (10, False), "seconds of the whole run are not its own"
    assert plan.sample("dmd2/early").need("evaluation").seed == 0, "nothing was chosen by these samples"


def test_iteration_without_a_snapshot_stops_the_planning(world: World):
    plan = world.plan(samplers={"early": {"kind": "few_step", "checkpoint": 7}})
    with pytest.raises(
        UserError, match=r"samplers\.early\.checkpoint is 7, but dmd2 has snapshots after 5, 10, 15, 20 it"
    ):
        plan.metrics("dmd2/early")


def test_noise_that_chose_the_best_does_not_measure_it(world: World, monkeypatch: pytest.MonkeyPatch):
    plan = world.plan()
    seeds = {name: spec.need("evaluation").seed for name, spec in
             {"curve": plan.curve("dmd2"), "last": plan.sample("dmd2/student"), "best": plan.sample("dmd2/best"),
              "metrics": plan.metrics("dmd2/best")}.items()}  # fmt: skip
    assert seeds == {"curve": 0, "last": 0, "best": CURVE_SEED_OFFSET, "metrics": CURVE_SEED_OFFSET}
    spec = plan.sample("dmd2/student")
    model = curves.open_model(spec, world.student, curves.STUDENT, torch.device("cpu"))
    a, b = (sample_x0(spec, model, range(50), curves.STUDENT, seed) for seed in (0, CURVE_SEED_OFFSET))
    assert not any(bool((x == y).all()) for x in a for y in b)


def test_imported_run_has_no_best(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    workflow = tmp_path / "workflow"
    for part in ("presets", "runs"):
        (workflow / part).mkdir(parents=True)
        for file in (Path(curves.__file__).parents[2] / "workflow" / part).glob("*.yaml"):
            os.symlink(file, workflow / part / file.name)
    released = {"description": "One that was released", "weights": {"path": "student.bin"}}
    (workflow / "runs/released.yaml").write_text(json.dumps(released))
    plan = Plan(workflow, "smoke", {"samplers": {"best": {"kind": "few_step", "checkpoint": "best"}}})
    assert plan.split("released/student") == ("released", "student")
    for entry in ("released/best", "released/ablation"):
        with pytest.raises(UserError, match=f"entry {entry}: released is imported, with no snapshots to choose from"):
            plan.split(entry)
