"""What a run is made from: batches of samples, pairs and prompts, and networks with adapters.

Shapes: B batch of one rank, `...` the shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from dmd2.method.denoiser import Cond, Denoiser

Batches = Callable[[int], tuple[Tensor, Cond]]
"""Batch number -> (x0, tokens) of this rank's share of real samples, the batch dimension first."""
PairBatches = Callable[[int], tuple[Tensor, Tensor, Cond]]
"""Batch number -> (noise, the teacher's x0, tokens) of this rank's share of pairs."""
Prompts = Callable[[int], tuple[Tensor, Cond]]
"""Batch number -> (numbers of the prompts (B,), their tokens) of this rank's share: labels to generate samples for."""
Distance = Callable[[Tensor, Tensor], Tensor]
"""The mean distance () of two batches of images (B, ...), differentiable in the first."""


class Networks(NamedTuple):
    """The networks of a run that trains adapters, in place of copies of the teacher's network."""

    generator: Denoiser
    fake: Denoiser
    merged: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """The state dict of the whole generator from its trained part."""
