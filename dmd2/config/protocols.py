"""Evaluation protocols by name: choices in which published Frechet distances differ. Does not import torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

Name = Literal["edm", "dmd2"]
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


def describe(names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """The protocols `names` with their choices, as stored in a record."""
    return {name: PROTOCOLS[name]._asdict() for name in names}
