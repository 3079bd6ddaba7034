"""Means of gradients over ranks that hold whole networks, exchanged in buckets beside the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmd2.training import ranks

BUCKET_BYTES = 25 * 2**20
"""As large as DDP's: large enough for the network's full rate, small enough to start early."""


class Buckets:
    """The exchange of one network's gradients.

    The gradients of a bucket become views of one flat tensor, and that is exchanged: nowhere is a second copy of all
    gradients. Buckets go in the reverse order of the parameters, about the one in which a backward pass ends them, and
    in that order on every rank, as collectives must. Not DDP: its forward hook takes one forward for one backward
    pass, and DMD2 calls its networks several times, without a graph or for gradients on images alone. Not FSDP2 on a
    (world, 1) mesh either: it imports a second and a half of modules and costs more on the host in every step.
    """

    def __init__(self, params: Sequence[nn.Parameter], bucket_bytes: int = BUCKET_BYTES):
        self._buckets = buckets_of(params, bucket_bytes)
        self._armed = False
        self._reset()
        for number, bucket in enumerate(self._buckets):
            for param in bucket:
                param.register_post_accumulate_grad_hook(partial(self._arrived, number))

    def _reset(self) -> None:
        self._next = 0  # the bucket whose turn it is
        self._missing = [len(bucket) for bucket in self._buckets]
        self._under_way: list[tuple[Tensor, dist.Work]] = []

    @contextmanager
    def overlapping(self) -> Iterator[None]:
        """The one backward pass in the block is an update's last: each bucket leaves as soon as it is complete."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def finish(self) -> None:
        """Exchanges what has not left yet and waits, on the device, for all; the gradients are then means."""
        while self._next < len(self._buckets):
            self._send()
        for flat, work in self._under_way:
            with ranks.exchange("the mean of gradients"):
                work.wait()
            flat /= ranks.world_size()
        self._reset()

    def _arrived(self, number: int, param: Tensor) -> None:
        if not self._armed:
            return
        if number < self._next:
            raise RuntimeError("a second backward pass reached parameters whose gradients had left for the other ranks")
        self._missing[number] -= 1
        while self._next < len(self._buckets) and self._missing[self._next] == 0:
            self._send()

    def _send(self) -> None:
        """Lets the bucket whose turn it is leave; a parameter without a gradient has none on any rank."""
        held = [param for param in self._buckets[self._next] if param.grad is not None]
        self._next += 1
        if not held:
            return
        flat = held[0].new_empty(sum(param.numel() for param in held))
        starts = [0]
        for param in held:
            starts.append(starts[-1] + param.numel())
        # In the parameter's own strides, which the fused optimizer expects of its gradients.
        views = [flat.as_strided(p.shape, p.stride(), at) for p, at in zip(held, starts[:-1], strict=True)]
        torch._foreach_copy_(views, [param.grad for param in held if param.grad is not None])
        for param, view in zip(held, views, strict=True):
            param.grad = view
        with ranks.exchange("the mean of gradients"):
            work = dist.all_reduce(flat, async_op=True)
        self._under_way.append((flat, work))


def buckets_of(params: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """The parameters in reverse order, in runs of one dtype of about `bucket_bytes`."""
    buckets: list[list[nn.Parameter]] = []
    size = bucket_bytes
    for param in reversed(params):
        if size >= bucket_bytes or param.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(param)
        size += param.numel() * param.element_size()
    return buckets
