"""A network small enough to count by hand and to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from forked import join
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dmd2.config import Data, Network, TeacherConfig, Train
from dmd2.method.distillation import Distillation
from dmd2.teachers import load_teacher

DATA = Data(source="digits", resolution=8, channels=3, num_classes=5)
FLAT = TeacherConfig(
    kind="edm",
    network=Network(model_channels=16, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=16),
)
"""One level of one block at 8x8: attention is in the decoder's first block alone."""
DEEP = TeacherConfig(
    kind="edm",
    network=Network(
        model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8, 4), channels_per_head=16
    ),
)


def train(**keys: Any) -> Train:
    return Train.model_validate({"batch_size": 4, "iterations": 10, "num_snapshots": 1} | keys)


NO_GAN = {"gan_generator_weight": 0, "gan_critic_weight": 0}


def real_run(teacher: TeacherConfig, keys: Train, **settings: Any) -> Distillation:
    """A run with memory, on the CPU."""
    built = load_teacher(teacher, DATA)
    rng = torch.Generator().manual_seed(0)
    x0 = torch.rand((keys.batch_size, *built.sample_shape), generator=rng)
    cond = built.conditioner.draw(keys.batch_size, rng)
    return Distillation(built, keys, data=lambda _: (x0, cond), pairs=lambda _: (x0, x0, cond), **settings)


@contextmanager
def saved_for_backward() -> Iterator[list[int]]:
    """The bytes of each storage that autograd keeps in the block, parameters left out."""
    sizes: list[int] = []
    known = WeakIdKeyDictionary()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in known and not isinstance(tensor, nn.Parameter):
            known[storage] = True
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def timed_on_a_rank(rank: int, world: int, port: int, out: Path) -> None:
    """The step benchmark of a sharded run, as one of its ranks."""
    from dmd2.cost import bench

    join(rank, world, port)
    bench.main(iterations=1, batch_size=8, device="cpu", layout="shard", out=out)
