"""GPU-hours of the workflow's jobs: counted operations over an assumed rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from dmd2 import config
from dmd2.config import Precision
from dmd2.cost.flops import StepCost, features_cost, pass_cost, step_cost
from dmd2.lineage.jobs import Job
from dmd2.lineage.plan import Plan
from dmd2.lineage.spec import Spec

NUM_IMAGES = {"digits": 1_797, "cifar10": 50_000, "digit_pairs": 6_000, "coco": 40_504, "coco10k": 10_000}
"""Images of a source before its shards are there to be counted."""
IMAGENET, LAION = 1_281_167, 500_000
"""What any other source is taken for: with classes, with captions (the paper's real images for the GAN)."""

Work = Mapping[Precision, float]
"""FLOPs by the precision of the network."""


@dataclass(frozen=True)
class Rates:
    """TFLOP/s that a GPU sustains."""

    bf16: float
    fp32: float

    def hours(self, work: Work) -> float:
        """GPU-hours of `work`."""
        return sum(flops / (getattr(self, precision) * 1e12) for precision, flops in work.items()) / 3600


@dataclass
class Costs:
    """The counts that the jobs of a preset need, each made when it is first used."""

    preset: config.Preset

    @cached_property
    def forward(self) -> float:
        """F of the teacher's architecture."""
        return pass_cost(self.preset.teacher, self.preset.data).forward

    @cached_property
    def features(self) -> float:
        """FLOPs of one image's features."""
        return features_cost(self.preset.features, self.preset.data)

    def step(self, train: config.Train) -> StepCost:
        """FLOPs of an image and iteration of a run."""
        return step_cost(self.preset.teacher, self.preset.data, train)


def num_images(plan: Plan, *, reference: bool = False) -> int:
    """Images of the data set, or of the set that samples are compared with."""
    data = (plan.preset.reference_data if reference else None) or plan.preset.data
    return NUM_IMAGES.get(data.source, IMAGENET if data.captions is None else LAION)


def passes(sampler: config.Sampler, train: config.Train | None) -> int:
    """Network passes a sample: one per step of a student, 2n - 1 for n Heun steps; guidance doubles them."""
    if sampler.num_steps is None:
        return train.num_steps if train else 1
    steps = 2 * sampler.num_steps - 1 if sampler.kind == "heun" else sampler.num_steps
    return steps * (1 if (sampler.guidance_scale or 1) == 1 else 2)


def work(job: Job, plan: Plan, costs: Costs) -> Work:
    """The FLOPs of a job; empty for one that is a matter of disks and CPUs."""
    spec = job.spec
    count = _WORK.get(spec.stage)
    return count(spec, plan, costs) if count else {}


def _train(spec: Spec, plan: Plan, costs: Costs) -> Work:
    train = spec.need("train")
    return {train.precision: costs.step(train).total * train.iterations * train.batch_size}


def _teacher(spec: Spec, plan: Plan, costs: Costs) -> Work:
    training = spec.need("teacher").training
    return {"fp32": 3 * costs.forward * training.iterations * training.batch_size} if training else {}


def _pairs(spec: Spec, plan: Plan, costs: Costs) -> Work:
    sampler = spec.need("sampler")
    return {sampler.precision: passes(sampler, None) * costs.forward * spec.need("pairs").num_pairs}


def _sampling(entry: str, num: int, plan: Plan, costs: Costs) -> Work:
    model, name = plan.split(entry)
    sampler = plan.preset.samplers[name]
    train = None if model == "teacher" else plan.run(model).train
    return {sampler.precision: passes(sampler, train) * costs.forward * num}


def _sample(spec: Spec, plan: Plan, costs: Costs) -> Work:
    evaluation = plan.preset.evaluation
    num = evaluation.num_shown if evaluation.streamed else evaluation.num_samples * evaluation.num_blocks
    return _sampling(spec.name, num, plan, costs)


def _metrics(spec: Spec, plan: Plan, costs: Costs) -> Work:
    evaluation = plan.preset.evaluation
    if spec.name == "floor":  # resamples features that are there
        return {}
    num = evaluation.num_samples * evaluation.num_blocks
    sampling = dict(_sampling(spec.name, num, plan, costs)) if evaluation.streamed else {}
    sampling["fp32"] = sampling.get("fp32", 0.0) + costs.features * num
    return sampling


def _latency(spec: Spec, plan: Plan, costs: Costs) -> Work:
    settings = spec.need("evaluation").latency
    ((sampler, flops),) = _sampling(spec.name, settings.warm_up + settings.repeats, plan, costs).items()
    return {settings.precision or sampler: flops}


def _curve(spec: Spec, plan: Plan, costs: Costs) -> Work:
    train = spec.need("train")
    num = train.num_snapshots * plan.preset.evaluation.curve_samples
    return {"fp32": (train.num_steps * costs.forward + costs.features) * num}


def _reference(spec: Spec, plan: Plan, costs: Costs) -> Work:
    return {"fp32": costs.features * num_images(plan, reference=True)}


def _features(spec: Spec, plan: Plan, costs: Costs) -> Work:
    features = spec.need("features")
    return {} if features.weights else {"fp32": 3 * costs.features * features.epochs * num_images(plan, reference=True)}


_WORK = {
    "train": _train,
    "teacher": _teacher,
    "pairs": _pairs,
    "sample": _sample,
    "metrics": _metrics,
    "latency": _latency,
    "curve": _curve,
    "reference": _reference,
    "features": _features,
}
