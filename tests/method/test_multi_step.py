"""Students of several steps in training: backward simulation, and what replaces it where it is off."""

from typing import Any

import pytest
import torch
from torch import Tensor
from toy import NUM_CLASSES, SHAPE, recorded, rng, toy_teacher

from dmd2.config import Train
from dmd2.method.distillation import Distillation
from dmd2.method.noise import NoiseGrid

SIGMAS = list(NoiseGrid.karras().student_steps(4).sigmas)


def data(index: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Images that no noise hides: sample b of batch `index` is everywhere 1e6 (b + 1)."""
    values = 1e6 * torch.arange(1.0, 65)
    return values.view(-1, 1, 1, 1).expand(-1, *SHAPE).clone(), {"label": torch.arange(64) % NUM_CLASSES}


def distillation(**keys: Any) -> Distillation:
    usual = {"batch_size": 64, "num_snapshots": 1, "num_steps": 4, "gan_generator_weight": 0, "gan_critic_weight": 0}
    return Distillation(toy_teacher(), Train(**{**usual, **keys}), data=data)


def drawn_steps(num: int, **keys: Any) -> tuple[list[int], list[Tensor]]:
    """The student's step at each iteration, and the noise level 0 inputs."""
    run = distillation(**keys)
    steps, inputs = [], []
    for index in range(num):
        with recorded(run.generator) as calls:
            run.step(index)
        trained = calls[-1]
        assert len(set(trained.sigma.tolist())) == 1, "one step for the whole batch"
        steps.append(SIGMAS.index(float(trained.sigma[0])))
        assert [float(call.sigma[0]) for call in calls] == SIGMAS[: steps[-1] + 1]
        inputs.append(calls[0].x)
    return steps, inputs


def test_backward_simulation_draws_one_step_for_the_batch_and_all_ranks(monkeypatch: pytest.MonkeyPatch):
    steps, inputs = drawn_steps(40)
    assert set(steps) == {0, 1, 2, 3}
    monkeypatch.setenv("RANK", "1")
    other_steps, other_inputs = drawn_steps(40)
    assert other_steps == steps
    assert not any(torch.equal(a, b) for a, b in zip(inputs, other_inputs, strict=True)), "ranks draw their own noise"
    monkeypatch.delenv("RANK")
    reseeded, _ = drawn_steps(40, seed=11)
    assert reseeded != steps


def test_backward_simulation_draws_every_step_equally_often():
    run = distillation(batch_size=1)
    seen = torch.zeros(4)
    for index in range(800):
        _, sigma, _ = run._generator_input(index, 0, rng(index))
        seen[SIGMAS.index(float(sigma[0]))] += 1
    assert float((seen - 200).abs().max()) < 5 * 200**0.5


def test_backward_simulation_feeds_the_students_own_noised_estimate():
    run = distillation()
    index = next(i for i in range(20) if drawn(run, i) == 2)
    with recorded(run.generator) as calls:
        run.step(index)
    first, second, trained = calls
    for made, fed in ((first, second), (second, trained)):
        eps = (fed.x - made.output) / fed.sigma.view(-1, 1, 1, 1)
        assert float(eps.mean()) == pytest.approx(0, abs=0.15)
        assert float(eps.std()) == pytest.approx(1, abs=0.1)
        assert torch.equal(made.cond["label"], fed.cond["label"])
        assert not made.output.requires_grad


def drawn(run: Distillation, index: int) -> int:
    return SIGMAS.index(float(run._generator_input(index, 0, rng())[1][0]))


def test_without_backward_simulation_inputs_are_noised_data_with_their_conditions():
    run = distillation(backward_simulation=False)
    with recorded(run.generator) as calls:
        run.step(0)
    (call,) = calls
    x0, cond = data(0)
    assert torch.equal(call.cond["label"], cond["label"])
    steps = torch.tensor([SIGMAS.index(float(sigma)) for sigma in call.sigma])
    assert set(steps.tolist()) == {0, 1, 2, 3}, "a step of its own for each sample"
    first = steps == 0
    assert float(call.x[first].abs().max()) < 80 * 6, "pure noise: no trace of the data at the first level"
    assert float(call.x[first].std()) == pytest.approx(80, rel=0.15)
    away = (call.x - x0)[~first] / call.sigma[~first].view(-1, 1, 1, 1)
    assert float(away.abs().max()) < 10


def test_noised_data_is_the_forward_process():
    x0 = torch.randn(64, *SHAPE, generator=rng(5))
    run = distillation(backward_simulation=False)
    run._data = lambda index, part: (x0, {"label": torch.zeros(64, dtype=torch.int64)})
    x, sigma, _ = run._generator_input(0, 0, rng(1))
    eps = (x - x0) / sigma.view(-1, 1, 1, 1)
    for level in SIGMAS[1:]:
        here = eps[sigma == level]
        assert float(here.std()) == pytest.approx(1, abs=0.15)
        assert float(here.mean()) == pytest.approx(0, abs=0.2)


def test_a_student_of_one_step_asks_for_no_data_without_a_gan():
    train = Train(batch_size=4, num_snapshots=1, gan_generator_weight=0, gan_critic_weight=0)
    run = Distillation(toy_teacher(), train)
    assert set(run.step(0)) >= {"matching_loss", "denoising_loss"}
