"""Ranks and devices: one process, or several started by `dmd2.training.launcher`.

No rank waits for another without end. One that ended is noticed by those that exchange something with its host, at
once; one that hangs, after the time limit that `process_group` was given. They end with a `UserError`, see `exchange`,
or, where a GPU waits and not the host, by NCCL's own watchdog.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dmd2.errors import Interrupted, UserError

LOST_PEER = (dist.DistError, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
GLOO = "gloo"
"""Part of the text of gloo's errors, which are plain RuntimeErrors that name the source file."""


def rank() -> int:
    """This process's global rank; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_of(choice: str) -> torch.device:
    """The device for "cpu", "cuda" or "auto" (CUDA where there is one): one GPU per local rank."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device is cuda, but torch finds no CUDA device; use auto or cpu")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)  # or what asks for the current device would use the first one on every rank
    return device


@contextmanager
def process_group(device: torch.device, timeout_minutes: float = 30.0) -> Iterator[None]:
    """Joins the other ranks for the duration of the block; does nothing with one process.

    CPU tensors travel by gloo and CUDA tensors by NCCL, so that flags can be exchanged without waiting for a device.
    Raises UserError where another rank is lost, see `exchange`.
    """
    if world_size() == 1:
        yield
        return
    limit = timedelta(minutes=timeout_minutes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with exchange("joining the other ranks"):
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=limit)
    failed = True
    try:
        with exchange("a stage"):
            yield
        failed = False
    except Interrupted:
        failed = False
        raise
    finally:
        if not failed or device.type == "cpu":  # NCCL would wait for a lost rank; its connections end with the process
            dist.destroy_process_group()


@contextmanager
def exchange(what: str) -> Iterator[None]:
    """Turns the error of a collective call in the block into one line that names it, and what to do."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).partition("\n")[0]
        if not isinstance(error, LOST_PEER) and GLOO not in text:
            raise
        raise UserError(
            f"rank {rank()} of {world_size()}, in {what}: another rank ended or was silent for longer than "
            f"runtime.collective_timeout_minutes ({text}); its own message says why. Run the same command again: it "
            f"goes on from the last checkpoint"
        ) from error


def local_share(batch_size: int) -> int:
    """This rank's part of a global batch. Raises UserError if the ranks do not divide it."""
    world = world_size()
    if batch_size % world:
        lower, upper = batch_size // world * world, -(-batch_size // world) * world
        remedy = f"use {upper}" if lower == 0 else f"use {lower} or {upper}"
        raise UserError(f"batch_size {batch_size} is not divisible by {world} ranks; {remedy}")
    return batch_size // world


def average(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its mean over the ranks, in one coalesced all-reduce; nothing with one process.

    For a few scalars; gradients go by `gradients.Buckets`.
    """
    if world_size() == 1:
        return
    tensors = list(tensors)
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    with exchange("a mean over the ranks"):
        dist.all_reduce(flat)
    flat /= world_size()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the ranks, in place."""
    if world_size() > 1:
        with exchange("a sum over the ranks"):
            dist.all_reduce(tensor)
    return tensor


def maximum(tensor: Tensor) -> Tensor:
    """The largest value of each element over the ranks, in place."""
    if world_size() > 1:
        with exchange("a maximum over the ranks"):
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def agree(numbers: Sequence[int]) -> list[int]:
    """The largest of each number over the ranks, on the host: all ranks must give as many."""
    return [int(n) for n in maximum(torch.tensor(list(numbers), dtype=torch.int64)).tolist()]


class AsyncFlags:
    """Numbers that the ranks tell one another in each iteration without waiting: known to all one iteration later.

    They travel between the hosts, beside the work of the devices, so that a loop needs no synchronisation to learn
    that some rank was asked to stop. With one process they are known at once.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, dist.Work] | None = None

    def __call__(self, *numbers: int, now: bool = False) -> list[int]:
        """Sends `numbers`; the largest of each over the ranks, of the call before, or of this one with `now`.

        Zeros at the first call. Every rank must call it equally often, with the same `now`.
        """
        if world_size() == 1:
            return list(numbers)
        known = self._received([0] * len(numbers))
        tensor = torch.tensor(numbers, dtype=torch.int64)
        with exchange("a notice to the other ranks"):
            work = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True)
        self._sent = (tensor, work)
        return [max(pair) for pair in zip(known, self._received(known), strict=True)] if now else known

    def _received(self, default: list[int]) -> list[int]:
        if self._sent is None:
            return default
        tensor, work = self._sent
        with exchange("a notice from the other ranks"):
            work.wait()
        self._sent = None
        return [int(n) for n in tensor.tolist()]


def barrier() -> None:
    """The hosts wait for one another, not for their devices; nothing with one process."""
    if world_size() > 1:
        with exchange("waiting for all ranks"):
            dist.all_reduce(torch.zeros(1))
