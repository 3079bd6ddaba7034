"""Random numbers as functions of (seed, step, rank) or of (seed, sample id)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SHARED = 2**31
"""The `rank` of random numbers that all ranks draw alike."""


def normal(shape: tuple[int, ...] | torch.Size, rng: torch.Generator) -> Tensor:
    """Standard normal float32 values of `shape` on the generator's device."""
    return torch.randn(shape, generator=rng, device=rng.device)


def step_rng(seed: int, step: int, rank: int = 0, *, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one training step: a function of (seed, step, rank) and nothing else.

    A resumed run therefore draws what the uninterrupted one draws, with no generator state to save.
    """
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed))


def shared_choice(seed: int, step: int, num: int) -> int:
    """A uniform number of 0..num-1 that all ranks draw alike at a step, on the host: no device is asked."""
    words = np.random.SeedSequence([seed, step, SHARED]).generate_state(1, np.uint64)
    return int(words[0] % np.uint64(num))


class SampleNoise:
    """Normal noise that belongs to samples, not to batches: sample `i` sees the same numbers in any batch.

    Each call returns the next draw of every sample, (len(ids), *shape), on `device`.
    """

    def __init__(self, seed: int, ids: range | list[int], shape: tuple[int, ...], device: torch.device | str = "cpu"):
        self._rngs = [step_rng(seed, i) for i in ids]
        self._shape = shape
        self._device = device

    def __call__(self) -> Tensor:
        return torch.stack([normal(self._shape, rng) for rng in self._rngs]).to(self._device)
