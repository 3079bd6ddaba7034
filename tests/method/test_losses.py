"""Distribution matching and the generator's GAN term, against their formulas in float64."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import SHAPE, ToyDenoiser, labels, recorded, rng, toy_teacher

from dmd2.config import Train
from dmd2.method import losses
from dmd2.method.critic import Critic
from dmd2.method.denoiser import Cond, Prediction, Teacher
from dmd2.method.noise import NoiseGrid, expand
from dmd2_kernels import LinearHead


def wide(teacher: Teacher) -> Teacher:
    return dataclasses.replace(teacher, denoiser=teacher.denoiser.double(), grid=double_grid())


def double_grid() -> NoiseGrid:
    grid = NoiseGrid.karras()
    return NoiseGrid(grid.sigmas.double(), grid.init_scale)


def critic_of(seed: int = 1, *, num_taps: int = 1) -> Critic:
    torch.manual_seed(seed)
    return Critic(toy_teacher(seed).copy_network(), num_taps=num_taps)


def images(num: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num, *SHAPE, generator=rng(9)).to(dtype)


def indices(sigma: Tensor) -> np.ndarray:
    """Places in EDM's grid of levels at which a network was evaluated."""
    grid = NoiseGrid.karras().sigmas
    index = torch.searchsorted(grid, sigma)
    assert torch.equal(grid[index], sigma), "a level that is not on the grid"
    return index.numpy()


def assert_uniform(index: np.ndarray, low: int, high: int) -> None:
    assert (index.min(), index.max()) == (low, high)
    num_levels = high - low + 1
    spread = (num_levels**2 - 1) / 12
    assert abs(index.mean() - (low + high) / 2) < 5 * math.sqrt(spread / len(index))


@pytest.mark.parametrize("scale", [1.0, 1.75])
def test_matching_gradient_is_the_papers_formula_in_float64(scale: float):
    teacher = wide(toy_teacher(guidable=True))
    critic = critic_of(num_taps=0).double()
    x0, cond = images(7, dtype=torch.float64), labels(7)
    train = Train(guidance_scale=scale)
    with recorded(teacher.denoiser) as real_calls, recorded(critic.fake) as fake_calls:
        loss, grad = losses.matching_gradient(x0, cond, teacher, critic, train, rng())
    (real,), (fake,) = real_calls, fake_calls
    if scale == 1:
        x0_real = real.output.numpy()
        assert torch.equal(real.x, fake.x)
    else:  # the teacher is requested [uncond; cond] at once, the fake score is never guided
        assert torch.equal(real.x, torch.cat([fake.x, fake.x]))
        uncond, conditional = real.output.chunk(2)
        x0_real = (uncond + scale * (conditional - uncond)).numpy()
        assert real.cond["label"].tolist() == [2] * 7 + cond["label"].tolist()
    assert fake.cond["label"].tolist() == cond["label"].tolist()
    weight = np.abs(x0.numpy() - x0_real).mean(axis=(1, 2, 3), keepdims=True)
    g = (fake.output.detach().numpy() - x0_real) / weight
    np.testing.assert_allclose(grad.numpy(), g / x0.numel(), rtol=1e-12, atol=1e-18)
    assert float(loss.loss) == pytest.approx(0.5 * np.mean(g**2), rel=1e-12)
    assert not grad.requires_grad


def test_matching_adds_noise_of_its_own_level_to_every_sample():
    teacher, critic = toy_teacher(), critic_of(num_taps=0)
    x0 = images(4000)
    with recorded(teacher.denoiser) as calls:
        losses.matching_gradient(x0, labels(4000), teacher, critic, Train(), rng())
    eps = (calls[0].x - x0) / calls[0].sigma.view(-1, 1, 1, 1)
    large = calls[0].sigma > 0.1  # below, float32 keeps too few digits of the noise
    assert float(eps[large].std()) == pytest.approx(1.0, abs=0.01)
    assert float(eps[large].mean()) == pytest.approx(0.0, abs=0.01)
    assert abs(float(torch.corrcoef(torch.stack([eps[large].flatten(), x0[large].flatten()]))[0, 1])) < 0.02


def test_matching_asks_levels_20_to_980_and_critic_and_gan_0_to_999():
    teacher, critic = toy_teacher(), critic_of()
    num = 15_000
    x0, cond = images(num), labels(num)
    with recorded(teacher.denoiser) as calls:
        losses.matching_gradient(x0, cond, teacher, critic, Train(), rng(1))
    assert_uniform(indices(calls[0].sigma), 20, 980)

    requested = []
    run = critic.fake.denoise_and_tap

    def spy(x: Tensor, sigma: Tensor, *args: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
        requested.append(sigma)
        return run(x, sigma, *args, **options)

    critic.fake.denoise_and_tap = spy
    with torch.no_grad():
        losses.critic_losses(x0, cond, lambda: (x0, cond), teacher, critic, Train(), rng(2))
    parts = [indices(part) for part in requested[0].split(num)]
    assert len(parts) == 3
    for part in parts:
        assert_uniform(part, 0, 999)
    correlations = np.corrcoef(np.stack(parts))[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 0.05, "fake score, D(gen) and D(data) draw levels of their own"
    requested.clear()
    losses.gan_gradient(x0, cond, teacher, critic, Train(), rng(3))
    assert_uniform(indices(requested[0]), 0, 999)


@pytest.mark.parametrize(("key", "low", "high"), [("matching_levels", 300, 301), ("gan_levels", 0, 2)])
def test_configured_levels_are_obeyed(key: str, low: int, high: int):
    teacher, critic = toy_teacher(), critic_of()
    train = Train(**{key: (low, high)})
    requested = []
    critic.register_forward_pre_hook(lambda _, inputs: requested.append(inputs[1]))
    call = losses.matching_gradient if key == "matching_levels" else losses.gan_gradient
    call(images(200), labels(200), teacher, critic, train, rng())
    assert set(indices(requested[0])) == set(range(low, high + 1))


class SetLogits:
    """A critic whose logits are given, whatever the images; their gradient on every pixel is that on the logit."""

    def __init__(self, logits: list[float]):
        self.logits = torch.tensor(logits)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any, *, num_denoise: int, logits_from: int) -> Any:
        moves = (x - x.detach()).flatten(1).sum(1)
        return None, self.logits + moves


def test_generator_gan_loss_and_gradient_equal_the_test_vector():
    logits = np.array([2.0, -1.0, 0.5])
    critic: Any = SetLogits(list(logits))
    loss, grad = losses.gan_gradient(images(3), labels(3), toy_teacher(), critic, Train(), rng())
    assert float(loss.loss) == pytest.approx(0.6380889, abs=1e-6)
    slope = (1 / (1 + np.exp(-logits)) - 1) / 3  # d mean softplus(-l) / d l
    expected = np.broadcast_to(slope[:, None, None, None], (3, *SHAPE))
    np.testing.assert_allclose(grad.numpy(), expected, rtol=1e-5)


def test_gan_gradient_equals_the_difference_quotient_and_leaves_no_gradient_on_the_critic():
    teacher, critic = wide(toy_teacher()), critic_of().double()
    head = critic.heads[0]
    head.forward = lambda features: torch.nn.Sequential.forward(head, features).flatten()  # stay double
    x0, cond, train = images(4, dtype=torch.float64), labels(4), Train(gan_levels=(300, 900))

    def loss_at(moved: Tensor) -> float:
        return float(losses.gan_gradient(moved, cond, teacher, critic, train, rng(5))[0].loss)

    _, grad = losses.gan_gradient(x0, cond, teacher, critic, train, rng(5))
    direction = torch.randn(x0.shape, generator=rng(6)).double()
    step = 1e-4
    slope = (loss_at(x0 + step * direction) - loss_at(x0 - step * direction)) / (2 * step)
    assert abs(slope) > 1e-6
    assert float((grad * direction).sum()) == pytest.approx(slope, rel=1e-5)
    assert all(p.grad is None for p in critic.parameters())
    assert all(p.requires_grad for p in critic.parameters())


def test_gan_gradient_runs_the_encoder_alone():
    critic = critic_of()
    decoded = []
    critic.fake.decoder.register_forward_hook(lambda _, inputs, __: decoded.append(len(inputs[0])))
    losses.gan_gradient(images(5), labels(5), toy_teacher(), critic, Train(), rng())
    assert sum(decoded) == 0


def test_matching_gives_no_gradient_to_any_network():
    teacher, critic = toy_teacher(), critic_of()
    generator = toy_teacher(2).copy_network()
    x0 = generator(80 * images(4), torch.full((4,), 80.0), labels(4))
    _, grad = losses.matching_gradient(x0.detach(), labels(4), teacher, critic, Train(), rng())
    x0.backward(grad)
    assert all(p.grad is None for network in (teacher.denoiser, critic) for p in network.parameters())
    assert all(float(p.grad.abs().sum()) > 0 for p in generator.parameters())


def test_matching_stands_still_where_both_scores_agree():
    teacher = toy_teacher(1)
    critic = critic_of(1, num_taps=0)
    loss, grad = losses.matching_gradient(images(4), labels(4), teacher, critic, Train(), rng())
    assert float(loss.loss) == 0
    assert not grad.any()


class RawDenoiser(ToyDenoiser):
    """The toy network as an epsilon prediction, x0 = x - sigma * out, which the loss kernels convert and guide."""

    predicts_x0 = False

    def predict_and_tap(
        self, x: Tensor, sigma: Tensor, cond: Cond, num_denoise: int, num_taps: int = 1
    ) -> tuple[Prediction, list[Tensor]]:
        x0, features = self.denoise_and_tap(x, sigma, cond, num_denoise, num_taps)
        x, sigma = x[:num_denoise], sigma[:num_denoise]
        return Prediction((x - x0) / expand(sigma, x), LinearHead(torch.ones_like(sigma), -sigma)), features


@pytest.mark.parametrize("keys", [{}, {"share_critic_pass": True}, {"share_levels": True, "matching_levels": (0, 999)}])
def test_raw_outputs_with_their_head_and_guidance_give_the_same_losses(keys: dict[str, Any]):
    """Guided at 8 as SDXL: x0 of teacher and critic is formed inside the kernels alone."""
    found = []
    for kind in (ToyDenoiser, RawDenoiser):
        teacher = toy_teacher(guidable=True)
        teacher = dataclasses.replace(teacher, denoiser=kind(0).eval().requires_grad_(False))
        critic = Critic(kind(1).train(), num_taps=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            critic.heads[0].apply(
                lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None
            )
        train = Train(guidance_scale=8.0, **keys)
        x0 = torch.randn(5, *SHAPE, generator=rng(1))
        matching, gan = losses.generator_terms(x0, labels(5), teacher, critic, train, rng(2))
        both = losses.critic_losses(x0, labels(5), lambda: (x0, labels(5)), teacher, critic, train, rng(3))  # noqa: B023
        both.backward()
        found.append([matching[0].loss, matching[1], gan[1], both.denoising.loss, critic.fake.encoder.weight.grad])
    for plain, raw in zip(*found, strict=True):
        torch.testing.assert_close(raw, plain, rtol=2e-3, atol=1e-5)
