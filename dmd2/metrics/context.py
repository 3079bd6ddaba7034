"""What a measure is made from."""

from __future__ import annotations

from typing import NamedTuple

from dmd2.config import Evaluation
from dmd2.metrics.distances import Device
from dmd2.metrics.reference import Reference


class Context(NamedTuple):
    """The reference of a measure, and how samples come to it."""

    reference: Reference
    num_samples: int
    """Samples per block."""
    protocols: tuple[str, ...]
    device: Device
    evaluation: Evaluation
    """Names the files of networks that only a measure needs."""
