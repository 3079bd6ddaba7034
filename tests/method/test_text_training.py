"""Training on prompts: what reaches the networks of a text-to-image run, on a tiny pipeline."""

from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_data, tiny_teacher, write_pipeline
from torch import Tensor
from toy import assert_equal, recorded

from dmd2.config import DiffusersTraining, Train
from dmd2.errors import UserError
from dmd2.method.denoiser import Cond, Teacher
from dmd2.method.distillation import Distillation
from dmd2.method.teacher_fit import TeacherFit
from dmd2.teachers import load_teacher

PROMPTS = ["a cat", "a dog", "red photo of a cat", "a three left of a seven"]
BATCH = 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = write_pipeline("sd15", tmp_path_factory.mktemp("sd15") / "model")
    return load_teacher(tiny_teacher("sd15", folder), tiny_data())


def distillation(teacher: Teacher, **keys: Any) -> Distillation:
    tokens = teacher.conditioner.tokenize(PROMPTS)
    x0 = torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    usual = {"batch_size": BATCH, "num_snapshots": 1, "guidance_scale": 8.0, "warmup_iterations": 0}
    return Distillation(
        teacher,
        Train.model_validate(usual | keys),
        data=lambda index: (x0, tokens),
        pairs=lambda index: (x0, 0.5 * x0, tokens),
        prompts=lambda index: (torch.arange(BATCH), {name: value.roll(index, 0) for name, value in tokens.items()}),
    )


def test_generator_gets_the_prompts_of_its_batch_and_the_teacher_the_empty_one_too(teacher: Teacher):
    run = distillation(teacher)
    wanted = teacher.conditioner.embed(teacher.conditioner.tokenize(PROMPTS[-1:] + PROMPTS[:-1]))["text"]
    seen: list[Cond] = []
    original = run.teacher.denoiser.predict_and_tap
    run.teacher.denoiser.predict_and_tap = lambda *given, **keys: (seen.append(given[2]), original(*given, **keys))[1]  # type: ignore[method-assign]
    try:
        run.step(0)
        with recorded(run.generator) as calls:
            run.step(1)
    finally:
        del run.teacher.denoiser.predict_and_tap
    torch.testing.assert_close(calls[0].cond["text"], wanted)
    empty = teacher.conditioner.embed(teacher.conditioner.tokenize([""]))["text"]
    assert seen[0]["text"].shape[0] == 2 * BATCH, "null and conditional inputs in one batch"
    torch.testing.assert_close(seen[0]["text"][:BATCH], empty.expand(BATCH, -1, -1))


def test_a_student_at_level_399_gets_unit_gaussians_at_its_sigma(teacher: Teacher):
    run = distillation(teacher, student_levels=[399], batch_size=BATCH)
    with recorded(run.generator) as calls:
        run.step(1)
    sigma = float(run.teacher.grid.sigmas[399])
    assert sigma == pytest.approx(1.1605788, rel=2e-5)
    assert calls[0].sigma.tolist() == pytest.approx([sigma] * BATCH)
    unit = calls[0].x / (1 + sigma**2) ** 0.5
    assert float(unit.std()) == pytest.approx(1.0, abs=0.1)


def test_regression_alone_moves_the_generator_and_nothing_else(teacher: Teacher):
    run = distillation(
        teacher, matching_weight=0, gan_generator_weight=0, gan_critic_weight=0, regression_weight=1,
        critic_steps_per_generator=1, student_levels=[399], generator_learning_rate=1e-3,
    )  # fmt: skip
    before = {name: value.clone() for name, value in run.networks().items()}
    losses = [float(run.step(index)["regression_loss"]) for index in range(5)]
    assert losses[-1] < losses[0]
    after = run.networks()
    assert_equal(*({k: v for k, v in state.items() if k.startswith("critic.")} for state in (before, after)))
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("generator."))


def test_prompts_are_required(teacher: Teacher):
    with pytest.raises(UserError, match="takes prompts: set `prompts` of the preset"):
        Distillation(teacher, Train(batch_size=BATCH, gan_generator_weight=0, gan_critic_weight=0))


def test_text_teacher_is_trained_on_uniform_levels_with_some_captions_dropped(teacher: Teacher):
    components = {
        "autoencoder": {},
        "autoencoder_iterations": 1,
        "text_encoder": {"hidden_size": 16},
        "text_iterations": 1,
    }
    training = DiffusersTraining.model_validate(
        {"iterations": 10, "batch_size": 64, "caption_dropout": 0.25, "components": components}
    )
    tokens = teacher.conditioner.tokenize(PROMPTS * 16)
    fit = TeacherFit(teacher, training, lambda index: (torch.randn(64, 4, 8, 8), tokens))
    with recorded(fit.network) as calls:
        for index in range(6):
            fit.step(index)
    sigmas = torch.cat([call.sigma for call in calls])
    levels = torch.searchsorted(teacher.grid.sigmas, sigmas)
    assert levels.float().mean() == pytest.approx(499.5, abs=60)
    empty = teacher.conditioner.embed(teacher.conditioner.tokenize([""]))["text"][0]
    dropped = torch.cat([(call.cond["text"] == empty).flatten(1).all(1) for call in calls])
    assert 0.15 < float(dropped.float().mean()) < 0.35


def test_the_epsilon_loss_is_the_weighted_x0_loss(teacher: Teacher):
    """x0 = x - sigma * out, so sigma^-2 |x0_hat - x0|^2 = |out - eps|^2."""
    generator = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(BATCH, 4, 8, 8, generator=generator) for _ in range(2))
    sigma = teacher.grid.sigmas[torch.tensor([20, 300, 600, 980])]
    cond = teacher.conditioner.embed(teacher.conditioner.tokenize(PROMPTS))
    x = x0 + sigma.view(-1, 1, 1, 1) * eps
    prediction: Tensor = teacher.denoiser.predict_and_tap(x, sigma, cond, BATCH, 0)[0].out
    weighted = ((teacher.denoiser(x, sigma, cond) - x0).square().flatten(1).mean(1) / sigma**2).double()
    by_hand = (prediction - eps).square().flatten(1).mean(1).double()
    torch.testing.assert_close(weighted, by_hand, rtol=2e-3, atol=1e-4)
