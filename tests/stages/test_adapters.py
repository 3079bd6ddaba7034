"""DMD2 with low-rank adapters on one frozen network: what a training step changes, resumes and exports."""

import copy
from typing import Any

import pytest
import torch
from tiny_pipelines import KINDS, LATENT, tiny_data, tiny_teacher, write_pipeline
from torch import Tensor

from dmd2 import config
from dmd2.errors import UserError
from dmd2.method.denoiser import Teacher
from dmd2.method.distillation import Distillation
from dmd2.stages.train import adapted_networks
from dmd2.teachers import load_teacher
from dmd2.teachers.diffusers_unet import DiffusersDenoiser
from dmd2.teachers.lora import Role
from dmd2.training.rng import normal, step_rng

LORA = config.LoRA(rank=2, alpha=2.0)
BOTH = {"generator_lora": LORA, "critic_lora": LORA}
CAPTIONS = ["a red cat", "three left", "dog", "a photo of a seven"]


@pytest.fixture(scope="module", params=KINDS)
def frozen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = write_pipeline(request.param, tmp_path_factory.mktemp(request.param))
    return load_teacher(tiny_teacher(request.param, folder), tiny_data())


def run_of(frozen: Teacher, recompute: bool = False, **adapters: config.LoRA) -> Distillation:
    settings: dict[str, Any] = {"batch_size": 4, "iterations": 8, "num_snapshots": 1, "warmup_iterations": 0}
    settings |= {"num_steps": 4, "guidance_scale": 2.0, "critic_steps_per_generator": 2, "ema_decay": 0.5}
    rates = {"generator_learning_rate": 1e-2, "critic_learning_rate": 1e-2}
    train = config.Train(**settings, **rates, **adapters)
    teacher, networks = adapted_networks(copy.deepcopy(frozen), train)
    tokens = teacher.conditioner.tokenize(CAPTIONS)

    def data(index: int) -> tuple[Tensor, Any]:
        return normal((4, *LATENT), step_rng(7, index)), tokens

    def prompts(index: int) -> tuple[Tensor, Any]:
        return torch.arange(4), tokens

    run = Distillation(teacher, train, data=data, prompts=prompts, networks=networks)
    for network in (run.generator, run.critic.fake):
        network.prepare(activation_checkpointing=recompute)
    return run


def test_only_adapters_and_heads_are_trained(frozen: Teacher) -> None:
    run = run_of(frozen, **BOTH)
    assert isinstance(run.teacher.denoiser, Role)
    network = run.teacher.denoiser.shared.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for index in range(3):
        run.step(index)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    assert all(".lora_" in name or name.startswith("critic.heads.") for name in run.networks())
    assert len(list(run.critic.heads.parameters())) > 0


def test_a_full_critic_is_a_copy_of_its_own(frozen: Teacher) -> None:
    """As released: adapters of the generator, a critic with all its weights."""
    run = run_of(frozen, generator_lora=LORA)
    assert isinstance(run.critic.fake, DiffusersDenoiser)
    before = {name: value.clone() for name, value in run.critic.fake.state_dict().items()}
    plain = frozen.denoiser.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in before.items())
    run.step(0)
    after = run.critic.fake.state_dict()
    assert list(after) == list(plain)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert isinstance(run.teacher.denoiser, Role)
    shared = run.teacher.denoiser.shared.network.state_dict()
    assert all(torch.equal(shared[name], value) for name, value in plain.items() if name in shared)


def test_recomputed_activations_train_the_same_adapters_bit_for_bit(frozen: Teacher) -> None:
    states = []
    for recompute in (False, True):
        run = run_of(frozen, recompute, **BOTH)
        for index in range(2):
            run.step(index)
        states.append(run.networks())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_resumed_run_repeats_the_uninterrupted_one(frozen: Teacher) -> None:
    whole = run_of(frozen, **BOTH)
    for index in range(4):
        if index == 2:
            state = copy.deepcopy(whole.state_dict())
        whole.step(index)
    resumed = run_of(frozen, **BOTH)
    resumed.load_state_dict(state)
    for index in (2, 3):
        resumed.step(index)
    found, truth = resumed.networks(), whole.networks()
    assert all(torch.equal(found[name], truth[name]) for name in truth)


def test_the_export_is_a_whole_network_with_the_averaged_adapters(frozen: Teacher) -> None:
    run = run_of(frozen, **BOTH)
    for index in range(3):
        run.step(index)
    student = frozen.copy_network().eval()
    student.load_state_dict(run.export())
    cond = frozen.conditioner.embed(frozen.conditioner.tokenize(CAPTIONS))
    x, sigma = normal((4, *LATENT), step_rng(0, 0)) * 3, frozen.grid.sigmas[[249, 499, 749, 999]]
    live = run.generator(x, sigma, cond)
    assert (student(x, sigma, cond) - live).abs().max() > 1e-4, "the average lags behind"
    run.generator.load_state_dict(run.ema.weights())
    torch.testing.assert_close(student(x, sigma, cond), run.generator(x, sigma, cond), rtol=1e-3, atol=1e-3)
    assert (student(x, sigma, cond) - frozen.denoiser(x, sigma, cond)).abs().max() > 1e-3


def test_adapters_need_a_network_of_diffusers() -> None:
    data = config.Data(source="digits", resolution=8, channels=1, num_classes=3)
    teacher = load_teacher(config.TeacherConfig(kind="mixture"), data)
    with pytest.raises(UserError, match="need a teacher of kind diffusers"):
        adapted_networks(teacher, config.Train(generator_lora=LORA))
