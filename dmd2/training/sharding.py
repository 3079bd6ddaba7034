"""Sharded networks (FSDP2) and tensors; the same functions accept replicated ones.

A sharded tensor is a `DTensor` with `Shard(0)`: each rank holds consecutive rows (dimension 0), as `torch.chunk`
splits them.

Importing FSDP and DTensor costs a second, a third of a short stage's start-up, so only sharding a network does it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Protocol, TypeGuard, cast, runtime_checkable

import torch
from torch import Tensor, nn

from dmd2.training import ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Layout = Literal["replicate", "shard"]


@runtime_checkable
class HasBlocks(Protocol):
    """A module that lists its FSDP units."""

    def blocks(self) -> list[nn.Module]: ...


def blocks(network: nn.Module) -> list[nn.Module]:
    """The FSDP units of a network: the blocks of all its modules that list some. The root is one more unit."""
    named = (block for module in network.modules() if isinstance(module, HasBlocks) for block in module.blocks())
    return list(dict.fromkeys(named))  # a denoiser and the network in it list the same blocks


def place(network: nn.Module, layout: Layout, *, entry_points: tuple[str, ...] = ()) -> None:
    """Applies `fully_shard` to each block and to the root in layout "shard": weights are gathered block by block.

    No-op in layout "replicate" or with one process. Methods other than `forward` that are called from outside must be
    listed in `entry_points`.
    """
    if layout == "replicate" or ranks.world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(next(network.parameters()).device.type, (ranks.world_size(),))
    for block in blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for name in entry_points:
        register_fsdp_forward_method(network, name)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether the tensor is a DTensor, of which this rank holds some rows."""
    if "torch.distributed.tensor" not in sys.modules:  # no DTensor exists in this process
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, sharing its memory; a replicated tensor itself."""
    return _detached(tensor).to_local() if is_sharded(tensor) else tensor


def _detached(tensor: DTensor) -> DTensor:
    """Detached, sharing memory: `to_local` of a parameter would otherwise be part of the autograd graph."""
    return cast("DTensor", tensor.detach())


def as_part_of(part: Tensor, whole: Tensor) -> Tensor:
    """A DTensor sharded like `whole` with this rank's rows `part`; `part` itself if `whole` is not sharded."""
    if not is_sharded(whole):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def rows(tensor: Tensor) -> tuple[int, int]:
    """The rows [start, stop) of a sharded tensor that this rank holds; may be empty."""
    size = -(-tensor.shape[0] // ranks.world_size())
    start = min(tensor.shape[0], ranks.rank() * size)
    return start, min(tensor.shape[0], start + size)


def gather(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The full state dict on rank 0, gathered tensor by tensor into host memory; empty on the other ranks.

    Collective. Replicated tensors are returned as they are.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if is_sharded(value):
            with torch.no_grad(), ranks.exchange(f"gathering {name}"):
                value = _detached(value).full_tensor()
            value = value.cpu() if ranks.rank() == 0 else value
        if ranks.rank() == 0:
            found[name] = value
    return found


def synchronise(network: nn.Module, on: bool) -> None:
    """Turns gradient reduction of a sharded network on or off (gradient accumulation); no-op for replicated ones."""
    if is_sharded(next(network.parameters())):  # all of them, or none
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(network, FSDPModule)
        network.set_requires_gradient_sync(on)
