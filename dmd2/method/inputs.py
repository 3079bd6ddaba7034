"""What a run is made from: batches of samples, pairs and prompts, and networks with adapters.

Shapes: B batch of one rank, `...` the shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dmd2.config import Train
from dmd2.errors import UserError
from dmd2.method.denoiser import Cond, Denoiser, Teacher

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


def check_inputs(teacher: Teacher, train: Train, *, has_data: bool, has_pairs: bool, has_prompts: bool) -> None:
    """Raises UserError for a configuration that needs inputs that are missing or that the teacher does not support."""
    if not has_data and (train.has_gan or (train.num_steps > 1 and not train.backward_simulation)):
        raise UserError("this run needs real data: it has a GAN, or several steps without backward simulation")
    if not has_pairs and train.regression_weight > 0:
        raise UserError("regression_weight > 0 needs the teacher's noise-image pairs")
    drawn = teacher.conditioner.draw(1, torch.Generator())
    if drawn is None and not has_prompts:
        raise UserError("this teacher takes prompts: set `prompts` of the preset to those to train on")
    has_null = drawn is None or teacher.conditioner.null(teacher.conditioner.embed(drawn)) is not None
    if train.guidance_scale != 1 and not has_null:
        raise UserError(
            f"guidance_scale is {train.guidance_scale}, but this teacher has no unconditional input; set it to 1"
        )
    if train.has_gan and train.gan_taps > (num := len(teacher.denoiser.feature_shapes)):
        raise UserError(
            f"gan_taps is {train.gan_taps}, but this teacher's encoder has {num} level(s); use at most {num}"
        )


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with names that start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
