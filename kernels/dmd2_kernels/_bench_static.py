"""Benchmarks without a GPU: bytes and launches of eager and fused ops, and statistics of the fused code."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dmd2_kernels as dk

from ._bench_cases import Case


def num_bytes(*values: Any) -> int:
    """The total size of all tensors in a structure, in bytes."""
    return sum(t.numel() * t.itemsize for t in tree_leaves(values) if isinstance(t, Tensor))


class _Counter(TorchDispatchMode):
    """Counts the ATen ops that launch a kernel, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = any(ret.alias_info is not None and not ret.alias_info.is_write for ret in func._schema.returns)
        allocates = func._schema.name.rpartition("::")[2].startswith(("empty", "new_empty", "detach", "_unsafe_view"))
        if not is_view and not allocates:
            self.launches += 1
            self.bytes += num_bytes(args, kwargs, out)
        return out


def floor_bytes(case: Case) -> int:
    """Minimum bytes of forward and backward: inputs and upstream gradient read, outputs and gradients written once."""
    inputs = case.inputs("meta")
    leaves = num_bytes(inputs[: case.num_leaves])
    out = num_bytes(inputs[0]) if "norm" in case.op else 4
    return num_bytes(inputs) + 2 * out + leaves + (num_bytes(inputs[0]) if "norm" in case.op else 0)


def step_floor(case: Case) -> int:
    """Minimum bytes of the losses' gradients: every input read and every gradient written once; sums are negligible."""
    inputs = case.inputs("meta")
    with dk.use("reference"):
        assert case.step is not None
        found = case.step(*inputs)
    shapes = {i.shape for i in inputs}
    tensors = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
    return num_bytes(inputs) + num_bytes([t for t in tensors if t.shape in shapes and t.numel() >= inputs[0].numel()])


def eager_counts(case: Case, step: bool = False) -> tuple[int, int]:
    """(launches, bytes) of forward and backward in eager torch, counted on meta tensors.

    With `step`, of the plain-torch definition of gradients and sums.
    """
    inputs = list(case.inputs("meta"))
    if step:
        assert case.step is not None
        with dk.use("reference"), _Counter() as counter:
            case.step(*inputs)
        return counter.launches, counter.bytes
    for i in range(case.num_leaves):
        inputs[i].requires_grad_()
    assert case.eager is not None
    with dk.use("reference"), _Counter() as counter:
        out = case.eager(*inputs)
        out.backward(torch.empty_like(out))
    return counter.launches, counter.bytes


def fused_counts(case: Case, arch: int, step: bool = False) -> dict[str, int]:
    """Launches, bytes and code statistics of the fused forward and backward, compiled for `arch`.

    With `step`, of the form that a training step takes.
    """
    from . import aot

    inputs = [torch.empty_strided(t.size(), t.stride(), dtype=t.dtype) for t in case.inputs("meta")]
    found: list[aot.Compiled] = []
    with dk.use("triton"), aot.recording(arch, case.name, str(case.dtype), found), _Counter() as torch_ops:
        if step:
            assert case.step is not None
            case.step(*inputs)
        else:
            assert case.fused is not None
            for i in range(case.num_leaves):
                inputs[i].requires_grad_()
            out = case.fused(*inputs)
            out.backward(torch.empty_like(out))
    return {
        "launches": len(found) + torch_ops.launches,
        "bytes_moved": sum(each.moved_bytes for each in found) + torch_ops.bytes,
        "registers": max(each.code.registers for each in found),
        "spills": sum(each.code.spills for each in found),
        "widest_load_bits": max(max(each.code.loads, default=0) for each in found),
    }
