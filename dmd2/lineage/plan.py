"""The specs of a preset's jobs and their dependencies. Does not import torch (used by the workflow).

A *model* is `teacher` or the name of a run; an *entry* is `MODEL/SAMPLER`, one set of samples and its metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from dmd2.config import (
    AnyTeacher,
    Data,
    DiffusersTeacherConfig,
    DiffusersTraining,
    Evaluation,
    Features,
    Preset,
    Run,
    TeacherConfig,
    Train,
)
from dmd2.config.reading import checked_import, load_preset, load_run
from dmd2.errors import UserError
from dmd2.lineage.entries import check_sampler
from dmd2.lineage.spec import Spec

CURVE_SEED_OFFSET = 2**31
"""Offset between the seed of a run's curve and that of its best snapshot's samples."""


def _pathless(data: Data) -> Data:
    return data.model_copy(update={"path": None, "max_unreadable": 0})


class Plan:
    """The specs of all jobs on one preset, built on demand and chained by digest."""

    def __init__(self, folder: Path | str, preset: str, overrides: dict[str, Any] | None = None):
        self.folder = Path(folder)
        self.preset: Preset = load_preset(folder, preset, overrides)
        self._runs: dict[str, Run] = {}
        for name in self.preset.runs:  # raises for an override of an unknown run
            self._requested(name, f"preset {preset}: `runs.{name}`")

    def run(self, name: str) -> Run:
        """The run `name` on this preset. Raises UserError for an unknown name or contradictory keys."""
        if name not in self._runs:
            self._runs[name] = load_run(self.folder, name, self.preset)
            self._check_ancestors(name)
        return self._runs[name]

    def _requested(self, name: str, where: str) -> Run:
        """The run `name`; a UserError starts with `where` it was requested."""
        try:
            return checked_import(self.run(name), self.preset)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _check_ancestors(self, name: str) -> None:
        chain = [name]
        while (parent := self.run(chain[-1]).train.init_run) is not None:
            if parent in chain:
                raise UserError(f"run {name}: init_run is a cycle: {' -> '.join([*chain, parent])}")
            chain.append(parent)

    @cached_property
    def _data(self) -> Data:
        """The data section of all stages, without path and limit, which only the shards stage gets, as options."""
        return _pathless(self.preset.data)

    @cached_property
    def _reference_data(self) -> Data:
        """The data section of stages that compare samples with real images."""
        return _pathless(self.preset.reference_data or self.preset.data)

    def _evaluation(self, *keys: str) -> Evaluation:
        """The evaluation keys that a stage reads; the others at their defaults, so that its digest ignores them."""
        return Evaluation(**self.preset.evaluation.model_dump(include={"seed", *keys}))

    @cached_property
    def shards(self) -> Spec:
        """Image shards."""
        return Spec.of("shards", "shards", data=self._data)

    @cached_property
    def reference_shards(self) -> Spec:
        """Shards of the images that samples are compared with."""
        if self.preset.reference_data is None:
            return self.shards
        return Spec.of("shards", "reference_shards", data=self._reference_data)

    @property
    def has_components(self) -> bool:
        """Whether the teacher has an autoencoder and text encoders beside its denoiser."""
        return isinstance(self.preset.teacher, DiffusersTeacherConfig)

    @cached_property
    def components(self) -> Spec:
        """The autoencoder, tokenizers and text encoders of a text-to-image teacher: trained, or from its folder."""
        teacher = self.preset.teacher
        assert isinstance(teacher, DiffusersTeacherConfig)
        # They do not depend on how the denoiser is made, sampled or stored.
        keys = {"num_levels", "beta_start", "beta_end", "prediction", "latent_channels", "latent_factor"}
        kept = teacher.model_dump(include=keys)
        part = DiffusersTeacherConfig(kind="diffusers", network={}, weights=teacher.weights, **kept)
        if (training := teacher.training) is None:
            return Spec.of("components", "components", data=self._data, teacher=part)
        own = DiffusersTraining(iterations=1, batch_size=1, components=training.components)
        part = part.model_copy(update={"training": own})
        return Spec.of("components", "components", {"shards": self.shards}, data=self._data, teacher=part)

    def _with_components(self, upstream: Mapping[str, Spec]) -> dict[str, Spec]:
        return {**upstream, "components": self.components} if self.has_components else dict(upstream)

    @cached_property
    def latents(self) -> Spec:
        """The data set in the teacher's space, with its conditions' tokens."""
        teacher, space = self.preset.teacher, self._teacher
        if isinstance(teacher, TeacherConfig):
            space = TeacherConfig(kind=teacher.kind)  # codec and conditioner depend on nothing else
        upstream = self._with_components({"shards": self.shards})
        return Spec.of("latents", "latents", upstream, data=self._data, teacher=space)

    @cached_property
    def _teacher(self) -> AnyTeacher:
        """The teacher section of stages that read its weights, whose origin is in the teacher stage's digest."""
        return self.preset.teacher.model_copy(update={"training": None, "weights": None})

    def _teacher_of(self, run: str) -> AnyTeacher:
        """The teacher section of a run's network: an imported one may differ from the teacher's."""
        own = self.run(run).own
        return self._teacher if own is None else self._teacher.model_copy(update={"own": own})

    @cached_property
    def _features(self) -> Features:
        """The features section of stages that read the extractor written by the features stage."""
        weights = self.preset.features.weights
        stored = weights and weights.model_copy(update={"path": "extractor.weights"})
        return self.preset.features.model_copy(update={"weights": stored, "reference": None})

    @cached_property
    def features(self) -> Spec:
        """The feature extractor."""
        features = self.preset.features.model_copy(update={"reference": None})
        upstream = {"shards": self.reference_shards} if features.weights is None else {}
        return Spec.of("features", "features", upstream, data=self._reference_data, features=features)

    @cached_property
    def reference(self) -> Spec:
        """Statistics of the real images."""
        upstream = {"shards": self.reference_shards, "features": self.features}
        features = self._features.model_copy(update={"reference": self.preset.features.reference})
        evaluation = self.preset.evaluation.of_real_images()
        sections = {"data": self._reference_data, "features": features, "evaluation": evaluation}
        return Spec.of("reference", "reference", upstream, **sections)

    @cached_property
    def teacher(self) -> Spec:
        """The teacher's weights: trained on the latents, or imported without them."""
        upstream = {} if self.preset.teacher.training is None else {"latents": self.latents}
        upstream = self._with_components(upstream)
        return Spec.of("teacher", "teacher", upstream, data=self._data, teacher=self.preset.teacher)

    @cached_property
    def pairs(self) -> Spec:
        """Noise-image pairs of the teacher."""
        preset = self.preset
        sampler = preset.samplers[preset.pairs.sampler]
        sections: dict[str, Any] = {
            "data": self._data,
            "teacher": self._teacher,
            "pairs": preset.pairs,
            "sampler": sampler,
        }
        sections["prompts"] = preset.prompts
        return Spec.of("pairs", "pairs", self._with_components({"teacher": self.teacher}), **sections)

    def train(self, run: str) -> Spec:
        """The training of a run, or the import of a released one."""
        train = self.run(run).train
        if (weights := self.run(run).weights) is not None:
            upstream = {"teacher": self.teacher} if weights.lora_rank else {}
            # The record has the student's steps, for images outside the workflow; one step from pure noise is usual.
            usual = (train.num_steps, train.student_levels) == (1, None) or self.run(run).own is not None
            steps, teacher = None if usual else self._steps(train), self._teacher_of(run)
            return Spec.of("import", run, upstream, data=self._data, teacher=teacher, weights=weights, train=steps)
        upstream = {"teacher": self.teacher, "latents": self.latents}
        if train.regression_weight > 0:
            upstream["pairs"] = self.pairs
        if train.init_run is not None:
            upstream["start"] = self.train(train.init_run)
        upstream = self._with_components(upstream)
        sections = {"data": self._data, "teacher": self._teacher, "prompts": self.preset.prompts}
        return Spec.of("train", run, upstream, train=train, **sections)

    @staticmethod
    def _steps(train: Train) -> Train:
        """The keys of a run that an imported student is sampled by."""
        return Train.model_validate({"num_steps": train.num_steps, "student_levels": train.student_levels})

    def select(self, entry: str) -> Spec:
        """The selection of an entry's snapshot: of an iteration, or the best by FID on the run's curve."""
        run, name = self.split(entry)
        sampler, upstream = self.preset.samplers[name], {"model": self.train(run)}
        if sampler.checkpoint == "best":
            upstream["curve"] = self.curve(run)
        return Spec.of("select", entry, upstream, sampler=sampler)

    def _model(self, entry: str) -> dict[str, Any]:
        """Everything that determines an entry's samples, as keywords of `Spec.of`.

        The best snapshot is sampled with other noise than it was selected with, else its distance would be too low.
        """
        model, name = self.split(entry)
        sampler, seed = self.preset.samplers[name], self.preset.evaluation.seed
        content: dict[str, Any] = {"data": self._data, "teacher": self._teacher, "sampler": sampler}
        if model == "teacher":
            return content | {"upstream": self._with_components({"model": self.teacher}), "seed": seed}
        train, content["teacher"] = self.run(model).train, self._teacher_of(model)
        if self.run(model).own is None:
            content["train"] = self._steps(train) if self.run(model).weights else train
        made = self.select(entry) if sampler.is_selected else self.train(model)
        offset = CURVE_SEED_OFFSET if sampler.checkpoint == "best" else 0
        upstream = self._with_components({"model": made})
        return content | {"upstream": upstream, "seed": (seed + offset) % 2**32}

    def sample(self, entry: str) -> Spec:
        """The stored samples of an entry: all, or the `num_shown` of a streamed evaluation."""
        content = self._model(entry)
        keys = ("streamed", "num_shown") if self.preset.evaluation.streamed else ("num_samples", "num_blocks")
        evaluation = self._evaluation("protocols", "prompts", *keys).model_copy(update={"seed": content.pop("seed")})
        return Spec.of("sample", entry, content.pop("upstream"), evaluation=evaluation, **content)

    def metrics(self, entry: str) -> Spec:
        """The metrics of an entry, or of `floor` (resamples of the data).

        They depend on the entry's samples, or on its model if samples are streamed.
        """
        upstream = {"reference": self.reference, "features": self.features}
        evaluation = self._evaluation("num_samples", "num_blocks", "measures")
        sections: dict[str, Any] = {"data": self._data, "features": self._features}
        if entry == "floor":
            return Spec.of("metrics", entry, upstream, evaluation=evaluation, **sections)
        content = self._model(entry)
        keys = ("protocols", "num_samples", "num_blocks", "streamed", "prompts", "measures", "clip", "vgg_weights")
        evaluation = self._evaluation(*keys)
        sections["evaluation"] = evaluation.model_copy(update={"seed": content.pop("seed")})
        if not evaluation.streamed:
            return Spec.of("metrics", entry, {**upstream, "samples": self.sample(entry)}, **sections)
        return Spec.of("metrics", entry, upstream | content.pop("upstream"), **sections | content)

    def latency(self, entry: str) -> Spec:
        """The time of one image of an entry."""
        content = self._model(entry)
        seed = content.pop("seed")
        evaluation = self._evaluation("prompts", "latency").model_copy(update={"seed": seed})
        return Spec.of("latency", entry, content.pop("upstream"), evaluation=evaluation, **content)

    def curve(self, run: str) -> Spec:
        """The metrics of a run's snapshots, under the first protocol only."""
        upstream = {"model": self.train(run), "reference": self.reference, "features": self.features}
        upstream = self._with_components(upstream)
        evaluation = self._evaluation("protocols", "curve_samples", "prompts", "measures")
        return Spec.of(
            "curve",
            run,
            upstream,
            data=self._data,
            teacher=self._teacher,
            features=self._features,
            evaluation=evaluation.model_copy(update={"protocols": evaluation.protocols[:1]}),
            train=self.run(run).train,
        )

    def table(self, entries: list[str], timed: list[str] | None = None) -> Spec:
        """A table that reads the metrics of `entries` and the latency of those in `timed`, as `latency ENTRY`.

        Its name is the preset's, which the table shows.
        """
        read = {entry: self.metrics(entry) for entry in entries}
        read |= {f"latency {entry}": self.latency(entry) for entry in timed or []}
        return Spec.of("table", self.preset.name, read, data=self._data)

    def split(self, entry: str) -> tuple[str, str]:
        """(model, sampler) of an entry. Raises UserError if one does not exist or they do not match."""
        model, _, name = entry.partition("/")
        if name not in self.preset.samplers:
            raise UserError(
                f"entry {entry}: no sampler {name!r} in preset {self.preset.name}; known: "
                f"{', '.join(self.preset.samplers)}; add it there, or give the row `only` with the presets that have it"
            )
        run = None if model == "teacher" else self._requested(model, f"entry {entry}")
        check_sampler(entry, run, name, self.preset.samplers[name])
        return model, name
