"""Hours of planned jobs from finished ones: their own time, or a rate measured on the same network and device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dmd2.config import Train
from dmd2.cost.finished import CPU, TRAININGS, Finished
from dmd2.cost.gpu_hours import Costs, Rates
from dmd2.cost.gpus import gpu
from dmd2.lineage.jobs import Job
from dmd2.lineage.plan import Plan

MEASURED, BY_STAGE, BY_NETWORK, ASSUMED = "measured", "by the stage's rate", "by the network's rate", "assumed"
"""Where a job's hours come from: the same job is finished; operations over the rate of finished jobs of its stage, or
of finished trainings, on this network and device; operations over an assumed rate."""


class Hours(NamedTuple):
    """Device-hours of a job and their origin."""

    hours: float
    origin: str


class History:
    """What finished jobs say about a preset's jobs on one kind of device.

    On a preset without GPUs that has finished jobs the device is the CPU, else the GPU called `gpu_key`.
    """

    def __init__(
        self, plan: Plan, flops: Mapping[str, float], jobs: Iterable[Job], done: Sequence[Finished], gpu_key: str
    ):
        digests = {job.spec.digest: job for job in jobs}
        on_cpu = [each for each in done if not each.gpus and not plan.preset.gpus]
        self.on_cpu = any(each.digest in digests or _same_network(plan, each.spec) for each in on_cpu)
        device = CPU if self.on_cpu else gpu(gpu_key).name
        self.unit = "CPU-hours" if self.on_cpu else "GPU-hours"
        self._own: dict[str, float] = {}
        self._sums: dict[str, list[float]] = {}  # stage -> [hours, FLOPs, jobs]
        costs = Costs(plan.preset)
        for each in done:
            if each.device != device:
                continue
            job = digests.get(each.digest or "")
            if job is not None:
                self._own[job.key] = each.device_hours
                self._count(job.spec.stage, each.device_hours, flops[job.key])
            elif each.rule == "train" and each.spec and _same_network(plan, each.spec):
                train = Train.model_validate(each.spec["train"])
                done_flops = costs.step(train).total * train.iterations * train.batch_size
                self._count("train", each.device_hours, done_flops)

    def _count(self, stage: str, hours: float, flops: float) -> None:
        sums = self._sums.setdefault(stage, [0.0, 0.0, 0])
        for i, more in enumerate((hours, flops, 1)):
            sums[i] += more

    def hours(self, job: Job, flops: Mapping[Any, float], rates: Rates) -> Hours:
        """Hours of a job whose operations are `flops` by precision."""
        total = sum(flops.values())
        if job.key in self._own:
            return Hours(self._own[job.key], MEASURED)
        hours, counted, num = self._sums.get(job.spec.stage, (0.0, 0.0, 0))
        if num:
            return Hours(hours * total / counted if counted else hours / num, BY_STAGE)
        hours, counted = (sum(sums[i] for stage, sums in self._sums.items() if stage in TRAININGS) for i in (0, 1))
        if counted:
            return Hours(hours * total / counted, BY_NETWORK)
        return Hours(rates.hours(flops), ASSUMED)


def _same_network(plan: Plan, spec: Mapping[str, Any] | None) -> bool:
    """Whether a finished training was of the preset's network and image size."""
    if not spec or not spec.get("train"):
        return False
    own = plan.preset
    made = {
        key: (spec.get(section) or {}).get(key) for section, key in (("teacher", "network"), ("data", "resolution"))
    }
    return made == {
        "network": own.teacher.model_dump(mode="json").get("network"),
        "resolution": own.data.resolution,
    }


def origins(found: Iterable[Hours]) -> dict[str, int]:
    """How many jobs with any hours have each origin."""
    counts = Counter(each.origin for each in found if each.hours)
    return {name: counts[name] for name in (MEASURED, BY_STAGE, BY_NETWORK, ASSUMED) if counts[name]}
