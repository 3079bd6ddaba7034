"""The whole method on a teacher that is known in closed form: a student must find the modes of a mixture."""

import pytest
import torch
from torch import Tensor

from dmd2.config import Train
from dmd2.method.distillation import Distillation
from dmd2.method.sampling import few_step
from dmd2.teachers.mixture import GaussianMixture, mixture_teacher
from dmd2.training.rng import SampleNoise, step_rng

SHAPE = (2, 1, 1)
STD = 0.15
MEANS = torch.tensor([[[0.6, 0.6], [-0.6, 0.4]], [[0.7, -0.6], [-0.5, -0.5]]])
WEIGHTS = torch.tensor([[0.6, 0.4], [0.3, 0.7]])


def samples(run: Distillation, num: int = 4000) -> tuple[Tensor, Tensor]:
    label = torch.arange(num) % 2
    run.generator.load_state_dict(run.export())
    noise = SampleNoise(0, range(num), SHAPE)
    return few_step(run.generator, {"label": label}, run.steps, noise).flatten(1), label


def modes(x0: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Share of each mode among its class's samples (2, 2), and of samples within three deviations of a mode."""
    distance = (x0[:, None] - MEANS[label]).norm(dim=-1)
    nearest = distance.argmin(1)
    shares = torch.stack([torch.bincount(nearest[label == c], minlength=2) / int((label == c).sum()) for c in (0, 1)])
    return shares, (distance.min(1).values < 3 * STD).float().mean()


MIXTURE = GaussianMixture(MEANS, torch.full((2, 2), STD), WEIGHTS)


def data(index: int) -> tuple[Tensor, dict[str, Tensor]]:
    rng = step_rng(7, index)
    label = torch.randint(2, (64,), generator=rng)
    return MIXTURE.sample(label, rng).view(64, *SHAPE), {"label": label}


@pytest.mark.parametrize(
    ("gan_generator_weight", "gan_critic_weight", "iterations"),
    [(0, 0, 600), (3e-3, 1e-2, 1200)],
    ids=["no GAN", "GAN"],
)
def test_student_finds_both_modes_of_each_class_in_their_shares(
    gan_generator_weight: float, gan_critic_weight: float, iterations: int
):
    teacher = mixture_teacher(MIXTURE, SHAPE)
    train = Train(
        batch_size=64,
        num_snapshots=1,
        warmup_iterations=20,
        generator_learning_rate=2e-3,
        critic_learning_rate=2e-3,
        gan_generator_weight=gan_generator_weight,
        gan_critic_weight=gan_critic_weight,
        ema_decay=0.95,
    )
    run = Distillation(teacher, train, data=data)
    x0, label = samples(run)
    shares, _ = modes(x0, label)
    assert float(shares.max(1).values.min()) > 0.99, "one step of the teacher itself gives the mean of each class"
    assert float(x0[label == 0].std(0).max()) < 0.02

    for index in range(iterations):
        run.step(index)
    run.guard.raise_if_tripped()
    x0, label = samples(run)
    shares, close = modes(x0, label)
    torch.testing.assert_close(shares, WEIGHTS, rtol=0, atol=0.1)
    assert float(close) > 0.7
    for c in (0, 1):
        torch.testing.assert_close(x0[label == c].mean(0), WEIGHTS[c] @ MEANS[c], rtol=0, atol=0.1)
