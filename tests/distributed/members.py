"""What the ranks of the tests of layouts do, each in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from forked import join
from tiny import DIGEST, distillation, whole

from dmd2 import distributed, sharding
from dmd2.checkpoint import CheckpointStore

CPU = torch.device("cpu")


def steps(rank: int, world: int, port: int, out: Path, num: int, settings: dict[str, Any]) -> None:
    """`num` iterations; the whole state."""
    join(rank, world, port)
    with distributed.process_group(CPU):
        run = distillation(rank, world, **settings)
        for index in range(num):
            run.step(index)
        torch.save(whole(run.state_dict()), out / f"{rank}.pt")


def saved(rank: int, world: int, port: int, out: Path, num: int, settings: dict[str, Any]) -> None:
    """A checkpoint after `num` iterations, written by all ranks; the whole state beside it."""
    join(rank, world, port)
    with distributed.process_group(CPU), CheckpointStore(out / "state", DIGEST, in_background=True) as store:
        run = distillation(rank, world, **settings)
        for index in range(num):
            run.step(index)
        store.save(num, run.state_dict())
        run.step(num)  # what was copied must not see it
        store.wait()
        distributed.barrier()


def loaded(rank: int, world: int, port: int, out: Path, settings: dict[str, Any]) -> None:
    """A run of another layout that takes up the checkpoint: its whole state."""
    join(rank, world, port)
    with distributed.process_group(CPU), CheckpointStore(out / "state", DIGEST) as store:
        run = distillation(rank, world, **settings)
        found = store.load(run.state_dict())
        assert found is not None
        run.load_state_dict(found[0])
        held = {name: value for name, value in run.networks().items() if sharding.is_sharded(value)}
        sizes = {name: sharding.local(value).shape[0] for name, value in held.items()}
        torch.save({"state": whole(run.state_dict()), "rows": sizes, "step": found[1]["step"]}, out / f"{rank}.pt")
