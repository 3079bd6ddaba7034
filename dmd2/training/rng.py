"""Stateless random numbers: functions of (seed, step, rank) or of (seed, sample id)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SHARED = 2**31
"""The `rank` of random numbers that are the same on all ranks."""


def normal(shape: tuple[int, ...] | torch.Size, rng: torch.Generator) -> Tensor:
    """Standard normal float32 values of `shape` on the generator's device."""
    return torch.randn(shape, generator=rng, device=rng.device)


def step_rng(seed: int, step: int, rank: int = 0, *, device: torch.device | str = "cpu") -> torch.Generator:
    """The random generator of one training step, seeded with (seed, step, rank) only.

    A resumed run therefore draws the same numbers as an uninterrupted one, with no generator state to save.
    """
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed))


def shared_choice(seed: int, step: int, num: int) -> int:
    """A uniform int in [0, num) that is the same on all ranks and micro-batches; computed on the host."""
    words = np.random.SeedSequence([seed, step, SHARED]).generate_state(1, np.uint64)
    return int(words[0] % np.uint64(num))


class SampleNoise:
    """Standard normal noise with one generator per sample: sample `i` gets the same numbers in any batch.

    Each call returns the next draw of every sample, (len(ids), *shape) float32, on `device`.
    """

    def __init__(self, seed: int, ids: range | list[int], shape: tuple[int, ...], device: torch.device | str = "cpu"):
        self.rngs = [step_rng(seed, i) for i in ids]
        self._shape = shape
        self._device = device

    def __call__(self) -> Tensor:
        return torch.stack([normal(self._shape, rng) for rng in self.rngs]).to(self._device)
