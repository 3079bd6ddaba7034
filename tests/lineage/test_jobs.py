"""The jobs that a plan finds are the workflow's, and what rows share is counted once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dmd2.config import Evaluation, Sampler
from dmd2.cost.disk import NetworkBytes, disk, supplies
from dmd2.cost.flops import StepCost
from dmd2.cost.gpu_hours import Costs, Rates, work
from dmd2.lineage.jobs import Jobs, chain, key_of, rules
from dmd2.lineage.plan import Plan
from dmd2.report.tables import load_table, measured_entries

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / "workflow"


def jobs_of(plan: Plan, *tables: str) -> tuple[Jobs, list[str]]:
    jobs = Jobs(plan)
    files = [load_table(WORKFLOW / "tables" / f"{table}.yaml") for table in tables]
    return jobs, [jobs.metrics(entry).key for table in files for entry in measured_entries(table, plan.preset.name)]


@pytest.mark.parametrize("preset", ["smoke", "imagenet64"])
def test_there_are_as_many_jobs_of_each_rule_as_snakemake_plans(preset: str, tmp_path: Path):
    tables = ("table1", "table3")
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(ROOT / "Snakefile"),
        "--dry-run",
        "--quiet",
        "rules",
    ]
    command += ["--config", f"preset={preset}", "--cores", "1", "--", *(f"results/{table}.csv" for table in tables)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    planned = {rule: int(num) for rule, num in re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE)}
    assert planned.pop("total") == sum(planned.values())
    plan = Plan(WORKFLOW, preset)
    jobs, keys = jobs_of(plan, *tables)
    every = jobs.closure(keys)
    downloads = sum(supply.by_rule for supply in supplies(plan, every))
    assert planned.pop("table") == len(tables)
    assert planned.pop("download", 0) == downloads
    assert rules(every) == planned


def test_a_job_comes_after_all_that_it_needs_and_once():
    jobs, keys = jobs_of(Plan(WORKFLOW, "imagenet64"), "table1", "table3")
    seen: set[str] = set()
    for job in jobs.closure(keys):
        assert set(job.needs) <= seen
        assert job.key not in seen
        seen.add(job.key)
        assert sorted(jobs[need].spec.digest for need in job.needs) == sorted(job.spec.upstream.values())


def test_runs_of_a_chain_are_in_the_order_of_their_training():
    plan = Plan(WORKFLOW, "imagenet64")
    assert chain(plan, "dmd2_long") == ["noreg_ttur", "dmd2_long"]
    assert chain(plan, "dmd2") == ["dmd2"]
    jobs, keys = jobs_of(plan, "table1")
    assert {"train noreg_ttur", "train dmd2_long"} <= {job.key for job in jobs.closure(keys)}


class Counted(Costs):
    """Costs that were counted elsewhere: F = 3, features 2, a step 7."""

    forward, features = 3.0, 2.0  # type: ignore[assignment]

    def step(self, train: object) -> StepCost:
        return StepCost({"critic": 7.0})


def flops(plan: Plan, key: str) -> dict[str, float]:
    jobs, keys = jobs_of(plan, "table1", "table3")
    found = {job.key: job for job in jobs.closure(keys)}
    return dict(work(found[key], plan, Counted(plan.preset)))


def test_work_of_a_job_is_passes_times_samples():
    streamed = Plan(WORKFLOW, "imagenet64")
    assert flops(streamed, "train dmd2") == {"bf16": 7 * 200_000 * 280}
    assert flops(streamed, "pairs") == {"bf16": 511 * 3 * 25_000}
    assert flops(streamed, "metrics teacher/ode") == {"bf16": 511 * 3 * 150_000, "fp32": 2 * 150_000}
    assert flops(streamed, "metrics dmd2/student") == {"fp32": (3 + 2) * 150_000}
    assert flops(streamed, "metrics floor") == flops(streamed, "latents") == flops(streamed, "teacher") == {}
    assert flops(streamed, "reference") == {"fp32": 2 * 1_281_167}
    stored = Plan(WORKFLOW, "digits")
    assert flops(stored, "sample teacher/ode") == {"fp32": 23 * 3 * 3 * 1797}
    assert flops(stored, "metrics teacher/ode") == {"fp32": 2 * 3 * 1797}
    assert flops(stored, "teacher") == {"fp32": 3 * 3 * 800 * 64}


def test_gpu_hours_are_work_over_rate():
    assert Rates(bf16=200, fp32=100).hours({"bf16": 3.6e17, "fp32": 3.6e17}) == pytest.approx(0.5 + 1)


def test_what_comes_from_outside_is_listed_with_whether_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    plan = Plan(WORKFLOW, "imagenet64")
    jobs, keys = jobs_of(plan, "table1", "table3")
    found = {supply.path: supply.there for supply in supplies(plan, jobs.closure(keys))}
    names = ["ILSVRC2012_img_train.tar", "edm-imagenet-64x64-cond-adm.pkl", "inception-2015-12-05.pt"]
    names += ["imagenet-64x64.npz", "vgg16-397923af.pth"]
    runs = {job.spec.name for job in jobs.closure(keys) if job.spec.stage == "import"}
    released = [weights.path for run in runs if (weights := plan.run(run).weights)]
    assert found == dict.fromkeys([*(f"data/downloads/{name}" for name in names), *released], False)
    teacher = plan.preset.teacher.weights
    assert teacher is not None
    Path(teacher.path).parent.mkdir(parents=True)
    Path(teacher.path).touch()
    there = [supply.path for supply in supplies(plan, jobs.closure(keys)) if supply.there]
    assert there == [teacher.path]
    jobs, keys = jobs_of(Plan(WORKFLOW, "digits"), "table1")
    assert supplies(Plan(WORKFLOW, "digits"), jobs.closure(keys)) == []


def test_what_no_job_can_fetch_comes_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    plan = Plan(WORKFLOW, "imagenet64", {"features": {"weights": {"path": "elsewhere/detector.pt"}}})
    jobs, keys = jobs_of(plan, "table3")
    found = {supply.path: supply for supply in supplies(plan, jobs.closure(keys))}
    images, teacher = found["data/downloads/ILSVRC2012_img_train.tar"], plan.preset.teacher.weights
    assert images.by_rule
    assert images.bytes == 147_897_477_120
    assert "put it at data/downloads/ILSVRC2012_img_train.tar" in str(images.advice)  # it takes an account
    assert teacher is not None
    assert (found[teacher.path].by_rule, found[teacher.path].advice) == (True, None)
    detector = found["elsewhere/detector.pt"]
    assert (detector.by_rule, detector.advice) == (False, "put it at elsewhere/detector.pt")


def test_room_on_disks_is_that_of_images_pairs_and_what_runs_store():
    over = {"evaluation": {"num_samples": 500, "num_blocks": 2}, "runtime": {"keep_checkpoints": 2}}
    plan = Plan(WORKFLOW, "digits", over)
    jobs, keys = jobs_of(plan, "table3")
    sizes = NetworkBytes(generator=100, critic=120, optimizers=400, average=100)
    found = disk(plan, jobs.closure(keys), 1000, sizes)
    assert found["data"]["shards"] == found["data"]["latents"] == 1000 * (64 + 2560)
    assert found["data"]["pairs"] == 2000 * (2 * 64 * 4 + 2560)
    assert found["results"] == {
        # The teacher's; of six runs the generator's and both networks'; the snapshot that stands in the table.
        "weights": 100 + 6 * (2 * 100 + 120) + 100,
        "snapshots": (5 * 6 + 9) * 100,
        "samples": 6 * 2 * 500 * (64 + 2560),
    }
    assert found["state"] == {"snapshots": (5 * 6 + 9) * 100, "checkpoints": 6 * 3 * (100 + 120 + 400 + 100)}


def test_best_snapshots_wait_for_their_curve():
    plan = Plan(WORKFLOW, "imagenet64", {"evaluation": Evaluation(streamed=False).model_dump()})
    assert plan.preset.samplers["best"] == Sampler(kind="few_step", checkpoint="best")
    jobs = Jobs(plan)
    keys = [job.key for job in jobs.closure([jobs.metrics("dmd2/best").key])]
    order = ["train dmd2", "curve dmd2", "select dmd2/best", "sample dmd2/best", "metrics dmd2/best"]
    assert [key for key in keys if key in order] == order
    assert key_of(plan.shards) == "shards"
