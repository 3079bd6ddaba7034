"""Measures of a block of samples from mergeable sums, so that a block may exceed memory and be split over processes.

A `Meter` computes the `Tally` of a batch, tallies of one block are merged, and the meter computes the values of the
whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from dmd2.config import Evaluation
from dmd2.errors import UserError
from dmd2.files import atomic
from dmd2.metrics.context import Context
from dmd2.metrics.distances import Device
from dmd2.metrics.diversity import ClassMoments
from dmd2.metrics.extractor import Extractor
from dmd2.metrics.frechet import FeatureStats, read_npz
from dmd2.metrics.images import Images, Labels, check_images
from dmd2.metrics.measure import Batch, Labelled, Means, Rows, Sums
from dmd2.metrics.reference import Reference
from dmd2.metrics.registry import measures_of
from dmd2.metrics.score import ScoreSums

SUMS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (FeatureStats, ClassMoments, ScoreSums, Means, Rows, Labelled)
}
"""The kinds of sums, by the name in stored tallies."""


@dataclass(frozen=True)
class Tally:
    """The sums of some samples of a block; tallies of disjoint samples of one block can be merged."""

    count: int
    sums: dict[str, Sums]  # by measure

    def merge(self, other: Tally) -> Tally:
        """The sums of the union of both sets of samples. Raises ValueError for sums of other measures."""
        if self.sums.keys() != other.sums.keys():
            raise ValueError(f"tallies of {list(self.sums)} and {list(other.sums)} have no union")
        return Tally(self.count + other.count, {name: sums.merge(other.sums[name]) for name, sums in self.sums.items()})

    def save(self, path: Path | str) -> None:
        """Writes an .npz file of plain arrays named MEASURE.KIND.FIELD, atomically."""
        arrays = {
            f"{name}.{type(sums).__name__}.{field}": np.asarray(value)
            for name, sums in self.sums.items()
            for field, value in vars(sums).items()
        }
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, count=np.array(self.count), **arrays)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads a file of `save`; nothing is unpickled. Raises UserError naming a missing or damaged file."""
        arrays = read_npz(path)
        fields: dict[tuple[str, str], dict[str, Any]] = {}
        try:
            for key, value in arrays.items():
                if key != "count":
                    name, kind, field = key.split(".")
                    fields.setdefault((name, kind), {})[field] = value.item() if value.ndim == 0 else value
            return cls(int(arrays["count"]), {name: SUMS[kind](**given) for (name, kind), given in fields.items()})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not the sums of samples ({error}); delete it and run again") from None


class Meter:
    """Measures blocks of `num_samples` samples against a reference, by the `measures` of an evaluation.

    The first of `protocols` is used for all measures but `fid_NAME` of the others. `detailed` enables those that a
    training curve does not need. Raises ValueError for fewer than 2 samples, UserError for an unsuitable measure.
    """

    def __init__(
        self,
        reference: Reference,
        extractor: Extractor,
        num_samples: int,
        protocols: Sequence[str] = ("edm",),
        *,
        detailed: bool = True,
        device: Device = "cpu",
        evaluation: Evaluation | None = None,
    ) -> None:
        if num_samples < 2:
            raise ValueError(f"{num_samples} samples are not a block: a covariance needs at least 2")
        self.reference, self.extractor, self.num_samples = reference, extractor, num_samples
        self.protocols, self.detailed, self.device = tuple(protocols), detailed, device
        context = Context(reference, num_samples, self.protocols, device, evaluation or Evaluation())
        self._measures = measures_of(context, detailed=detailed)

    def tally(self, images: Sequence[Images], labels: Labels, first: int) -> Tally:
        """The sums of samples [first, first + N) of a block; `images` has one array for each protocol."""
        check_images(images[0], labels)
        batch = Batch(self.extractor, images, labels, first, self.protocols, detailed=self.detailed)
        self.reference.expect(self.extractor, batch.images[0])
        sums = {name: measure.observe(batch) for name, measure in self._measures.items()}
        return Tally(len(labels), {name: found for name, found in sums.items() if found is not None})

    def measures(self, tally: Tally) -> dict[str, float]:
        """The values of a whole block by column. Raises ValueError for another number of samples."""
        if tally.count != self.num_samples:
            raise ValueError(f"a block has {self.num_samples} samples, got {tally.count}")
        values: dict[str, float] = {}
        for name, sums in tally.sums.items():
            values |= self._measures[name].value(sums)
        return values
