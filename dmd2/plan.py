"""Which stage builds on which: the specs of a preset's jobs. No torch: the workflow asks this while planning.

A *model* is `teacher` or the name of a run; an *entry* is `MODEL/SAMPLER`, one set of samples and its metrics.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from dmd2.config import Data, Evaluation, Preset, Run
from dmd2.errors import UserError
from dmd2.presets import load_preset, load_run
from dmd2.spec import Spec


class Plan:
    """The specs of every job on one preset, built on demand and chained by digest."""

    def __init__(self, folder: Path | str, preset: str, overrides: dict[str, Any] | None = None):
        self.folder = Path(folder)
        self.preset: Preset = load_preset(folder, preset, overrides)
        self._runs: dict[str, Run] = {}
        for name in self.preset.runs:  # so that an adjustment of a run that does not exist is noticed
            self._asked(name, f"preset {preset}: `runs.{name}`")

    def run(self, name: str) -> Run:
        """The run `name` on this preset. Raises UserError for an unknown name or keys that contradict."""
        if name not in self._runs:
            self._runs[name] = load_run(self.folder, name, self.preset)
            self._check_ancestors(name)
        return self._runs[name]

    def _asked(self, name: str, where: str) -> Run:
        """The run `name`; an error begins with `where` it was asked for."""
        try:
            return self.run(name)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _check_ancestors(self, name: str) -> None:
        chain = [name]
        while (parent := self.run(chain[-1]).train.init_run) is not None:
            if parent in chain:
                raise UserError(f"run {name}: init_run goes in a circle: {' -> '.join([*chain, parent])}")
            chain.append(parent)

    @cached_property
    def _data(self) -> Data:
        """The data section without its path: where a data set lies does not decide what is made of it."""
        return self.preset.data.model_copy(update={"path": None})

    def _evaluation(self, *keys: str) -> Evaluation:
        """The evaluation keys that a stage reads, the others at their defaults: they are not to decide its digest."""
        return Evaluation(**self.preset.evaluation.model_dump(include={"seed", "rounding", *keys}))

    @cached_property
    def shards(self) -> Spec:
        """Image shards."""
        return Spec.of("shards", "shards", data=self.preset.data)

    @cached_property
    def latents(self) -> Spec:
        """The data set in the teacher's space, with its conditions."""
        return Spec.of("latents", "latents", {"shards": self.shards}, data=self._data, teacher=self._untrained)

    @cached_property
    def _untrained(self) -> Any:
        """The teacher's codec and conditioner do not depend on how its network is trained."""
        return self.preset.teacher.model_copy(update={"training": None})

    @cached_property
    def features(self) -> Spec:
        """The feature extractor."""
        return Spec.of("features", "features", {"shards": self.shards}, data=self._data, features=self.preset.features)

    @cached_property
    def reference(self) -> Spec:
        """Statistics of the real images."""
        upstream = {"shards": self.shards, "features": self.features}
        return Spec.of("reference", "reference", upstream, data=self._data, features=self.preset.features)

    @cached_property
    def teacher(self) -> Spec:
        """The teacher's weights."""
        return Spec.of("teacher", "teacher", {"latents": self.latents}, data=self._data, teacher=self.preset.teacher)

    @cached_property
    def pairs(self) -> Spec:
        """Noise-image pairs of the teacher."""
        preset = self.preset
        sampler = preset.samplers[preset.pairs.sampler]
        sections = {"data": self._data, "teacher": preset.teacher, "pairs": preset.pairs, "sampler": sampler}
        return Spec.of("pairs", "pairs", {"teacher": self.teacher}, **sections)

    def train(self, run: str) -> Spec:
        """The training of a run."""
        train = self.run(run).train
        upstream = {"teacher": self.teacher, "latents": self.latents}
        if train.regression_weight > 0:
            upstream["pairs"] = self.pairs
        if train.init_run is not None:
            upstream["start"] = self.train(train.init_run)
        return Spec.of("train", run, upstream, data=self._data, teacher=self.preset.teacher, train=train)

    def sample(self, entry: str) -> Spec:
        """The samples of an entry."""
        model, name = self.split(entry)
        evaluation = self._evaluation("num_samples", "num_blocks")
        sections = {"data": self._data, "teacher": self.preset.teacher, "evaluation": evaluation}
        sections["sampler"] = self.preset.samplers[name]
        if model == "teacher":
            return Spec.of("sample", entry, {"model": self.teacher}, **sections)
        return Spec.of("sample", entry, {"model": self.train(model)}, train=self.run(model).train, **sections)

    def metrics(self, entry: str) -> Spec:
        """The metrics of an entry, or of `floor`: resamples of the data themselves."""
        upstream = {"reference": self.reference, "features": self.features}
        if entry != "floor":
            upstream["samples"] = self.sample(entry)
        evaluation = self._evaluation("num_samples", "num_blocks", "covariance_start")
        sections = {"data": self._data, "features": self.preset.features, "evaluation": evaluation}
        return Spec.of("metrics", entry, upstream, **sections)

    def curve(self, run: str) -> Spec:
        """The metrics of a run's snapshots."""
        upstream = {"model": self.train(run), "reference": self.reference, "features": self.features}
        preset = self.preset
        return Spec.of(
            "curve",
            run,
            upstream,
            data=self._data,
            teacher=preset.teacher,
            features=preset.features,
            evaluation=self._evaluation("covariance_start", "curve_samples"),
            train=self.run(run).train,
        )

    def table(self, entries: list[str]) -> Spec:
        """A table that reads the metrics of `entries`; its name is the preset's, which the table states."""
        return Spec.of("table", self.preset.name, {entry: self.metrics(entry) for entry in entries}, data=self._data)

    def split(self, entry: str) -> tuple[str, str]:
        """(model, sampler) of an entry. Raises UserError where they do not exist or do not fit together."""
        model, _, name = entry.partition("/")
        if name not in self.preset.samplers:
            raise UserError(
                f"entry {entry}: no sampler {name!r} in preset {self.preset.name}; known: "
                f"{', '.join(self.preset.samplers)}"
            )
        kind = self.preset.samplers[name].kind
        if (model == "teacher") != (kind == "heun"):
            wanted = "a heun sampler" if model == "teacher" else "a few_step sampler"
            raise UserError(f"entry {entry}: {model} needs {wanted}, but {name} is {kind}")
        if model != "teacher":
            self._asked(model, f"entry {entry}")
        return model, name
