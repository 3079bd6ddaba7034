"""Evaluation protocols by name: choices in which published Frechet distances differ. Does not import torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

Name = Literal["edm", "dmd2"]
MeasureName = Literal[
    "fid", "patch_fid", "pixel_fd", "nearest_distance", "diversity", "prompt_diversity",
    "accuracy", "alignment", "precision_recall", "inception_score",
]  # fmt: skip
"""The keys of metrics.MEASURES."""
Rounding = Literal["round", "truncate"]
CovarianceStart = Literal["zeros", "ones"]


class Protocol(NamedTuple):
    """How samples are quantised to grey levels, and the initial value of the covariance accumulator."""

    rounding: Rounding
    covariance_start: CovarianceStart


PROTOCOLS: dict[str, Protocol] = {
    "edm": Protocol("round", "zeros"),  # Karras et al. 2022
    "dmd2": Protocol("truncate", "ones"),  # the released DMD2 code
}

MEASURES_OF_CLASSES: tuple[MeasureName, ...] = (
    "fid", "pixel_fd", "nearest_distance", "diversity", "accuracy", "precision_recall", "inception_score"
)  # fmt: skip
"""The default for data with classes."""
MEASURES_OF_CAPTIONS: tuple[MeasureName, ...] = ("fid", "pixel_fd", "nearest_distance", "precision_recall")
"""The default for data with captions: what needs neither several images of a caption nor a network of its own."""
CLASSES_ONLY: tuple[MeasureName, ...] = ("diversity", "accuracy")
CAPTIONS_ONLY: tuple[MeasureName, ...] = ("prompt_diversity", "alignment")
DETAILED = ("patch_fid", "precision_recall", "inception_score")
"""Measures that a training curve does not need."""


def describe(names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """The protocols `names` with their choices, as stored in a record."""
    return {name: PROTOCOLS[name]._asdict() for name in names}
