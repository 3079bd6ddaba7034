"""The single noise coordinate of the project: x = x0 + sigma * eps, with sigma on a fixed grid.

Shapes: B batch, T grid size, `...` the shape of one sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class StudentSteps(NamedTuple):
    """The steps of a student, descending; `init_scale * eps` is the input of the first one ("pure noise")."""

    levels: tuple[int, ...]  # grid indices
    sigmas: tuple[float, ...]
    init_scale: float


@dataclasses.dataclass(frozen=True)
class NoiseGrid:
    """A teacher's noise levels `sigmas`, ascending, (T,) float32, and the scale of its students' initial noise.

    `init_scale * eps` at the largest sigma is the input of a student's first step. It is 80 for EDM and
    sqrt(1 + sigma_max^2) for Stable Diffusion, whose network then gets unit Gaussians after the adapter's c_in.
    """

    sigmas: Tensor
    init_scale: float
    variance_preserving: bool = False
    """Whether initial noise below the largest sigma is also scaled by sqrt(1 + sigma^2), or by sigma."""

    @classmethod
    def karras(
        cls, num_levels: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
    ) -> NoiseGrid:
        """EDM's noise levels (Karras et al. 2022, eq. 5), ascending."""
        ramp = np.linspace(sigma_min ** (1 / rho), sigma_max ** (1 / rho), num_levels, dtype=np.float64) ** rho
        return cls(torch.from_numpy(ramp).float(), sigma_max)

    @classmethod
    def ddpm(cls, num_levels: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseGrid:
        """Stable Diffusion's scaled-linear schedule: sigma_t = sqrt((1 - abar_t) / abar_t)."""
        betas = np.linspace(beta_start**0.5, beta_end**0.5, num_levels, dtype=np.float64) ** 2
        alpha_bar = np.cumprod(1.0 - betas)
        sigmas = np.sqrt((1.0 - alpha_bar) / alpha_bar)
        return cls(torch.from_numpy(sigmas).float(), math.sqrt(1.0 + float(sigmas[-1]) ** 2), variance_preserving=True)

    def __len__(self) -> int:
        return self.sigmas.shape[0]

    def to(self, device: torch.device | str) -> NoiseGrid:
        """The same grid with its table on `device`."""
        return dataclasses.replace(self, sigmas=self.sigmas.to(device))

    def draw(self, num: int, low: int, high: int, rng: torch.Generator) -> Tensor:
        """Sigmas (num,) at indices drawn uniformly from [low, high], both included."""
        index = torch.randint(low, high + 1, (num,), generator=rng, device=self.sigmas.device)
        return self.sigmas[index]

    def student_steps(self, num_steps: int, levels: Sequence[int] | None = None) -> StudentSteps:
        """The steps of a student at `levels` (descending grid indices), by default T-1, T-1 - T // num_steps, ...

        The default is 999, 749, 499 and 249 for 1,000 levels and four steps (paper, section 4.4). A one-step SDXL
        student starts at 399 (released code). Raises ValueError unless there are `num_steps` levels.
        """
        last = len(self) - 1
        chosen = tuple(levels or (last - i * (len(self) // num_steps) for i in range(num_steps)))
        if len(chosen) != num_steps:
            raise ValueError(f"{num_steps} steps, but levels {list(chosen)}")
        first = float(self.sigmas[chosen[0]])
        scale = math.sqrt(1 + first**2) if self.variance_preserving else first
        scale = self.init_scale if chosen[0] == last else scale
        return StudentSteps(chosen, tuple(float(self.sigmas[level]) for level in chosen), scale)


def expand(per_sample: Tensor, like: Tensor) -> Tensor:
    """Reshapes (B,) to (B, 1, ..., 1), which broadcasts with `like` (B, ...)."""
    return per_sample.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """x = x0 + sigma * eps, with one sigma per sample: (B, ...), (B,), (B, ...) -> (B, ...)."""
    return x0 + expand(sigma, x0) * eps


def critic_weight(sigma: Tensor, sigma_data: float | None) -> Tensor:
    """lambda(sigma) of the fake-score loss: EDM's sigma^-2 + sigma_data^-2, or sigma^-2, which is the epsilon loss."""
    weight = sigma**-2
    return weight if sigma_data is None else weight + sigma_data**-2
