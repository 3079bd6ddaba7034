"""Ranks and devices: one process, or several started by `dmd2.training.launcher`.

No rank waits for another forever. The others notice at their next collective call on the host that a rank has ended,
and after the timeout of `process_group` that one hangs. They raise a `UserError`, see `exchange`; if the GPU waits and
not the host, NCCL's watchdog ends them.
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
GLOO = ("gloo", "Application timeout caused pair closure")
"""Of gloo's errors, plain RuntimeErrors: the source file's name, or what follows the time-out of another exchange."""


def rank() -> int:
    """The global rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_of(choice: str) -> torch.device:
    """The device for "cpu", "cuda" or "auto" (CUDA if available): one GPU per local rank.

    Raises UserError for "cuda" without a CUDA device.
    """
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device is cuda, but torch finds no CUDA device; use auto or cpu")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)  # else the current device is the first one on every rank
    return device


@contextmanager
def process_group(device: torch.device, timeout_minutes: float = 30.0) -> Iterator[None]:
    """Initialises and destroys the default process group around the block; does nothing with one process.

    Gloo for CPU tensors and NCCL for CUDA tensors, so that flags are exchanged without synchronising with a device.
    Raises UserError if another rank is lost, see `exchange`.
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
    """Turns the error of a collective call in the block into a UserError that names `what` and the remedy."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).partition("\n")[0]
        if not isinstance(error, LOST_PEER) and not any(part in text for part in GLOO):
            raise
        raise UserError(
            f"rank {rank()} of {world_size()}, in {what}: another rank ended or was silent for longer than "
            f"runtime.collective_timeout_minutes ({text}); its own message says why. Run the same command again: it "
            f"resumes from the last checkpoint"
        ) from error


def local_share(batch_size: int) -> int:
    """This rank's share of a global batch, in samples. Raises UserError if the world size does not divide it."""
    world = world_size()
    if batch_size % world:
        lower, upper = batch_size // world * world, -(-batch_size // world) * world
        remedy = f"use {upper}" if lower == 0 else f"use {lower} or {upper}"
        raise UserError(f"batch_size {batch_size} is not divisible by {world} ranks; {remedy}")
    return batch_size // world


def average(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its mean over the ranks, in one coalesced all-reduce; no-op with one process.

    For a few scalars; gradients use `gradient_buckets`.
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
    """Sum all-reduce, in place."""
    if world_size() > 1:
        with exchange("a sum over the ranks"):
            dist.all_reduce(tensor)
    return tensor


def maximum(tensor: Tensor) -> Tensor:
    """Elementwise max all-reduce, in place."""
    if world_size() > 1:
        with exchange("a maximum over the ranks"):
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def agree(numbers: Sequence[int]) -> list[int]:
    """Max all-reduce of a few ints on the host; all ranks must pass equally many."""
    return [int(n) for n in maximum(torch.tensor(list(numbers), dtype=torch.int64)).tolist()]


class AsyncFlags:
    """Asynchronous max-all-reduce of a few ints; a call returns the previous call's result.

    Runs on the hosts (gloo), so that the loop learns without synchronising with its device that some rank got a
    signal. With one process a call returns its own numbers.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, dist.Work] | None = None

    def __call__(self, *numbers: int, now: bool = False) -> list[int]:
        """Starts the all-reduce of `numbers`; returns the previous result (zeros at first), or with `now` blocks and
        returns the maximum of both. Collective, with the same `now` on all ranks.
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
    """A barrier of the hosts, which does not synchronise with their devices; no-op with one process."""
    if world_size() > 1:
        with exchange("waiting for all ranks"):
            dist.all_reduce(torch.zeros(1))
