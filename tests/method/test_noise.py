"""The noise coordinate against published tables, and randomness as a function of its names alone."""

import math

import numpy as np
import pytest
import torch

from dmd2.method.noise import NoiseGrid, add_noise, expand
from dmd2.training.rng import SampleNoise, step_rng

# Karras et al. 2022, eq. 5 with EDM's constants, evaluated by the published float32 program.
KARRAS = {
    0: 0.00199999963,
    1: 0.00205019861,
    20: 0.00323158922,
    100: 0.0167514402,
    250: 0.170312256,
    399: 0.959482491,
    500: 2.52650762,
    749: 17.4981041,
    750: 17.6172619,
    900: 45.5560074,
    980: 72.0538712,
    998: 79.5637894,
    999: 79.9999847,
}
# t: (abar, kappa = sqrt((1 - abar) / abar)) of Stable Diffusion's scheduler, float32.
DDPM = {
    0: (0.99915, 0.0291675),
    20: (0.9813143, 0.1379910),
    249: (0.6754321, 0.6932054),
    399: (0.4260861, 1.1605788),
    499: (0.2776694, 1.6128870),
    749: (0.0566234, 4.0817308),
    980: (0.00584378, 13.0430880),
    999: (0.00466010, 14.6146469),
}


def test_karras_grid_equals_the_published_table():
    grid = NoiseGrid.karras()
    assert len(grid) == 1000
    assert grid.sigmas.dtype == torch.float32
    assert grid.init_scale == 80.0
    for index, sigma in KARRAS.items():
        assert float(grid.sigmas[index]) == pytest.approx(sigma, rel=1e-5), index


def test_ddpm_grid_equals_the_scheduler_of_stable_diffusion():
    grid = NoiseGrid.ddpm()
    for t, (alpha_bar, kappa) in DDPM.items():
        sigma = float(grid.sigmas[t])
        assert sigma == pytest.approx(kappa, rel=2e-5), t
        assert 1 / (1 + sigma**2) == pytest.approx(alpha_bar, rel=2e-5), t


def test_ddpm_student_is_fed_unit_gaussians_after_the_adapters_scaling():
    grid = NoiseGrid.ddpm()
    c_in = 1 / math.sqrt(1 + float(grid.sigmas[-1]) ** 2)
    assert grid.init_scale * c_in == pytest.approx(1.0, rel=1e-7)


@pytest.mark.parametrize(
    ("num_steps", "indices"), [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249]), (3, [999, 666, 333])]
)
def test_student_steps_are_the_papers_indices(num_steps: int, indices: list[int]):
    for grid in (NoiseGrid.karras(), NoiseGrid.ddpm()):
        steps = grid.student_steps(num_steps)
        assert steps.levels == tuple(indices)
        assert steps.sigmas == tuple(float(grid.sigmas[i]) for i in indices)
        assert steps.init_scale == grid.init_scale


def test_a_students_first_level_scales_its_initial_noise():
    """One-step SDXL starts at 399 with unit Gaussians after the adapter's c_in = 1 / sqrt(1 + sigma_399^2)."""
    sigma = 1.1605788  # sqrt((1 - alpha_bar) / alpha_bar) at t = 399
    steps = NoiseGrid.ddpm().student_steps(1, [399])
    assert steps.sigmas == pytest.approx([sigma], rel=2e-5)
    assert steps.init_scale == pytest.approx(math.sqrt(1 + sigma**2), rel=2e-5)
    karras = NoiseGrid.karras()
    assert karras.student_steps(1, [500]).init_scale == float(karras.sigmas[500])
    with pytest.raises(ValueError, match=r"2 steps, but levels \[399\]"):
        karras.student_steps(2, [399])


def test_draw_is_uniform_over_both_ends():
    grid = NoiseGrid(torch.arange(10.0), 9.0)
    drawn = grid.draw(30_000, 2, 6, torch.Generator().manual_seed(0))
    counts = np.bincount(drawn.int().numpy(), minlength=10)
    assert counts[[0, 1, 7, 8, 9]].sum() == 0
    expected = 6000
    assert np.abs(counts[2:7] - expected).max() < 5 * math.sqrt(expected)


def test_add_noise_scales_each_sample_by_its_own_sigma():
    x0 = np.arange(12, dtype=np.float64).reshape(3, 1, 2, 2)
    eps = np.linspace(-1, 1, 12).reshape(3, 1, 2, 2)
    sigma = np.array([0.0, 0.5, 10.0])
    by_hand = np.stack([x0[b] + sigma[b] * eps[b] for b in range(3)])
    found = add_noise(torch.from_numpy(x0), torch.from_numpy(sigma), torch.from_numpy(eps))
    np.testing.assert_array_equal(found.numpy(), by_hand)


def test_expand_puts_the_batch_first():
    assert expand(torch.ones(5), torch.ones(5, 3, 2, 2)).shape == (5, 1, 1, 1)
    assert expand(torch.ones(5), torch.ones(5)).shape == (5,)


def test_step_rng_is_a_function_of_seed_step_and_rank_and_of_each():
    def first(*name: int) -> float:
        return float(torch.randn((), generator=step_rng(*name)))

    before = torch.random.get_rng_state()
    assert first(3, 14, 1) == first(3, 14, 1)
    names = [(seed, step, rank) for seed in range(5) for step in range(40) for rank in (0, 1, 2**31)]
    assert len({first(*name) for name in names}) == len(names)
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator was touched"


def test_a_samples_noise_does_not_depend_on_its_batch():
    shape = (2, 3)
    whole = SampleNoise(7, range(10), shape)
    parts = [SampleNoise(7, range(3), shape), SampleNoise(7, [3], shape), SampleNoise(7, range(4, 10), shape)]
    draws = []
    for _ in range(3):
        together = whole()
        assert together.shape == (10, *shape)
        assert torch.equal(together, torch.cat([part() for part in parts]))
        draws.append(together)
    backwards = SampleNoise(7, list(range(9, -1, -1)), shape)()
    assert torch.equal(backwards.flip(0), draws[0])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(SampleNoise(8, range(10), shape)(), draws[0])
