"""Ranks and devices: one process without torchrun, several with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from dmd2.errors import UserError


def rank() -> int:
    """This process's global rank; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_of(choice: str) -> torch.device:
    """The device for "cpu", "cuda" or "auto" (CUDA where there is one): one GPU per local rank."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device is cuda, but torch finds no CUDA device; use auto or cpu")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the other ranks for the duration of the block; does nothing with one process."""
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_share(batch_size: int) -> int:
    """This rank's part of a global batch. Raises UserError if the ranks do not divide it."""
    world = world_size()
    if batch_size % world:
        lower, upper = batch_size // world * world, -(-batch_size // world) * world
        remedy = f"use {upper}" if lower == 0 else f"use {lower} or {upper}"
        raise UserError(f"batch_size {batch_size} is not divisible by {world} ranks; {remedy}")
    return batch_size // world


def average(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its mean over the ranks, in one coalesced all-reduce; nothing with one process."""
    if world_size() == 1:
        return
    tensors = list(tensors)
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank; a collective call with several processes."""
    if world_size() == 1:
        return flag
    value = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def barrier() -> None:
    """Waits for all ranks; nothing with one process."""
    if world_size() > 1:
        dist.barrier()
