"""Hours of planned jobs by finished ones: the same job, the stage's rate, the network's rate, and none."""

from pathlib import Path
from typing import Any

import pytest

from dmd2.cost.finished import Finished
from dmd2.cost.gpu_hours import Rates
from dmd2.cost.gpus import gpu
from dmd2.cost.measured import ASSUMED, BY_NETWORK, BY_STAGE, MEASURED, History, origins
from dmd2.lineage.jobs import Job, Jobs
from dmd2.lineage.plan import Plan
from dmd2.lineage.spec import Spec

ROOT = Path(__file__).parents[2]
A100 = gpu("a100-80gb").name
RATES = Rates(1.0, 1.0)  # TFLOP/s
FLOPS = 3600e12  # an hour at that rate


def planned(preset: str, **over: Any) -> tuple[Plan, dict[str, Job]]:
    plan = Plan(ROOT / "workflow", preset, over)
    jobs = Jobs(plan)
    keys = [jobs.metrics(entry).key for entry in ("dmd2/student", "noreg/student")]
    return plan, {job.key: job for job in jobs.closure(keys)}


def finished(job: Job, hours: float, gpus: int, device: str, digest: str | None = None) -> Finished:
    spec = Spec.model_dump(job.spec, mode="json", exclude_none=True)
    times = {"start": 0.0, "seconds": hours * 3600 / max(gpus, 1), "last_s": 1.0, "threads": 1, "energy_j": None}
    place = {"preset": "p", "rule": job.spec.stage, "name": job.spec.name, "device": device, "gpus": gpus}
    return Finished(**place, **times, digest=digest or job.spec.digest, spec=spec)


@pytest.mark.parametrize(
    ("device", "gpus", "known"), [(A100, 8, True), ("cpu", 0, True), (gpu("h100-80gb").name, 8, False)]
)
def test_finished_jobs_replace_the_assumed_rate_on_their_device(device: str, gpus: int, known: bool):
    plan, jobs = planned("smoke", gpus=gpus)
    flops = dict.fromkeys(jobs, FLOPS) | {"train noreg": 2 * FLOPS, "shards": 0.0}
    history = History(plan, flops, jobs.values(), [finished(jobs["train dmd2"], 0.25, gpus, device)], "a100-80gb")
    found = {key: history.hours(job, {"bf16": flops[key]}, RATES) for key, job in jobs.items()}
    assert history.unit == ("GPU-hours" if gpus else "CPU-hours")
    if not known:  # another GPU says nothing about this one
        assert {each.origin for each in found.values()} == {ASSUMED}
        assert found["train noreg"].hours == pytest.approx(2)
        return
    assert found["train dmd2"] == (pytest.approx(0.25), MEASURED)
    assert found["train noreg"] == (pytest.approx(0.5), BY_STAGE)
    assert found["sample dmd2/student"] == (pytest.approx(0.25), BY_NETWORK)
    assert found["shards"].hours == 0
    assert origins(found.values())[MEASURED] == 1
    assert ASSUMED not in origins(found.values())


def test_training_of_another_length_on_the_same_network_gives_the_stages_rate(monkeypatch: pytest.MonkeyPatch):
    class Step:
        total = FLOPS / 32 / 20  # smoke's batch and iterations

    monkeypatch.setattr("dmd2.cost.measured.Costs.step", lambda costs, train: Step)
    plan, jobs = planned("smoke", gpus=8)
    flops = dict.fromkeys(jobs, FLOPS)
    before = finished(jobs["train dmd2"], 0.5, 8, A100, digest="of another configuration")
    history = History(plan, flops, jobs.values(), [before], "a100-80gb")
    assert history.hours(jobs["train noreg"], {"bf16": FLOPS}, RATES) == (pytest.approx(0.5), BY_STAGE)

    other, others = planned("smoke", gpus=8, teacher={"network": {"model_channels": 32}})
    history = History(other, flops, others.values(), [before], "a100-80gb")
    assert history.hours(others["train noreg"], {"bf16": FLOPS}, RATES).origin == ASSUMED
