"""A step never waits for the device: nothing in it reads a number from a tensor, and nothing copies one there."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy import SHAPE, labels, rng, toy_teacher

from dmd2.config import TeacherTraining, Train
from dmd2.method.distillation import Distillation
from dmd2.method.teacher_fit import TeacherFit

BATCH = 4
METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")
WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "unique", "equal", "argwhere")
"""Operators whose result, or its shape, the host must know."""


class Waited(AssertionError):
    pass


def refuse(what: str) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        raise Waited(what)

    return call


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.name().partition("::")[2].partition(".")[0].removesuffix("2")
        masks = args[1] if name in ("index", "index_put_") else ()
        if name in WAITING or any(mask is not None and mask.dtype == torch.bool for mask in masks):
            raise Waited(name)
        return operator(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fails on what would wait for a GPU: a tensor's numbers requested, or a list made a tensor."""
    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(patch.object(Tensor, name, refuse(name)))
        for name in ("tensor", "as_tensor", "from_numpy"):
            stack.enter_context(patch.object(torch, name, refuse(name)))
        stack.enter_context(NoWaiting())
        yield


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0]),
        lambda x: torch.equal(x, x),
        lambda x: torch.ops.aten.item(x.sum()),
    ],
)
def test_guard_notices(wait: Any):
    with pytest.raises(Waited), no_waiting():
        wait(torch.ones(3))


def data(index: int) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(BATCH, *SHAPE, generator=rng(index)), labels(BATCH)


def pairs(index: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return torch.randn(BATCH, *SHAPE, generator=rng(index)), *data(index)


RUNS: list[dict[str, Any]] = [
    {},
    {"regression_weight": 0.25, "ema_decay": 0.9, "r1_weight": 1.0},
    {"num_steps": 4},
    {"num_steps": 4, "backward_simulation": False, "guidance_scale": 1.5},
    {"share_levels": True, "matching_levels": (0, 999), "share_critic_pass": True, "gan_taps": 2},
    {"gan_features": "teacher", "turns": "disjoint", "gan_loss": "hinge", "denoising_weighting": "uniform"},
]


def distillation(device: str = "cpu", **keys: Any) -> Distillation:
    train = Train(batch_size=BATCH, num_snapshots=1, **{"critic_steps_per_generator": 2, **keys})
    batches, couples = list(map(data, range(4))), list(map(pairs, range(4)))
    if device == "cuda":
        batches, couples = pinned(batches), pinned(couples)
    return Distillation(
        toy_teacher(levels=2, guidable=train.guidance_scale != 1),
        train,
        data=batches.__getitem__,
        pairs=couples.__getitem__,
        micro_batch_size=2,
        device=device,
    )


def pinned(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.pin_memory()
    if isinstance(item, dict):
        return {name: pinned(value) for name, value in item.items()}
    return type(item)(map(pinned, item))


@pytest.mark.parametrize("keys", RUNS)
def test_a_step_asks_no_tensor_for_a_number(keys: dict[str, Any]):
    run = distillation(**keys)
    with no_waiting():
        rows = [run.step(index) for index in range(4)]
    assert all(float(value) == float(value) for row in rows for value in row.values())


def test_a_teachers_step_asks_no_tensor_for_a_number():
    batches = list(map(data, range(3)))
    fit = TeacherFit(toy_teacher(dropout=0.1), TeacherTraining(iterations=9, batch_size=BATCH), batches.__getitem__)
    with no_waiting():
        for index in range(3):
            fit.step(index)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", RUNS)
def test_a_step_on_a_gpu_never_waits_for_it(keys: dict[str, Any]):
    run = distillation("cuda", **keys)
    run.step(0)  # what is compiled or allocated once
    run.step(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in (2, 3):
            run.step(index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
