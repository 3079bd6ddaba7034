"""What networks predict, in the project's noise coordinate: against the exact mixture teacher in float64."""

from collections.abc import Callable

import pytest
import torch
from tiny_pipelines import LATENT, WIDTH, tiny_data, tiny_teacher
from torch import Tensor

from dmd2.method.noise import NoiseGrid, add_noise, expand
from dmd2.teachers import load_teacher
from dmd2.teachers.diffusers import noise_grid
from dmd2.teachers.diffusers_unet import DiffusersDenoiser, stock_unet
from dmd2.teachers.mixture import GaussianMixture
from dmd2.teachers.predictions import PREDICTIONS, boundaries, input_scale, linear_head, timestep

GRID = NoiseGrid.ddpm()
LEVELS = torch.tensor([0, 249, 399, 999])

PATHS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda x0, eps, alpha: (alpha * x0 + (1 - alpha**2).sqrt() * eps, eps),
    "v_prediction": lambda x0, eps, alpha: (
        alpha * x0 + (1 - alpha**2).sqrt() * eps,
        alpha * eps - (1 - alpha**2).sqrt() * x0,
    ),
    "sample": lambda x0, eps, alpha: (alpha * x0 + (1 - alpha**2).sqrt() * eps, x0),
    "flow": lambda x0, eps, alpha: (alpha * x0 + (1 - alpha) * eps, eps - x0),
}
"""A network's input and target, from its own formulation; alpha is the factor of x0 in its input."""


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_adapters_agree_with_the_exact_mixture_teacher_in_float64(prediction: str) -> None:
    """A network that predicts from the exact posterior, in its own formulation, gives back the exact x0."""
    rng = torch.Generator().manual_seed(0)
    means = torch.randn(2, 3, 12, generator=rng, dtype=torch.float64)
    mixture = GaussianMixture(means, torch.full((2, 3), 0.3, dtype=torch.float64), torch.full((2, 3), 1 / 3).double())
    label = torch.tensor([0, 1, 0, 1, 1])
    sigma = GRID.sigmas[[0, 20, 249, 399, 999]].double()
    eps = torch.randn(5, 3, 2, 2, generator=rng, dtype=torch.float64)
    x = add_noise(mixture.sample(label, rng).double().view(5, 3, 2, 2), sigma, eps)
    x0 = mixture.posterior_mean(x, sigma, label)
    scale = expand(input_scale(prediction, sigma), x)
    seen, out = PATHS[prediction](x0, (x - x0) / expand(sigma, x), scale)
    torch.testing.assert_close(scale * x, seen, rtol=1e-12, atol=1e-12)  # the noisy input is the network's own x_t
    head = linear_head(prediction, sigma)
    torch.testing.assert_close(expand(head.a, x) * x + expand(head.k, x) * out, x0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_whole_adapter_uses_its_prediction(prediction: str) -> None:
    teacher = tiny_teacher("sd15", prediction=prediction)
    built = load_teacher(teacher, tiny_data())
    assert isinstance(built.denoiser, DiffusersDenoiser)
    sigma = built.grid.sigmas[LEVELS].double()
    x, cond = (
        torch.randn(4, *LATENT, generator=torch.Generator().manual_seed(3)).double(),
        {"text": torch.randn(4, 8, WIDTH)},
    )
    x = x * expand(1 + sigma, x)
    out, head = built.denoiser.predict_and_tap(x, sigma, cond, len(x), 0)[0]
    assert head is not None
    assert out.dtype == head.a.dtype == torch.float64
    torch.testing.assert_close(built.denoiser(x, sigma, cond), expand(head.a, x) * x + expand(head.k, x) * out)
    scale = expand(input_scale(prediction, sigma), x)
    time = timestep(prediction, sigma, built.denoiser.limits)
    unet = stock_unet(built.denoiser).double()
    torch.testing.assert_close(out, unet(scale * x, time, encoder_hidden_states=cond["text"].double()).sample)


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="known: epsilon"):
        linear_head("eps", torch.ones(1))


def test_levels_are_found_also_when_rounded() -> None:
    limits, index = boundaries(GRID.sigmas), torch.arange(1000)
    for factor in (1.0, 1 + 1e-4, 1 - 1e-4):
        assert torch.equal(timestep("epsilon", GRID.sigmas * factor, limits), index)
    assert timestep("epsilon", torch.tensor([0.0, 1e6]), limits).tolist() == [0, 999]


def test_the_schedule_has_the_values_of_stable_diffusion() -> None:
    """Values of Stable Diffusion's public scheduler configuration, as diffusers computes them in float32."""
    wanted = {0: 0.0291675, 20: 0.1379910, 249: 0.6932054, 399: 1.1605788, 499: 1.6128870, 749: 4.0817308}
    wanted |= {980: 13.0430880, 999: 14.6146469}
    grid = noise_grid(tiny_teacher("sd15"))
    for level, sigma in wanted.items():
        assert float(grid.sigmas[level]) == pytest.approx(sigma, rel=2e-5)  # float32 has 1 - 0.99915
    assert grid.init_scale == pytest.approx((1 + 14.6146469**2) ** 0.5, rel=1e-5)
    assert grid.student_steps(4).levels == (999, 749, 499, 249)


def test_flow_matchings_pure_noise_is_a_unit_gaussian_to_the_network() -> None:
    grid = noise_grid(tiny_teacher("sd15", prediction="flow"))
    assert bool((grid.sigmas.diff() > 0).all())
    last = grid.sigmas[-1:]
    assert float(input_scale("flow", last)) * grid.init_scale == pytest.approx(1, rel=1e-5)
    assert float(timestep("flow", last, boundaries(grid.sigmas))) == pytest.approx(999.5, rel=1e-5)
