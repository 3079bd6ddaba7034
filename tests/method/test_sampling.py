"""The samplers against exact solutions: Gaussian data has a closed-form denoiser and a closed-form ODE."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from toy import SHAPE, labels, recorded, rng, toy_teacher

from dmd2.method.denoiser import Cond, Denoiser
from dmd2.method.noise import NoiseGrid, expand
from dmd2.method.sampling import Churn, few_step, heun, heun_sigmas, simulate
from dmd2.training.rng import SampleNoise

GRID = NoiseGrid.karras()
STD = 0.5


class GaussianDenoiser(Denoiser):
    """Data N(0, STD^2): E[x0 | x] = x STD^2 / (STD^2 + sigma^2)."""

    feature_shapes = ((1, 1, 1),)

    def denoise_and_tap(
        self, x: Tensor, sigma: Tensor, cond: Cond, num_denoise: int, num_taps: int = 1
    ) -> tuple[Tensor, list[Tensor]]:
        return x * expand(STD**2 / (STD**2 + sigma**2), x), [x][:num_taps]


def fixed_noise(num: int = 6, seed: int = 3) -> SampleNoise:
    return SampleNoise(seed, range(num), SHAPE)


def test_few_steps_are_the_simulation_and_one_more_call():
    generator = toy_teacher().denoiser
    sigmas = GRID.student_steps(4).sigmas
    whole = few_step(generator, labels(6), GRID.student_steps(4), fixed_noise())
    x, sigma = simulate(generator, labels(6), GRID.student_steps(4), 3, fixed_noise())
    assert torch.equal(sigma, torch.full((6,), sigmas[3]))
    assert torch.equal(whole, generator(x, sigma, labels(6)))


def test_four_steps_equal_the_papers_loop_written_out():
    generator = toy_teacher(4).denoiser
    noise = fixed_noise()
    x = 80 * noise()
    for i, index in enumerate([999, 749, 499, 249]):
        x0 = generator(x, GRID.sigmas[index].expand(6), labels(6))
        if i < 3:
            x = x0 + GRID.sigmas[[749, 499, 249][i]] * noise()
    found = few_step(generator, labels(6), GRID.student_steps(4), fixed_noise())
    torch.testing.assert_close(found, x0, rtol=1e-6, atol=1e-6)


def test_simulation_of_no_step_is_pure_noise_and_runs_nothing():
    generator = toy_teacher().denoiser
    with recorded(generator) as calls:
        x, sigma = simulate(generator, labels(6), GRID.student_steps(4), 0, fixed_noise())
    assert calls == []
    assert torch.equal(x, 80.0 * fixed_noise()())
    assert torch.equal(sigma, GRID.sigmas[-1].expand(6))


def test_simulation_runs_k_steps_at_descending_levels_without_a_graph():
    generator = toy_teacher().copy_network()
    for k in range(4):
        with recorded(generator) as calls:
            x, sigma = simulate(generator, labels(6), GRID.student_steps(4), k, fixed_noise())
        levels = [float(call.sigma[0]) for call in calls] + [float(sigma[0])]
        assert levels == list(GRID.student_steps(4).sigmas[: k + 1])
        assert not x.requires_grad


def test_heun_levels_are_edms():
    n, rho = 18, 7.0
    by_hand = [(80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(n)]
    assert heun_sigmas(GRID, n) == pytest.approx([*by_hand, 0.0], rel=1e-6)


@pytest.mark.parametrize("num_steps", [2, 5, 18])
def test_heun_makes_two_n_minus_one_passes(num_steps: int):
    denoiser = GaussianDenoiser()
    with recorded(denoiser) as calls:
        heun(denoiser, {}, GRID, num_steps, fixed_noise())
    assert len(calls) == 2 * num_steps - 1
    assert all(call.x.dtype == torch.float32 for call in calls)


def test_heun_converges_to_the_exact_ode_solution_at_second_order():
    # dx/dsigma = (x - D) / sigma = x sigma / (STD^2 + sigma^2), so x is proportional to sqrt(STD^2 + sigma^2).
    start = 80.0 * fixed_noise()().double()
    exact = start * STD / math.sqrt(STD**2 + float(GRID.sigmas[-1]) ** 2)
    errors = []
    for num_steps in (16, 32, 64, 128):
        found = heun(GaussianDenoiser(), {}, GRID, num_steps, fixed_noise()).double()
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[-1] < 1e-3
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(errors)]
    assert all(3.3 < ratio < 4.8 for ratio in ratios), (errors, ratios)


def test_stochastic_sampler_keeps_the_variance_of_the_data():
    churn = Churn(amount=20, low=0.05, high=50)
    num = 1500
    found = heun(GaussianDenoiser(), {}, GRID, 80, fixed_noise(num), churn=churn).flatten()
    # 24,000 values: the standard error of the standard deviation is STD / sqrt(2 * 24000) = 0.0023.
    assert float(found.std()) == pytest.approx(STD, abs=0.012)
    deterministic = heun(GaussianDenoiser(), {}, GRID, 80, fixed_noise(num)).flatten()
    assert float(torch.corrcoef(torch.stack([found, deterministic]))[0, 1]) < 0.9, "the churn did nothing"


def test_churn_acts_only_inside_its_range_and_by_edms_amount():
    n = 18
    churn = Churn(amount=40, low=0.05, high=50, noise_scale=1.003)
    levels = heun_sigmas(GRID, n)[:-1]
    inside = [low for low in levels if 0.05 <= low <= 50]
    denoiser, draws, noise = GaussianDenoiser(), 0, fixed_noise(1)

    def counting() -> Tensor:
        nonlocal draws
        draws += 1
        return noise()

    with recorded(denoiser) as calls:
        heun(denoiser, {}, GRID, n, counting, churn=churn)
    assert 0 < len(inside) < n
    assert draws == 1 + len(inside)
    gamma = min(40 / n, math.sqrt(2) - 1)
    expected = [level * (1 + gamma) if level in inside else level for level in levels]
    first_of_each_step = [float(call.sigma[0]) for call in calls[::2]]
    assert first_of_each_step == pytest.approx(expected, rel=1e-6)
    assert Churn(amount=4).gamma(1.0, 40) == pytest.approx(0.1)


def test_heun_is_independent_of_the_batch_that_a_sample_is_in():
    denoiser = toy_teacher().denoiser
    churn = Churn(amount=10, low=0.05, high=50)
    together = heun(denoiser, labels(6), GRID, 6, SampleNoise(1, range(6), SHAPE), churn=churn)
    alone = heun(denoiser, {"label": torch.tensor([1])}, GRID, 6, SampleNoise(1, [4], SHAPE), churn=churn)
    torch.testing.assert_close(together[4:5], alone, rtol=1e-5, atol=1e-6)


def test_guided_heun_uses_the_guided_estimate_everywhere():
    teacher = toy_teacher(guidable=True)
    null = teacher.conditioner.null(labels(6))
    with recorded(teacher.denoiser) as calls:
        found = heun(teacher.denoiser, labels(6), GRID, 4, fixed_noise(), null=null, guidance_scale=2.0)
    assert [len(call.x) for call in calls] == [12] * 7
    plain = heun(teacher.denoiser, labels(6), GRID, 4, fixed_noise())
    assert float((found - plain).abs().max()) > 1e-3


def test_simulation_draws_as_many_noises_as_the_sampler_up_to_there():
    drawn = []

    def noise() -> Tensor:
        drawn.append(1)
        return torch.randn(2, *SHAPE, generator=rng(len(drawn)))

    simulate(toy_teacher().denoiser, labels(2), GRID.student_steps(4), 2, noise)
    assert len(drawn) == 3
