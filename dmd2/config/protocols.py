"""Evaluation protocols: the choices under which published Frechet distances differ, by name. No torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

Name = Literal["edm", "dmd2"]
Rounding = Literal["round", "truncate"]
CovarianceStart = Literal["zeros", "ones"]


class Protocol(NamedTuple):
    """How samples become grey levels, and what the accumulator of their covariance starts at."""

    rounding: Rounding
    covariance_start: CovarianceStart


PROTOCOLS: dict[str, Protocol] = {
    "edm": Protocol("round", "zeros"),  # Karras et al. 2022
    "dmd2": Protocol("truncate", "ones"),  # the released DMD2 code
}


def describe(names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """The protocols `names` with their choices, as a record states them."""
    return {name: PROTOCOLS[name]._asdict() for name in names}
