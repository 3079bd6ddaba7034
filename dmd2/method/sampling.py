"""Samplers: the student's few steps, their truncation for training (backward simulation), and EDM's Heun sampler.

Shapes: B batch, `...` the shape of one sample. `noise` is a function that returns the next standard normal (B, ...)
tensor; the caller chooses the generators (one per training step, or one per sample).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dmd2.method.denoiser import Cond, Denoiser, guided
from dmd2.method.noise import NoiseGrid, StudentSteps, add_noise, expand

Noise = Callable[[], Tensor]


def simulate(generator: Denoiser, cond: Cond, steps: StudentSteps, k: int, noise: Noise) -> tuple[Tensor, Tensor]:
    """The student's input at its sampling step `k`: (x (B, ...), sigma (B,)), detached.

    Backward simulation (paper, section 4.5): runs the first k steps as at inference, so that training and
    sampling cannot differ. k = 0 is pure noise at the first step's sigma.
    """
    with torch.no_grad():
        x = steps.init_scale * noise()
        for sigma, sigma_next in itertools.pairwise(steps.sigmas[: k + 1]):
            x0 = generator(x, _level(sigma, x), cond)
            x = add_noise(x0, _level(sigma_next, x), noise())
        return x, _level(steps.sigmas[k], x)


def few_step(
    generator: Denoiser, cond: Cond, steps: StudentSteps, noise: Noise, *, alpha_bar: float | None = None
) -> Tensor:
    """Samples of a student: x0 (B, ...).

    With `alpha_bar` the last estimate is (z - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar), another alpha_bar than the
    level's own: z = x / sqrt(1 + sigma^2) is the input of a variance-preserving network, eps its estimate.
    """
    with torch.no_grad():
        x, sigma = simulate(generator, cond, steps, len(steps.sigmas) - 1, noise)
        x0 = generator(x, sigma, cond)
        if alpha_bar is None:
            return x0
        eps = (x - x0) / expand(sigma, x)
        z = x / expand((1 + sigma.square()).sqrt(), x)
        return (z - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5


def _level(sigma: float, like: Tensor) -> Tensor:
    return torch.full((like.shape[0],), sigma, device=like.device)


@dataclass(frozen=True)
class Churn:
    """The stochastic part of EDM's sampler (Karras et al. 2022, algorithm 2); `amount` 0 is the ODE."""

    amount: float = 0.0
    low: float = 0.0
    high: float = float("inf")
    noise_scale: float = 1.0

    def gamma(self, sigma: float, num_steps: int) -> float:
        """The relative increase of the noise level before a step at `sigma`: sigma_hat = sigma * (1 + gamma)."""
        return min(self.amount / num_steps, 2**0.5 - 1) if self.low <= sigma <= self.high else 0.0


def heun_sigmas(grid: NoiseGrid, num_steps: int, rho: float = 7.0) -> list[float]:
    """The sampler's noise levels, descending to 0: num_steps + 1 values (Karras et al. 2022, eq. 5)."""
    low, high = float(grid.sigmas[0]) ** (1 / rho), float(grid.sigmas[-1]) ** (1 / rho)
    ramp = [(high + i / (num_steps - 1) * (low - high)) ** rho for i in range(num_steps)]
    return [*ramp, 0.0]


def heun(
    denoiser: Denoiser,
    cond: Cond,
    grid: NoiseGrid,
    num_steps: int,
    noise: Noise,
    *,
    rho: float = 7.0,
    churn: Churn | None = None,
    null: Cond | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """EDM's second-order sampler in 2 * num_steps - 1 network passes, its state in float64: x0 (B, ...) float32.

    Karras et al. 2022, algorithm 1 without `churn`, algorithm 2 with it.
    """
    churn = churn or Churn()

    def slope(x: Tensor, sigma: float) -> Tensor:  # dx/dsigma = (x - D(x; sigma)) / sigma
        x0 = guided(denoiser, x.float(), _level(sigma, x), cond, null, guidance_scale)
        return (x - x0.double()) / sigma

    with torch.no_grad():
        sigmas = heun_sigmas(grid, num_steps, rho)
        x = sigmas[0] * noise().double()
        for sigma, sigma_next in itertools.pairwise(sigmas):
            sigma_hat = sigma * (1 + churn.gamma(sigma, num_steps))
            if sigma_hat > sigma:
                x = x + (sigma_hat**2 - sigma**2) ** 0.5 * churn.noise_scale * noise().double()
            d = slope(x, sigma_hat)
            x_next = x + (sigma_next - sigma_hat) * d
            if sigma_next > 0:
                x_next = x + (sigma_next - sigma_hat) * 0.5 * (d + slope(x_next, sigma_next))
            x = x_next
        return x.float()
