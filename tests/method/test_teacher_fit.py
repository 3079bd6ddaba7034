"""Training of a small teacher: EDM's loss is 1 for the best linear denoiser of Gaussian data, and that is checked."""

from typing import Any

import pytest
import torch
from torch import Tensor
from toy import NUM_CLASSES, SHAPE, SIGMA_DATA, recorded, rng, toy_teacher

from dmd2.config import TeacherTraining
from dmd2.method.teacher_fit import TeacherFit


def gaussian(index: int, num: int = 4000) -> tuple[Tensor, dict[str, Tensor]]:
    label = torch.randint(NUM_CLASSES, (num,), generator=rng(index))
    return SIGMA_DATA * torch.randn(num, *SHAPE, generator=rng(1000 + index)), {"label": label}


def fit(teacher: Any = None, **keys: Any) -> TeacherFit:
    usual = {"iterations": 100, "batch_size": 4000, "learning_rate": 1e-3, "warmup_iterations": 0}
    return TeacherFit(teacher or toy_teacher(), TeacherTraining(**{**usual, **keys}), gaussian)


def test_loss_of_the_preconditioning_alone_on_gaussian_data_is_one():
    # D = c_skip x is E[x0 | x] for x0 ~ N(0, sigma_data^2), and lambda(sigma) E|D - x0|^2 = 1 at every sigma.
    trainee = fit()
    for p in trainee.network.decoder.parameters():
        p.data.zero_()
    # 64,000 squares of unit variance 2: standard error 0.0056.
    assert float(trainee.step(0)["denoising_loss"]) == pytest.approx(1.0, abs=0.03)


def test_noise_levels_are_log_normal_and_conditions_go_with_their_images():
    trainee = fit()
    with recorded(trainee.network) as calls:
        trainee.step(3)
    log = calls[0].sigma.log()
    assert float(log.mean()) == pytest.approx(-1.2, abs=0.08)
    assert float(log.std()) == pytest.approx(1.2, abs=0.06)
    x0, cond = gaussian(3)
    assert torch.equal(calls[0].cond["label"], cond["label"])
    eps = (calls[0].x - x0) / calls[0].sigma.view(-1, 1, 1, 1)
    assert float(eps.std()) == pytest.approx(1, abs=0.02)
    assert abs(float(torch.corrcoef(torch.stack([eps.flatten(), x0.flatten()]))[0, 1])) < 0.02


def test_training_lowers_the_loss_towards_the_best_denoiser():
    trainee = fit(learning_rate=2e-2)
    trainee.network.decoder.weight.data.mul_(5)
    first = float(trainee.step(0)["denoising_loss"])
    for index in range(1, 100):
        last = float(trainee.step(index)["denoising_loss"])
    assert first > 1.2
    assert last < 1.06


def test_every_step_moves_the_average_with_its_ramp():
    trainee = fit(ema_decay=0.5)
    mean = trainee.network.encoder.weight.detach().double().clone()
    for index in range(6):
        trainee.step(index)
        decay = min(0.5, (1 + index) / (10 + index))
        mean = decay * mean + (1 - decay) * trainee.network.encoder.weight.detach().double()
    torch.testing.assert_close(trainee.export()["encoder.weight"].double(), mean, rtol=1e-5, atol=1e-7)


def test_dropout_too_is_a_function_of_seed_and_step():
    losses = []
    for disturbance in (1, 2):
        trainee = fit(toy_teacher(dropout=0.5))
        torch.manual_seed(disturbance)
        losses.append([float(trainee.step(index)["denoising_loss"]) for index in range(2)])
    assert losses[0] == losses[1]
    plain = fit()
    assert float(plain.step(0)["denoising_loss"]) != losses[0][0], "dropout is off"
