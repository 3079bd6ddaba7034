"""NaN in the data and losses that explode: the run stops before the update, says where, and keeps what was good."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import DIGEST, assert_equal
from trainees import SHAPE, Source, distillation, mixture

from dmd2.config import Runtime, TeacherTraining
from dmd2.errors import UserError
from dmd2.method.distillation import Distillation
from dmd2.method.teacher_fit import TeacherFit
from dmd2.teachers.mixture import mixture_teacher
from dmd2.training.checkpoint_store import CheckpointStore
from dmd2.training.loop import fit

RARELY = Runtime(log_every=10, checkpoint_every=4)  # the host looks some steps after the bad one


class Spoilt(Source):
    """A source whose batch `at` has one NaN."""

    def __init__(self, manifest: Path, at: int):
        super().__init__(manifest)
        self.at = at

    def __call__(self, index: int) -> Any:
        x0, cond = super().__call__(index)
        if index == self.at:
            x0 = x0.clone()
            x0[3, 0, 1, 1] = float("nan")
        return x0, cond


def fitted(folder: Path, run: Any, iterations: int = 30) -> CheckpointStore:
    with CheckpointStore(folder, DIGEST) as store:
        fit(run, iterations, store, RARELY, title="test")
    return store


def networks(run: Distillation) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.networks().items()}


def after(num_steps: int, latents: Path, **keys: Any) -> Distillation:
    run = distillation(Source(latents), **keys)
    for index in range(num_steps):
        run.step(index)
    return run


def test_nan_in_the_data_stops_before_the_update_and_keeps_the_last_checkpoint(latents: Path, tmp_path: Path):
    run = distillation(Spoilt(latents, at=5))
    with pytest.raises(UserError, match=r"^step 6: gan_critic_loss, critic_grad_norm not finite") as error:
        fitted(tmp_path, run)
    assert "check the data for NaN" in str(error.value)
    good = after(5, latents)
    assert_equal(networks(run), networks(good))  # iteration 6 moves no generator, 7 would: neither happened
    with CheckpointStore(tmp_path, DIGEST) as store:
        found = store.load()
    assert found is not None
    assert found[1]["step"] == 4
    assert_equal(found[0], after(4, latents).state_dict())


def test_run_with_its_data_repaired_goes_on_to_where_it_would_have_come(latents: Path, tmp_path: Path):
    with pytest.raises(UserError, match="step 6"):
        fitted(tmp_path, distillation(Spoilt(latents, at=5)))
    repaired = distillation(Source(latents))
    fitted(tmp_path, repaired, 12)
    assert_equal(networks(repaired), networks(after(12, latents)))


def test_no_snapshot_is_exported_after_a_bad_step(latents: Path, tmp_path: Path):
    with CheckpointStore(tmp_path, DIGEST) as store, pytest.raises(UserError, match="step 2"):
        fit(distillation(Spoilt(latents, at=1)), 10, store, RARELY, title="test", snapshots=[1, 2, 5])
    assert [path.name for path in tmp_path.glob("snapshot-*")] == ["snapshot-00000001.safetensors"]


def test_exploding_loss_stops_with_finite_weights(latents: Path, tmp_path: Path):
    run = distillation(Source(latents), critic_learning_rate=1e25, warmup_iterations=0)
    with pytest.raises(UserError, match=r"^step [2-4]: .*(loss|norm).* not finite.*Lower the learning rate"):
        fitted(tmp_path, run)
    assert all(bool(value.isfinite().all()) for value in networks(run).values())
    assert list(tmp_path.glob("step-*")) == [], "no checkpoint of a broken state"


def test_nan_in_the_critic_is_noticed_though_the_matching_gradient_is_sanitised(latents: Path):
    run = distillation(None, gan_generator_weight=0, gan_critic_weight=0)
    run.critic.fake.last.bias.data[0] = float("nan")  # type: ignore[union-attr]
    before = networks(run)
    metrics = run.step(0)
    assert float(metrics["num_nonfinite"]) > 0
    with pytest.raises(UserError, match="step 1: denoising_loss"):
        run.guard.raise_if_tripped()
    critic = {name: value for name, value in networks(run).items() if name.startswith("critic.fake.first")}
    assert_equal(critic, {name: before[name] for name in critic})


def test_nan_in_a_teachers_data_stops_its_training(tmp_path: Path):
    def data(index: int) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = torch.zeros(4, *SHAPE)
        if index == 3:
            x0[0] = float("nan")
        return x0, {"label": torch.zeros(4, dtype=torch.int64)}

    training = TeacherTraining(iterations=10, batch_size=4)
    trainee = TeacherFit(mixture_teacher(mixture(), SHAPE), training, data)
    with pytest.raises(UserError, match=r"^step 4: denoising_loss, grad_norm not finite"):
        fitted(tmp_path, trainee, 10)
    assert all(bool(p.isfinite().all()) for p in trainee.network.parameters())
