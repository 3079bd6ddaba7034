"""A dry run: its networks, optimizers and data are meta tensors, without memory and arithmetic.

The step of such a run takes less than a second whatever the size of its networks, and calls the same operations as the
real one: FLOPs and bytes are counted there and not modelled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from dmd2 import config
from dmd2.method.denoiser import Cond, Denoiser, Teacher
from dmd2.method.distillation import Distillation
from dmd2.method.noise import NoiseGrid
from dmd2.metrics.perceptual import distance_by, without_values
from dmd2.teachers import load_teacher
from dmd2.training import ranks

META = torch.device("meta")


_CONSTRUCTORS = frozenset(_device_constructors())


class _OnMeta(TorchFunctionMode):
    """Makes new tensors on the meta device, drawn by no generator."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CONSTRUCTORS:
            kwargs = {**(kwargs or {}), "device": META}
            kwargs.pop("generator", None)
        return func(*args, **(kwargs or {}))


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None, **_: Any) -> Tensor:
    """The fused attention of a GPU; on the meta device torch would take the plain one."""
    assert attn_mask is None  # no network here masks its attention
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return attended


class _AnyGenerator(torch.Generator):
    """A generator of the CPU, whatever the device it is made for."""

    def __new__(cls, device: Any = None) -> _AnyGenerator:
        return super().__new__(cls)


@contextmanager
def meta_tensors() -> Iterator[None]:
    """Within the block new tensors have a shape and a life, but no content; generators are there but draw nothing."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "Generator", _AnyGenerator))
        # One of several ranks would count its share alone, and wait for the others.
        stack.enter_context(patch.object(ranks, "world_size", lambda: 1))
        stack.enter_context(patch.object(ranks, "rank", lambda: 0))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _attention))
        stack.enter_context(_OnMeta())
        yield


class _Grid(NoiseGrid):
    """A grid whose levels stay numbers."""

    def to(self, device: torch.device | str) -> _Grid:
        return self

    def draw(self, num: int, low: int, high: int, rng: torch.Generator) -> Tensor:
        return torch.empty(num)


def meta_teacher(teacher: config.AnyTeacher, data: config.Data) -> Teacher:
    """The teacher that a configuration describes, without its weights."""
    bare = teacher.model_copy(update={"weights": None})
    with torch.device(META):
        built = load_teacher(bare, data)
    grid = _Grid(built.grid.sigmas, built.grid.init_scale, built.grid.variance_preserving)
    return dataclasses.replace(built, grid=grid)


@cache
def meta_networks(teacher: config.AnyTeacher, data: config.Data) -> tuple[Teacher, list[Denoiser]]:
    """A teacher and two copies of its network, for the generator and the critic of one run after the other."""
    with meta_tensors():
        built = meta_teacher(teacher, data)
        return built, [built.copy_network(), built.copy_network()]


def some_tokens(teacher: Teacher, num: int, rng: torch.Generator) -> Cond:
    """Tokens of `num` random classes, or of empty prompts."""
    drawn = teacher.conditioner.draw(num, rng)
    return teacher.conditioner.tokenize([""] * num) if drawn is None else drawn


def meta_batch(teacher: Teacher, num: int) -> tuple[Tensor, Cond]:
    """`num` samples with the tokens of their labels, inside `meta_tensors`."""
    tokens = some_tokens(teacher, num, torch.Generator())
    return torch.empty((num, *teacher.sample_shape)), {name: value.to(META) for name, value in tokens.items()}


def _batch(x0: Tensor, cond: Cond, index: int) -> tuple[Tensor, Cond]:
    return x0, cond


def _pairs(x0: Tensor, cond: Cond, index: int) -> tuple[Tensor, Tensor, Cond]:
    return x0, x0, cond


def _prompts(num: int, cond: Cond, index: int) -> tuple[Tensor, Cond]:
    return torch.empty(num), cond


def meta_run(teacher: Teacher, train: config.Train, copies: Sequence[Denoiser] = (), **settings: Any) -> Distillation:
    """The run of `train` on a meta teacher, inside `meta_tensors`; `settings` go to `Distillation`.

    `copies` of the teacher's network become the generator's and the critic's; without them they are made here.
    """
    x0, cond = meta_batch(teacher, train.batch_size)
    data, pairs = partial(_batch, x0, cond), partial(_pairs, x0, cond)
    if train.regression_weight > 0 and train.regression_loss == "lpips":
        settings["regression_distance"] = distance_by(without_values().to(META))
    if teacher.conditioner.draw(1, torch.Generator()) is None:
        settings["prompts"] = partial(_prompts, train.batch_size, cond)
    unused = iter(copies)
    copy_network = (lambda _: next(unused)) if copies else Teacher.copy_network
    with patch.object(Teacher, "copy_network", copy_network):
        return Distillation(teacher, train, data=data, pairs=pairs, device=META, **settings)
