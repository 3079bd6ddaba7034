"""A memory checker for interpreted kernels: what each argument's bytes see, program by program.

Inside `metered()` every launch runs on copies of its tensors with guards around them. A lane outside every argument is
an error that names the kernel; a masked load without `other=` reads NaN in its masked lanes, as a GPU leaves them
undefined; a byte that one program writes and another reads or writes is an error, as a GPU orders no two programs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from dmd2_kernels.ops import _launch

GUARD = 16_384  # elements on either side of an argument
NOBODY, MANY = -1, -2


@dataclass
class Argument:
    """One tensor argument: where it is, and who touched each of its bytes."""

    name: str
    start: int
    size: int
    read: int = 0
    written: int = 0
    readers: np.ndarray = field(init=False)
    writers: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.readers = np.full(self.size, NOBODY, np.int32)
        self.writers = np.full(self.size, NOBODY, np.int32)


@dataclass
class Launch:
    """One launch: its kernel's name and its arguments by name."""

    kernel: str
    arguments: dict[str, Argument]

    def reads(self, name: str) -> float:
        """How many times the argument's size was read."""
        return self.arguments[name].read / self.arguments[name].size

    def writes(self, name: str) -> float:
        """How many times the argument's size was written."""
        return self.arguments[name].written / self.arguments[name].size


def _guarded(tensor: Tensor) -> Tensor:
    buffer = torch.empty(tensor.numel() + 2 * GUARD, dtype=tensor.dtype)
    return buffer.as_strided(tensor.shape, tensor.stride(), GUARD).copy_(tensor)


class Meter:
    """Counts and checks the accesses of the launch that runs."""

    def __init__(self, order: str) -> None:
        self.order, self.launches = order, list[Launch]()
        self.program, self.permutation = 0, np.zeros(0, np.int64)

    def launch(self, kernel: Any, num_programs: int, args: Sequence[Any], options: dict[str, Any]) -> None:
        """Run a kernel on guarded copies, in the meter's order of programs, and copy back."""
        tensors = {id(a): a for a in args if isinstance(a, Tensor)}
        copies = {key: _guarded(t) for key, t in tensors.items()}
        named = dict(zip(kernel.arg_names, args, strict=False))
        arguments = {
            name: Argument(name, copies[id(a)].data_ptr(), a.numel() * a.itemsize)
            for name, a in named.items()
            if isinstance(a, Tensor)
        }
        self.launches.append(Launch(kernel.__name__, arguments))
        programs = np.arange(num_programs)
        self.permutation = {
            "forward": programs,
            "reversed": programs[::-1],
            "shuffled": np.random.default_rng(0).permutation(num_programs),
        }[self.order]
        kernel[(num_programs,)](*(copies.get(id(a), a) for a in args), **options)
        for name, tensor in named.items():
            if isinstance(tensor, Tensor) and arguments[name].written:
                tensor.copy_(copies[id(tensor)])

    def argument(self, addresses: np.ndarray) -> tuple[Argument, np.ndarray]:
        """The argument that holds all these addresses, and the addresses within it."""
        launch = self.launches[-1]
        for argument in launch.arguments.values():
            inside = (addresses >= argument.start) & (addresses < argument.start + argument.size)
            if inside.any():
                if not inside.all():
                    raise IndexError(f"{launch.kernel} leaves {argument.name} in {(~inside).sum()} lanes")
                return argument, addresses - argument.start
        raise IndexError(f"{launch.kernel} reaches memory outside all of its arguments")

    def load(self, addresses: np.ndarray, itemsize: int) -> None:
        """Note a read of the active lanes."""
        argument, offsets = self.argument(addresses)
        argument.read += offsets.size * itemsize
        foreign = (argument.writers[offsets] != NOBODY) & (argument.writers[offsets] != self.program)
        if foreign.any():
            raise RuntimeError(f"{self.launches[-1].kernel} reads bytes of {argument.name} that another program writes")
        known = argument.readers[offsets]
        argument.readers[offsets] = np.where((known == NOBODY) | (known == self.program), self.program, MANY)

    def store(self, addresses: np.ndarray, itemsize: int) -> None:
        """Note a write of the active lanes."""
        argument, offsets = self.argument(addresses)
        argument.written += offsets.size * itemsize
        for who, what in ((argument.writers, "writes"), (argument.readers, "reads")):
            if ((who[offsets] != NOBODY) & (who[offsets] != self.program)).any():
                kernel = self.launches[-1].kernel
                raise RuntimeError(f"{kernel} writes bytes of {argument.name} that another program {what}")
        argument.writers[offsets] = self.program


def _poison(dtype: np.dtype, is_bf16: bool, shape: tuple[int, ...]) -> np.ndarray:
    if is_bf16:
        return np.full(shape, 0x7FC0, np.uint16)
    return np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max, dtype)


@contextmanager
def metered(order: str = "forward") -> Iterator[Meter]:
    """Run every launch inside the block under a meter; `order` is forward, reversed or shuffled."""
    import triton.language as tl

    builder, meter = interpreter.InterpreterBuilder, Meter(order)
    load, store, place = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx

    def metered_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        element = ptrs.get_element_ty()
        dtype = np.dtype(interpreter._get_np_dtype(element))
        active = np.broadcast_to(mask.data, ptrs.data.shape)
        if active.any():
            meter.load(ptrs.data[active], dtype.itemsize)
        if other is None:
            other = interpreter.TensorHandle(_poison(dtype, element == tl.bfloat16, ptrs.data.shape), element)
        return load(self, ptrs, mask, other, *rest)

    def metered_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        active = np.broadcast_to(mask.data, ptrs.data.shape)
        if active.any():
            meter.store(ptrs.data[active], value.data.itemsize)
        return store(self, ptrs, value, mask, *rest)

    def placed(self: Any, x: int, y: int, z: int) -> None:
        meter.program = int(meter.permutation[x])
        place(self, meter.program, y, z)

    before, _launch.launcher = _launch.launcher, meter.launch
    builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx = metered_load, metered_store, placed
    try:
        yield meter
    finally:
        _launch.launcher = before
        builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx = load, store, place
