"""Networks in parts over the ranks (FSDP2), and tensors of which a rank holds some rows.

A sharded tensor is a `DTensor` in one dimension: each rank holds a run of its rows (the first dimension), as
`torch.chunk` deals them. What is here is the same for tensors that every rank holds whole.

FSDP and DTensor take a second to import, a third of a short stage's start: only what shards a network imports them.
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
    """A module that names the blocks it may be sharded into."""

    def blocks(self) -> list[nn.Module]: ...


def blocks(network: nn.Module) -> list[nn.Module]:
    """The parts that a network is cut into: the blocks of the modules in it that name some; the rest is one more."""
    named = (block for module in network.modules() if isinstance(module, HasBlocks) for block in module.blocks())
    return list(dict.fromkeys(named))  # a denoiser and the network in it name the same


def place(network: nn.Module, layout: Layout, *, entry_points: tuple[str, ...] = ()) -> None:
    """Deals a network's weights to the ranks in layout "shard": a part for each block and one for the rest.

    A rank gathers a block's weights when it runs, and drops them after it. In layout "replicate", or with one process,
    nothing changes. Methods other than `forward` that are called from outside must be named as `entry_points`.
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
    """Whether this rank holds some rows of the tensor only."""
    if "torch.distributed.tensor" not in sys.modules:  # nothing has made a DTensor in this process
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory: the tensor itself where it is whole."""
    return _detached(tensor).to_local() if is_sharded(tensor) else tensor


def _detached(tensor: DTensor) -> DTensor:
    """The same without a graph, in the same memory; a parameter's local tensor would else be one of the graph's."""
    return cast("DTensor", tensor.detach())


def as_part_of(part: Tensor, whole: Tensor) -> Tensor:
    """This rank's `part` of a tensor that is dealt like `whole`; `part` itself where `whole` is no sharded one."""
    if not is_sharded(whole):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def rows(tensor: Tensor) -> tuple[int, int]:
    """The rows [start, stop) of a sharded tensor that this rank holds."""
    size = -(-tensor.shape[0] // ranks.world_size())
    start = min(tensor.shape[0], ranks.rank() * size)
    return start, min(tensor.shape[0], start + size)


def gather(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors of a state dict on rank 0, one at a time in its host's memory; nothing on the others.

    Every rank must call it. Tensors that are whole already stay as they are.
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
    """Whether the next backward passes of a sharded network exchange gradients; without it they add up on each rank."""
    if is_sharded(next(network.parameters())):  # all of them, or none
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(network, FSDPModule)
        network.set_requires_gradient_sync(on)
