"""The exact teacher against quadrature, autograd and its own samples."""

import math

import pytest
import torch
from torch import Tensor

from dmd2.method.noise import NoiseGrid
from dmd2.teachers.mixture import GaussianMixture, mixture_teacher


def mixture() -> GaussianMixture:
    """Two classes on the plane: three modes of different width and weight, and a copy of them moved and reweighted."""
    means = torch.tensor([[[0.5, 0.5], [-0.5, 0.2], [0.1, -0.6]], [[0.9, 0.1], [-0.2, -0.4], [0.3, 0.3]]])
    stds = torch.tensor([[0.1, 0.2, 0.15], [0.2, 0.1, 0.3]])
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    return GaussianMixture(means.double(), stds.double(), weights.double())


def plane(half_width: float, num: int) -> tuple[Tensor, float]:
    """Grid points (num^2, 2) of a square around 0, and the area of a cell."""
    line = torch.linspace(-half_width, half_width, num, dtype=torch.float64)
    return torch.cartesian_prod(line, line), float(line[1] - line[0]) ** 2


def clean_density(points: Tensor, label: int) -> Tensor:
    """The mixture's density of x0, written out: (P, 2) -> (P,)."""
    reported = mixture()
    total = torch.zeros(len(points), dtype=torch.float64)
    for mean, std, weight in zip(reported.means[label], reported.stds[label], reported.weights[label], strict=True):
        total += weight * torch.exp(-(points - mean).square().sum(1) / (2 * std**2)) / (2 * math.pi * std**2)
    return total


@pytest.mark.parametrize("sigma", [0.1, 0.7, 4.0])
@pytest.mark.parametrize("label", [0, 1])
def test_posterior_mean_and_density_equal_numerical_integration(sigma: float, label: int):
    points, area = plane(2.5, 501)
    prior = clean_density(points, label)
    x = torch.tensor([[0.3, 0.1], [-0.8, 0.4], [0.0, -1.0]], dtype=torch.float64)
    distance = (x[:, None] - points).square().sum(-1)
    joint = prior * torch.exp(-distance / (2 * sigma**2)) / (2 * math.pi * sigma**2) * area  # (3, P)
    sigmas, labels = torch.full((3,), sigma), torch.full((3,), label)
    log_density = mixture().log_density(x, sigmas.double(), labels)
    torch.testing.assert_close(log_density, joint.sum(1).log(), rtol=1e-6, atol=1e-6)
    mean = joint @ points / joint.sum(1, keepdim=True)
    torch.testing.assert_close(mixture().posterior_mean(x, sigmas.double(), labels), mean, rtol=1e-6, atol=1e-6)


def test_score_is_the_gradient_of_the_log_density():
    rng = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0], dtype=torch.float64)
    label = torch.tensor([0, 1, 0, 1])
    x = sigma.view(4, 1, 1, 1) * torch.randn(4, 1, 1, 2, generator=rng, dtype=torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(mixture().log_density(x, sigma, label).sum(), x)
    torch.testing.assert_close(mixture().score(x, sigma, label), gradient, rtol=1e-7, atol=1e-12)


def test_samples_have_the_mixtures_moments():
    reported, num = mixture(), 40_000
    for label in (0, 1):
        x0 = reported.sample(torch.full((num,), label), torch.Generator().manual_seed(1))
        mean = reported.weights[label] @ reported.means[label]
        second = reported.weights[label] @ (reported.means[label].square() + reported.stds[label, :, None].square())
        assert x0.shape == (num, 2)
        torch.testing.assert_close(x0.mean(0), mean, rtol=0, atol=0.012)
        torch.testing.assert_close(x0.square().mean(0), second, rtol=0, atol=0.012)


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1, 1)])
def test_teacher_is_the_closed_form_in_float32_at_every_level(shape: tuple[int, int, int]):
    teacher = mixture_teacher(mixture().float(), shape)
    sigma = teacher.grid.sigmas[::37]
    cond = teacher.conditioner.draw(len(sigma), torch.Generator().manual_seed(0))
    eps = torch.randn(len(sigma), *shape, generator=torch.Generator().manual_seed(2))
    x = 0.5 + sigma.view(-1, 1, 1, 1) * eps
    exact = mixture().posterior_mean(x.double(), sigma.double(), cond["label"])
    found = teacher.denoiser(x, sigma, cond)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-6)


def test_copy_starts_at_the_teacher_and_learns():
    teacher = mixture_teacher(mixture().float(), (1, 1, 2))
    student = teacher.copy_network()
    sigma, cond = torch.full((64,), 80.0), teacher.conditioner.draw(64, torch.Generator().manual_seed(0))
    x = 80 * torch.randn(64, 1, 1, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(student(x, sigma, cond), teacher.denoiser(x, sigma, cond))
    assert torch.equal(student.label.weight, teacher.copy_network().label.weight)
    target = 0.5 * x.sign()
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (student(x, sigma, cond) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert not any(parameter.requires_grad for parameter in teacher.denoiser.parameters())


def test_tap_depends_on_the_input_and_passes_gradients_to_the_network():
    student = mixture_teacher(mixture().float(), (1, 1, 2)).copy_network()
    x, sigma, cond = torch.randn(3, 1, 1, 2).requires_grad_(), torch.ones(3), {"label": torch.tensor([0, 1, 0])}
    x0, (features,) = student.denoise_and_tap(x, sigma, cond, 1)
    assert x0.shape == (1, 1, 1, 2)
    assert student.denoise_and_tap(x, sigma, cond, 0)[0].shape == (0, 1, 1, 2)
    assert features.shape == (3, *student.feature_shapes[0])
    features.square().sum().backward()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()
    for layer in (student.first, student.second, student.label):
        assert layer.weight.grad.abs().sum() > 0


def test_mixture_with_parts_that_do_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"means, stds and weights are"):
        GaussianMixture(torch.zeros(2, 3, 2), torch.ones(2, 2), torch.ones(2, 3))
    with pytest.raises(ValueError, match="means have 2 elements"):
        mixture_teacher(mixture(), (1, 2, 2))


def test_grid_can_be_chosen():
    grid = NoiseGrid.karras(10, 0.01, 5.0)
    assert mixture_teacher(mixture().float(), (2, 1, 1), grid=grid).grid is grid
