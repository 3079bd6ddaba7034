"""Guided training in several steps on prompts, on one process or on ranks: a tiny pipeline of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from forked import join
from tiny import whole
from tiny_pipelines import tiny_data, tiny_teacher
from torch import Tensor

from dmd2.config import Train
from dmd2.method.denoiser import Cond
from dmd2.method.distillation import Distillation
from dmd2.teachers import load_teacher
from dmd2.training import ranks

BATCH = 4
CPU = torch.device("cpu")
PROMPTS = ["a cat", "a dog", "red photo of a cat", "a three left of a seven", "a seven right of a three"]
TRAIN: dict[str, Any] = {
    "batch_size": BATCH,
    "iterations": 40,
    "num_snapshots": 1,
    "num_steps": 4,
    "guidance_scale": 4.0,
    "critic_steps_per_generator": 2,
    "generator_learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "gan_generator_weight": 0.1,
    "gan_critic_weight": 0.1,
    "ema_decay": 0.9,
    "warmup_iterations": 2,
}


def distillation(kind: str, folder: Path, rank: int = 0, world: int = 1, **keys: Any) -> Distillation:
    """A student of the pipeline in `folder`, with this rank's share of images and of prompts of their own."""
    teacher = load_teacher(tiny_teacher(kind, folder), tiny_data())
    tokenize = teacher.conditioner.tokenize

    def prompts(index: int) -> tuple[Tensor, Cond]:
        ids = (torch.arange(BATCH) + 3 * index) % len(PROMPTS)
        own = ids.chunk(world)[rank]
        return own, tokenize([PROMPTS[i] for i in own.tolist()])

    def data(index: int) -> tuple[Tensor, Cond]:
        x0 = torch.randn(BATCH, *teacher.sample_shape, generator=torch.Generator().manual_seed(index))
        captions = [PROMPTS[(index + i) % len(PROMPTS)] for i in range(BATCH)]
        share = BATCH // world
        return x0.chunk(world)[rank], tokenize(captions[rank * share : (rank + 1) * share])

    return Distillation(teacher, Train.model_validate(TRAIN), data=data, prompts=prompts, **keys)


def trained(rank: int, world: int, port: int, out: Path, num: int, folders: dict[str, Path]) -> None:
    """The whole state after `num` iterations on each kind of pipeline."""
    join(rank, world, port)
    with ranks.process_group(CPU):
        found = {}
        for kind, folder in folders.items():
            run = distillation(kind, folder, rank, world)
            for index in range(num):
                run.step(index)
            found[kind] = whole(run.state_dict())
        torch.save(found, out / f"{rank}.pt")
