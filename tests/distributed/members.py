"""What the ranks of the tests of layouts do, each in a process of its own; several things in one start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from forked import join
from tiny import distillation, whole
from toy import DIGEST

from dmd2.training import ranks, sharding
from dmd2.training.checkpoint_store import CheckpointStore

CPU = torch.device("cpu")


def trained(rank: int, world: int, port: int, out: Path, num: int, settings: dict[str, dict[str, Any]]) -> None:
    """The whole state after `num` iterations under each of the settings."""
    join(rank, world, port)
    with ranks.process_group(CPU):
        found = {}
        for name, keys in settings.items():
            run = distillation(rank, world, **keys)
            for index in range(num):
                run.step(index)
            found[name] = whole(run.state_dict())
        torch.save(found, out / f"{rank}.pt")


def saved(rank: int, world: int, port: int, folders: dict[str, Path], num: int) -> None:
    """Checkpoints after `num` and `num + 1` iterations, written by all ranks, in a folder for each layout."""
    join(rank, world, port)
    with ranks.process_group(CPU):
        for layout, folder in folders.items():
            run = distillation(rank, world, layout=layout)
            with CheckpointStore(folder, DIGEST, in_background=True) as store:
                for index in range(num + 1):
                    run.step(index)
                    if index >= num - 1:
                        store.save(index + 1, run.state_dict())
                run.step(num + 1)  # what was copied must not see it
                store.wait()
                ranks.barrier()


def loaded(rank: int, world: int, port: int, out: Path, folders: dict[str, Path]) -> None:
    """A run of each layout that takes up each checkpoint: its whole state, and how many rows this rank holds."""
    join(rank, world, port)
    found = {}
    with ranks.process_group(CPU):
        for layout in ("replicate", "shard"):
            for name, folder in folders.items():
                run = distillation(rank, world, layout=layout)
                with CheckpointStore(folder, DIGEST) as store:
                    state = store.load(run.state_dict())
                assert state is not None
                run.load_state_dict(state[0])
                held = {name: value for name, value in run.networks().items() if sharding.is_sharded(value)}
                rows = {name: sharding.local(value).shape[0] for name, value in held.items()}
                found[f"{name} {layout}"] = {
                    "state": whole(run.state_dict()),
                    "rows": rows,
                    "step": state[1]["step"],
                }
                ranks.barrier()
    torch.save(found, out / f"{rank}.pt")
