"""A tiny EDM network in DMD2 training, with every part that a checkpoint must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from toy import SIZES, flat, shaken

from dmd2.config import Data, Network, TeacherConfig, Train
from dmd2.method.denoiser import Cond
from dmd2.method.distillation import Distillation
from dmd2.teachers.edm import load_edm

BATCH = 8
DATA = Data(source="digits", resolution=8, channels=1, num_classes=10)
NETWORK = Network(**SIZES)
FLAT = Network(**{**SIZES, "channel_mult": [1], "attn_resolutions": [8]})
"""Of one level, which halves the blocks to compile."""
TRAIN: dict[str, Any] = {
    "batch_size": BATCH,
    "iterations": 40,
    "num_snapshots": 1,
    "critic_steps_per_generator": 2,
    "generator_learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "gan_generator_weight": 0.1,
    "gan_critic_weight": 0.1,
    "ema_decay": 0.9,
    "warmup_iterations": 3,
}


def batches(rank: int, world: int) -> Any:
    """This rank's share of random batches."""

    def batch(index: int) -> tuple[Tensor, Cond]:
        rng = torch.Generator().manual_seed(index)
        x0 = torch.rand((BATCH, 1, 8, 8), generator=rng) * 2 - 1
        label = torch.randint(10, (BATCH,), generator=rng)
        return x0.chunk(world)[rank], {"label": label.chunk(world)[rank]}

    return batch


def distillation(rank: int = 0, world: int = 1, **keys: Any) -> Distillation:
    """A student in training; settings of the run in `train`, how its blocks run in `prepare`, others as they are."""
    prepare, network = keys.pop("prepare", {}), keys.pop("network", NETWORK)
    train = Train(**{**TRAIN, **keys.pop("train", {})})
    teacher = load_edm(TeacherConfig(kind="edm", network=network), DATA, None, seed=1)
    shaken(teacher.denoiser, 0.05, seed=2)
    run = Distillation(teacher, train, data=batches(rank, world), **keys)
    for part in (run.generator, run.critic.fake, run.teacher.denoiser):
        part.prepare(**prepare)
    return run


def whole(state: Any) -> dict[str, Any]:
    """The leaves of a state with sharded tensors gathered; a collective call."""
    leaves = flat(state)
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in leaves.items()}


def assert_close(one: dict[str, Any], other: dict[str, Any], *, rtol: float, atol: float) -> None:
    """Closeness of two states, leaf by leaf."""
    first, second = flat(one), flat(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(
                value, second[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
            )
        else:
            assert value == second[name], name


def results(folder: Path, world: int) -> list[dict[str, Any]]:
    """What the ranks stored."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
