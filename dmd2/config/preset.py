"""The keys of presets and run files, and checks across their sections."""

from __future__ import annotations

import re
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from dmd2.config.base import Model, StudentWeights
from dmd2.config.data import Data, Prompts
from dmd2.config.evaluation import Evaluation, Features, Pairs, Sampler
from dmd2.config.protocols import CAPTIONS_ONLY, CLASSES_ONLY, PROTOCOLS
from dmd2.config.teacher import AnyTeacher, DiffusersTeacherConfig, OwnNetwork
from dmd2.config.train import Runtime, Train

STOCHASTIC = ("DDPMScheduler", "LCMScheduler", "EulerAncestralDiscreteScheduler")
"""Schedulers of diffusers that draw noise between steps."""


class Preset(Model):
    """Data, teacher and scale, with the training defaults of every run on them."""

    name: str
    description: str
    data: Data
    reference_data: Data | None = Field(None, description="real images to compare samples with; none: those of `data`")
    teacher: AnyTeacher
    features: Features
    pairs: Pairs = Pairs()
    samplers: dict[str, Sampler]
    evaluation: Evaluation = Evaluation()
    prompts: Prompts | None = Field(None, description="prompts that generators are trained on; none: random classes")
    train: Train
    runs: dict[str, dict[str, Any]] = Field({}, description="adjustments of runs by name, over the run's own keys")
    runtime: Runtime = Runtime()
    tables: tuple[str, ...] | None = Field(
        None, description="text-to-image: the tables that it fills; none: those of class-conditional data"
    )
    gpus: int = Field(0, ge=0, description="devices that a job requests on a machine")
    nodes: int = Field(1, gt=0, description="machines that a training runs on, each with `gpus` devices (Slurm)")

    @field_validator("samplers")
    @classmethod
    def _names_are_plain(cls, samplers: dict[str, Sampler]) -> dict[str, Sampler]:
        for name in samplers:
            if not re.fullmatch("[A-Za-z0-9_-]+", name):  # it becomes a folder of results
                raise ValueError(f"{name!r}: a name may only have letters, digits, - and _; rename it")
        return samplers

    @model_validator(mode="after")
    def _machines_have_gpus(self) -> Self:
        if self.nodes > 1 and not self.gpus:
            raise ValueError(f"nodes: {self.nodes} machines train with GPUs only; set gpus to those of a machine")
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.pairs.sampler not in self.samplers:
            raise ValueError(f"pairs.sampler: no sampler {self.pairs.sampler!r}; known: {', '.join(self.samplers)}")
        sampler = self.samplers[self.pairs.sampler]
        if not sampler.of_teacher or sampler.s_churn > 0 or sampler.scheduler in STOCHASTIC:
            raise ValueError(
                f"pairs.sampler: {self.pairs.sampler!r} is not deterministic; name a heun sampler with s_churn 0, or "
                f"one with a deterministic scheduler"
            )
        for name, of in self.samplers.items():
            if of.kind == "heun" and self.teacher.kind == "diffusers":
                raise ValueError(f"samplers.{name}: heun samples EDM's teachers; use kind diffusers with a scheduler")
            if of.kind == "diffusers" and self.teacher.kind != "diffusers":
                raise ValueError(f"samplers.{name}: kind diffusers samples teachers of that kind; use heun")
        if (self.data.captions is None) != (self.evaluation.prompts is None):
            raise ValueError("`data.captions` and `evaluation.prompts` belong together: set both, or none of them")
        if (self.data.captions is None) != (self.prompts is None):
            raise ValueError("`data.captions` and `prompts` belong together: set both, or none of them")
        wrong = CLASSES_ONLY if self.data.captions else CAPTIONS_ONLY
        if unsuitable := [name for name in self.evaluation.measures or () if name in wrong]:
            labels = "captions" if self.data.captions else "classes"
            raise ValueError(f"evaluation.measures: {unsuitable[0]} is not for data with {labels}; leave it out")
        side = PROTOCOLS[self.evaluation.protocols[0]].side
        real = self.reference_data or self.data
        if side not in (None, real.resolution):
            raise ValueError(
                f"evaluation.protocols: {self.evaluation.protocols[0]} compares images of {side} pixels, but the real "
                f"ones have {real.resolution}; set reference_data.resolution"
            )
        if "lpips_diversity" in (self.evaluation.measures or ()) and self.evaluation.vgg_weights is None:
            raise ValueError("evaluation.measures: lpips_diversity needs evaluation.vgg_weights, torchvision's VGG-16")
        self.check(self.train)
        if self.teacher.training is not None:
            self._check_share("teacher.training.batch_size", self.teacher.training.batch_size)
        return self

    @model_validator(mode="after")
    def _own_network_is_a_runs(self) -> Self:
        if isinstance(self.teacher, DiffusersTeacherConfig) and self.teacher.own is not None:
            raise ValueError("teacher.own: it belongs to a run with `weights`; move it there")
        return self

    def check(self, train: Train) -> None:
        """Raises ValueError if a run exceeds the teacher's noise levels, or the GPUs do not divide its batch."""
        last = self.teacher.num_levels - 1
        for name in ("matching_levels", "critic_levels", "gan_levels"):
            if (high := getattr(train, name)[1]) > last:
                raise ValueError(f"{name}: {high} is beyond the teacher's last level {last}")
        if train.student_levels and train.student_levels[0] > last:
            raise ValueError(f"student_levels: {train.student_levels[0]} is beyond the teacher's last level {last}")
        if train.num_steps > self.teacher.num_levels:
            raise ValueError(f"num_steps {train.num_steps} exceeds the teacher's {self.teacher.num_levels} levels")
        self._check_share("batch_size", train.batch_size)

    def _check_share(self, key: str, batch_size: int) -> None:
        num = self.gpus * self.nodes
        if num > 1 and batch_size % num:
            raise ValueError(f"{key} {batch_size} is not divisible by {num} gpus; use {-(-batch_size // num) * num}")


class RunFile(Model):
    """The content of `workflow/runs/NAME.yaml` after `extends` is resolved."""

    description: str
    train: dict[str, Any] = Field({}, description="over the preset's `train`")
    weights: StudentWeights | None = Field(None, description="a released student to import instead of training one")
    own: OwnNetwork | None = Field(
        None,
        description="of weights that are no student of DMD2: their differences from the teacher; {} if there are none",
    )

    @model_validator(mode="after")
    def _own_network_is_imported(self) -> Self:
        if self.own is not None and self.weights is None:
            raise ValueError("`own` belongs to a run with `weights`: students trained here have the teacher's network")
        if self.own is not None and self.own.network and self.weights and self.weights.lora_rank:
            raise ValueError("`own.network` does not go with `weights.lora_rank`: adapters have the teacher's network")
        return self


class Run(Model):
    """A run merged with a preset."""

    name: str
    description: str
    train: Train
    weights: StudentWeights | None = None
    own: OwnNetwork | None = None
