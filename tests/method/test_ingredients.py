"""SiD's loss and power-function averages of the generator, as switches of a run."""

import pytest
import torch
from test_switches import BATCH, distillation
from toy import SHAPE, assert_equal, labels, rng

from dmd2.config import Train
from dmd2.method import losses
from dmd2.method.noise import add_noise, expand


def test_sid_has_the_gradient_of_its_loss_through_teacher_and_critic():
    run = distillation(levels=3, sid_alpha=1.2, matching_levels=(0, 2))
    run.teacher.denoiser.double(), run.critic.double()
    x0, cond = torch.randn(BATCH, *SHAPE, generator=rng(0)).double(), labels(BATCH)
    found, grad = losses.matching_gradient(x0, cond, run.teacher, run.critic, run.train, rng(1))

    same = rng(1)
    sigma = run.teacher.grid.draw(BATCH, 0, 2, same)
    eps = torch.randn(x0.shape, generator=same)

    def loss(x0: torch.Tensor) -> torch.Tensor:
        x = add_noise(x0, sigma, eps)
        real, fake = run.teacher.denoiser(x, sigma, cond), run.critic.fake(x, sigma, cond)
        return ((real - fake) * (real - x0 - 1.2 * (real - fake)) / expand(found.weight, x0)).mean()

    torch.testing.assert_close(found.loss, loss(x0).detach())
    direction = torch.randn(x0.shape, generator=rng(2)).double()
    step = 1e-4 / direction.norm()
    with torch.no_grad():
        slope = (loss(x0 + step * direction) - loss(x0 - step * direction)) / (2 * step)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-4, atol=0)
    detached = ((run.teacher.denoiser(add_noise(x0, sigma, eps), sigma, cond)) - x0).abs().flatten(1).mean(1)
    torch.testing.assert_close(found.weight, detached.detach())
    networks = (run.teacher.denoiser, run.critic)
    assert all(p.grad is None for network in networks for p in network.parameters()), "their weights get no gradient"


def test_sid_trains_the_generator_alone_with_the_matching_loss():
    run = distillation(sid_alpha=1.2, matching_levels=(0, 0))
    before = [p.detach().clone() for p in run.generator.parameters()]
    metrics = run.step(0)
    assert {"matching_loss", "gan_generator_loss", "denoising_loss"} <= metrics.keys()
    assert any(not torch.equal(a, b) for a, b in zip(before, run.generator.parameters(), strict=True))


def test_power_function_averages_survive_a_checkpoint_and_follow_the_generator():
    keys = {"ema_lengths": (0.05, 0.1), "critic_steps_per_generator": 1, "matching_levels": (0, 0)}
    run, other = distillation(**keys), distillation(**keys)
    history = []
    for index in range(4):
        run.step(index)
        history.append(run.generator.state_dict()["encoder.weight"].clone())
        if index == 1:
            other.load_state_dict(run.state_dict())
    for index in (2, 3):
        other.step(index)
    assert run.averages().keys() == {"-ema0.05", "-ema0.1"}
    for suffix, state in run.averages().items():
        assert_equal(other.averages()[suffix], state)
        assert not torch.equal(state["encoder.weight"], history[-1])
    gamma = 6.94  # of width 0.1: the average after t updates has (1 - 1 / t)^(gamma + 1) of the one before
    mean = history[0]
    for number, value in enumerate(history[1:], start=2):
        mean = torch.lerp(value, mean, (1 - 1 / number) ** (gamma + 1))
    torch.testing.assert_close(run.averages()["-ema0.1"]["encoder.weight"], mean, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"sid_alpha": 1.2, "matching_weight": 0}, "sid_alpha needs a matching_weight above 0"),
        ({"ema_lengths": (0.1, 0.05)}, r"ema_lengths \[0.1, 0.05\] must ascend from above 0"),
        ({"ema_lengths": (0.1, 0.3)}, "must be below 0.288, the width of a plain mean"),
    ],
)
def test_contradictions_are_refused(keys: dict, words: str):
    with pytest.raises(ValueError, match=words):
        Train(**keys)


def test_neither_is_in_a_digest_by_default():
    assert not {"sid_alpha", "ema_lengths"} & Train().model_dump(exclude_none=True).keys()
