"""Samplers of text-to-image teachers: the schedulers of diffusers, around a denoiser in the project's noise coordinate.

A scheduler's state and timesteps are its own; the denoiser sees x = x0 + sigma * eps at the same noise level.
Shapes: B batch, `...` the shape of one sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmd2.errors import UserError, suggestion
from dmd2.method.denoiser import Cond, Denoiser, guided
from dmd2.method.noise import NoiseGrid, expand

SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
    "DDPMScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "LCMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True, "set_alpha_to_one": False},
    "UniPCMultistepScheduler": {},
}
"""The known schedulers of diffusers, and the options with which Stable Diffusion's model files set them."""


def make_scheduler(name: str, num_steps: int, betas: Tensor, options: Mapping[str, Any] | None = None) -> Any:
    """A scheduler of diffusers with its timesteps set, for a model that predicts epsilon.

    betas (T,) are the variances of the discrete diffusion process. `options` are keyword arguments of the scheduler.
    Raises UserError for an unknown scheduler or option, and for timesteps between the T levels.
    """
    import diffusers

    if name not in SCHEDULERS:
        raise UserError(f"samplers: no scheduler {name!r}; {suggestion(name, SCHEDULERS)}")
    made = getattr(diffusers, name)
    given = {**SCHEDULERS[name], **(options or {})}
    known = inspect.signature(made.__init__).parameters
    if unknown := [key for key in given if key not in known]:
        raise UserError(f"samplers: {name} has no option {unknown[0]!r}; {suggestion(unknown[0], list(known))}")
    scheduler = made(
        **given, num_train_timesteps=len(betas), trained_betas=betas.double().numpy(), prediction_type="epsilon"
    )
    scheduler.set_timesteps(num_steps)
    if (scheduler.timesteps != scheduler.timesteps.round()).any():
        raise UserError(
            f"samplers: {name} with {dict(given)} has timesteps between the teacher's {len(betas)} levels; set "
            f"timestep_spacing to leading or trailing"
        )
    return scheduler


def grid_betas(grid: NoiseGrid) -> Tensor:
    """The betas (T,), float64 on the CPU, of a variance-preserving process with the grid's levels.

    sigma_t^2 = (1 - abar_t) / abar_t and abar_t = prod(1 - beta).
    """
    alpha_bar = 1 / (1 + grid.sigmas.double().cpu().square())
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return 1 - alpha_bar / previous


def num_passes(scheduler: Any, guidance_scale: float) -> int:
    """Network passes per sample; guidance doubles them, as the paper counts."""
    return len(scheduler.timesteps) * (1 if guidance_scale == 1 else 2)


def sample_with(
    scheduler: Any,
    denoiser: Denoiser,
    grid: NoiseGrid,
    cond: Cond,
    noise: Tensor,
    *,
    null: Cond | None = None,
    guidance_scale: float = 1.0,
    rngs: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Samples of a teacher: x0 (B, ...) float32 from unit Gaussian `noise` (B, ...).

    `rngs` (B) draw what a stochastic scheduler adds between steps, one generator per sample.
    """
    with torch.no_grad():
        x = noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            unit = scheduler.scale_model_input(x, timestep)  # sqrt(abar) x0 + sqrt(1 - abar) eps
            sigma = grid.sigmas[int(timestep)].expand(x.shape[0])
            noisy = unit * expand((1 + sigma.square()).sqrt(), x)
            x0 = guided(denoiser, noisy, sigma, cond, null, guidance_scale)
            eps = (noisy - x0) / expand(sigma, x)
            given = {"generator": list(rngs)} if rngs is not None and _takes_generator(scheduler) else {}
            x = scheduler.step(eps, timestep, x, **given).prev_sample
        return x.float()


def _takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters
