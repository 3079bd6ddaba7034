"""What the ranks of the distributed tests do, each in a process of its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from forked import join
from torch import Tensor, nn
from toy import DIGEST
from trainees import BATCH, RUNTIME, Source, distillation

from dmd2.errors import Interrupted
from dmd2.method import distillation as distillation_module
from dmd2.method import losses
from dmd2.method.noise import NoiseGrid
from dmd2.teachers.pixels import ClassConditioner
from dmd2.training import micro_batches, ranks
from dmd2.training import rng as rng_module
from dmd2.training.checkpoint_store import CheckpointStore
from dmd2.training.loop import fit
from dmd2.training.optimizer import FiniteGuard, Optimizer, warmup

CPU = torch.device("cpu")


def collectives(rank: int, world: int, port: int, out: Path) -> None:
    """Averages, notices and an update whose loss is this rank's half of a batch."""
    join(rank, world, port)
    with ranks.process_group(CPU):
        tensors = [torch.full((2, 3), float(rank)), torch.tensor(10.0 * rank)]
        ranks.average(tensors)
        notices = ranks.AsyncFlags()
        found = [
            notices(0, rank),
            notices(5 * rank, 10 + rank),
            notices(0, 0),
            notices(12 - rank, 9 + rank, now=True),
        ]
        torch.save({"average": tensors, "notices": found, "update": update(rank, world)}, out / f"{rank}.pt")


def update(rank: int, world: int) -> Tensor:
    """Three updates of a linear model on this rank's share of 12 samples: its weights."""
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.copy_(torch.arange(4.0))
        model.bias.zero_()
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    mine = x.chunk(world)[rank]
    descent = Optimizer(
        model,
        learning_rate=0.1,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        grad_clip=0.5,
        rate=warmup(0),
    )
    for index in range(3):
        (model(mine) - mine.sum(1, keepdim=True)).square().mean().backward()
        descent.step(index, FiniteGuard(CPU), {}, "norm")
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def share_randomness(rank: int, world: int) -> None:
    """Lets this rank see its part of the numbers that one process would draw for the whole batch."""

    def part(whole: Tensor) -> Tensor:
        return whole.chunk(world)[rank]

    normal, draw, labels, step_rng = rng_module.normal, NoiseGrid.draw, ClassConditioner.draw, rng_module.step_rng

    def shared_normal(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        return part(normal((shape[0] * world, *shape[1:]), rng))

    def shared_rng(seed: int, step: int, rank: int = 0, **options: Any) -> torch.Generator:
        return step_rng(seed, step, rank if rank == rng_module.SHARED else 0, **options)

    for module in (distillation_module, losses):
        module.normal = shared_normal
    micro_batches.step_rng = shared_rng
    NoiseGrid.draw = lambda self, num, *rest: part(draw(self, num * world, *rest))  # type: ignore[method-assign]
    ClassConditioner.draw = lambda self, num, rng: {  # type: ignore[method-assign]
        name: part(value) for name, value in labels(self, num * world, rng).items()
    }


def steps(rank: int, world: int, port: int, out: Path, manifest: Path, num: int) -> None:
    """`num` iterations of a whole distillation; its state."""
    join(rank, world, port)
    share_randomness(rank, world)
    with ranks.process_group(CPU):
        run = distillation(Source(manifest, rank=rank, world=world))
        assert run.micro_batches.size == BATCH // world
        for index in range(num):
            run.step(index)
        torch.save(run.state_dict(), out / f"{rank}.pt")


def stopped_fit(rank: int, world: int, port: int, out: Path, manifest: Path) -> None:
    """A fit in one folder on all ranks, of which the last is requested to stop at iteration 6."""
    join(rank, world, port)
    with ranks.process_group(CPU), CheckpointStore(out / "state", DIGEST) as store:
        run = distillation(Source(manifest, rank=rank, world=world))
        step = run.step

        def signalled(index: int) -> dict[str, Tensor]:
            if index == 5 and rank == world - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(index)

        run.step = signalled  # type: ignore[method-assign]
        stopped = None
        try:
            fit(run, 30, store, RUNTIME, title="test")
        except Interrupted as stop:
            stopped = str(stop)
        weights = {name: value.clone() for name, value in run.networks().items()}
        torch.save({"stopped": stopped, "weights": weights}, out / f"{rank}.pt")
        ranks.barrier()
        again = distillation(Source(manifest, rank=rank, world=world))
        fit(again, 12, store, RUNTIME, title="test")
        torch.save(again.state_dict(), out / f"resumed-{rank}.pt")
        ranks.barrier()
        straight = distillation(Source(manifest, rank=rank, world=world))
        for index in range(12):
            straight.step(index)
        torch.save(straight.state_dict(), out / f"straight-{rank}.pt")
