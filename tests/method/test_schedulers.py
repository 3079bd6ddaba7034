"""Schedulers of diffusers around a denoiser in the project's coordinate, against the samplers' formulas written out."""

import pytest
import torch
from torch import Tensor
from toy import SHAPE, labels, recorded, toy_teacher

from dmd2.errors import UserError
from dmd2.method.denoiser import Denoiser
from dmd2.method.noise import NoiseGrid, expand
from dmd2.method.schedulers import SCHEDULERS, grid_betas, make_scheduler, num_passes, sample_with
from dmd2.training.rng import SampleNoise

GRID = NoiseGrid.ddpm()
BETAS = grid_betas(GRID)


class GaussianDenoiser(Denoiser):
    """Data N(0, 1/4): the ODE from sigma_1 to sigma_2 multiplies x by sqrt((1/4 + sigma_2^2) / (1/4 + sigma_1^2))."""

    feature_shapes = ((1, 1, 1),)

    def denoise_and_tap(
        self, x: Tensor, sigma: Tensor, cond: object, num_denoise: int, num_taps: int = 1
    ) -> tuple[Tensor, list[Tensor]]:
        return x * expand(0.25 / (0.25 + sigma**2), x), []


def noise(num: int = 6) -> SampleNoise:
    return SampleNoise(3, range(num), SHAPE)


def test_betas_are_stable_diffusions():
    """Linear in the square root from 0.00085 to 0.012 (Rombach et al. 2022, released configuration)."""
    wanted = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(BETAS, wanted, rtol=2e-3, atol=0)


def test_ddim_equals_its_formula():
    denoiser = toy_teacher(4).denoiser
    scheduler = make_scheduler("DDIMScheduler", 4, BETAS, {"timestep_spacing": "trailing"})
    levels = [999, 749, 499, 249]
    assert scheduler.timesteps.tolist() == levels
    found = sample_with(scheduler, denoiser, GRID, labels(6), noise()())
    x = noise()() * (1 + GRID.sigmas[999] ** 2).sqrt()
    for level, after in zip(levels, [749, 499, 249, None], strict=True):
        sigma = GRID.sigmas[level]
        x0 = denoiser(x, sigma.expand(6), labels(6))
        last = GRID.sigmas[0]  # set_alpha_to_one: false keeps the noise of level 0, in variance-preserving scale
        x = x0 + (last if after is None else GRID.sigmas[after]) * (x - x0) / sigma
    torch.testing.assert_close(found, x / (1 + GRID.sigmas[0] ** 2).sqrt(), rtol=1e-4, atol=1e-4)


def test_euler_equals_its_formula():
    denoiser = toy_teacher(4).denoiser
    options = {"timestep_spacing": "leading", "steps_offset": 1}
    found = sample_with(
        make_scheduler("EulerDiscreteScheduler", 5, BETAS, options), denoiser, GRID, labels(6), noise()()
    )
    levels = [801, 601, 401, 201, 1]
    x = noise()() * (1 + GRID.sigmas[801] ** 2).sqrt()
    for level, after in zip(levels, [*levels[1:], None], strict=True):
        sigma = GRID.sigmas[level]
        slope = (x - denoiser(x, sigma.expand(6), labels(6))) / sigma
        x = x + ((0.0 if after is None else GRID.sigmas[after]) - sigma) * slope
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"]
)
def test_deterministic_schedulers_approach_the_exact_ode(name: str):
    scheduler = make_scheduler(name, 200, BETAS, {"timestep_spacing": "trailing"})
    found = sample_with(scheduler, GaussianDenoiser(), GRID, labels(6), noise()())
    start = noise()() * (1 + GRID.sigmas[999] ** 2).sqrt()
    exact = start * 0.5 / (0.25 + GRID.sigmas[999] ** 2).sqrt()
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_stochastic_schedulers_draw_from_each_samples_own_generator(name: str):
    options = {"timestep_spacing": "leading"}
    drawn = noise()
    together = sample_with(
        make_scheduler(name, 10, BETAS, options), GaussianDenoiser(), GRID, {}, drawn(), rngs=drawn.rngs
    )
    own = SampleNoise(3, [4], SHAPE)
    alone = sample_with(make_scheduler(name, 10, BETAS, options), GaussianDenoiser(), GRID, {}, own(), rngs=own.rngs)
    torch.testing.assert_close(together[4:5], alone)
    assert not torch.equal(together[0], together[1])


def test_passes_are_counted_as_the_paper_does():
    """100 for 50 guided steps (tables 2 and 6); PNDM takes one pass more than steps."""
    options = {"timestep_spacing": "leading", "steps_offset": 1}
    assert num_passes(make_scheduler("EulerDiscreteScheduler", 50, BETAS, options), 6.0) == 100
    assert num_passes(make_scheduler("PNDMScheduler", 50, BETAS, options), 3.0) == 102
    assert num_passes(make_scheduler("DDIMScheduler", 4, BETAS, options), 1.0) == 4


def test_guidance_doubles_the_batch_of_every_pass():
    teacher = toy_teacher(guidable=True)
    null = teacher.conditioner.null(labels(6))
    scheduler = make_scheduler("DDIMScheduler", 3, BETAS)
    with recorded(teacher.denoiser) as calls:
        guided = sample_with(scheduler, teacher.denoiser, GRID, labels(6), noise()(), null=null, guidance_scale=2.0)
    assert [len(call.x) for call in calls] == [12] * 3
    plain = sample_with(make_scheduler("DDIMScheduler", 3, BETAS), teacher.denoiser, GRID, labels(6), noise()())
    assert float((guided - plain).abs().max()) > 1e-3


def test_every_known_scheduler_exists_and_unknown_ones_come_with_a_suggestion():
    for name in SCHEDULERS:
        assert len(make_scheduler(name, 4, BETAS, {"timestep_spacing": "leading"}).timesteps) >= 4
    with pytest.raises(UserError, match="no scheduler 'DDIMSchedule'; did you mean 'DDIMScheduler'"):
        make_scheduler("DDIMSchedule", 4, BETAS)
    with pytest.raises(UserError, match="DDIMScheduler has no option 'spacing'"):
        make_scheduler("DDIMScheduler", 4, BETAS, {"spacing": "leading"})
    with pytest.raises(UserError, match="timesteps between the teacher's 1000 levels"):
        make_scheduler("EulerDiscreteScheduler", 7, BETAS, {"timestep_spacing": "linspace"})
