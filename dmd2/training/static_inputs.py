"""What a captured step needs from outside: random numbers, batches and conditions at addresses that do not change.

A CUDA graph repeats kernels on the same memory. So everything that differs between steps is made outside of the graph
and copied into buffers: `Draws` has the random numbers, `StaticReader` the batches and `StaticCalls` what a function
makes of them. Each is *recorded* in one plain step, which already computes with the buffers, and *refilled* before each
replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from dmd2.errors import UserError

HOST_READS = frozenset({"_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "_unique2", "equal"})
"""Operations of ATen whose result or shape the host waits for, or that copy from memory that is freed afterwards."""


def _leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def copied(value: Any) -> Any:
    """The same structure with tensors of its own."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def refill(buffers: Any, values: Any) -> None:
    """Copies values into buffers of the same structure. Raises ValueError if shapes differ."""
    for buffer, value in zip(_leaves(buffers), _leaves(values), strict=True):
        if buffer.shape != value.shape:
            raise ValueError(
                f"a captured step got {tuple(value.shape)} where it was recorded with {tuple(buffer.shape)}"
            )
        buffer.copy_(value, non_blocking=True)


class Draw(NamedTuple):
    """One random operation of a step."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    generator: int  # its number among the step's
    buffer: Tensor


class Draws(TorchDispatchMode):
    """Within the block, operations with a generator return buffers: recorded the first time, the same ones afterwards.

    Raises UserError if the step reads a value on the host, which cannot be captured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Draw] = []
        self._generators: list[torch.Generator] = []
        self._done = 0
        self._is_recording = True

    def numbered(self, generators: list[torch.Generator]) -> None:
        """Announces the generators of the next step, in the order of their numbers."""
        self._generators, self._done = generators, 0

    def close(self) -> None:
        """Ends the recording."""
        self._is_recording = False

    def refill(self) -> None:
        """Draws the next step's numbers with its generators, in the recorded order."""
        for draw in self.recorded:
            args = (draw.buffer, *draw.args[1:]) if _in_place(draw.func) else draw.args
            out = draw.func(*args, **draw.kwargs, generator=self._generators[draw.generator])
            if out is not draw.buffer:
                draw.buffer.copy_(out)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.rpartition("::")[2]
        if name in HOST_READS:
            raise UserError(
                f"runtime.cuda_graphs: this run's step reads a value on the host ({name}), which a graph cannot; "
                f"set it to false"
            )
        generator = kwargs.pop("generator", None)
        if generator is None:
            return func(*args, **kwargs)
        draw = self._record(func, args, kwargs, generator) if self._is_recording else self._next(func)
        if _in_place(func):
            return args[0].copy_(draw.buffer)
        return draw.buffer

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], generator: torch.Generator) -> Draw:
        out = func(*args, **kwargs, generator=generator)
        number = [known.initial_seed() for known in self._generators].index(generator.initial_seed())
        kept = (None, *args[1:]) if _in_place(func) else args
        self.recorded.append(Draw(func, kept, kwargs, number, out.clone() if _in_place(func) else out))
        return self.recorded[-1]

    def _next(self, func: Any) -> Draw:
        draw = self.recorded[self._done]
        self._done += 1
        if draw.func is not func:
            raise RuntimeError(f"the captured step draws with {func} where it was recorded with {draw.func}")
        return draw


def _in_place(func: Any) -> bool:
    return bool(func._schema.is_mutable)


class StaticReader:
    """A `BatchReader` whose micro-batches are copied into buffers, which are what a captured step reads."""

    def __init__(self, read: Callable[[int, int], tuple[Any, ...]]):
        self._read = read
        self.buffers: dict[int, tuple[Any, ...]] = {}

    def __call__(self, step: int, micro_batch: int) -> tuple[Any, ...]:
        """The buffers of a micro-batch; filled from the data of `step` if they are new."""
        if micro_batch not in self.buffers:
            with _disable_current_modes():  # how the data are made is no part of the step
                self.buffers[micro_batch] = copied(self._read(step, micro_batch))
        return self.buffers[micro_batch]

    def refill(self, step: int) -> None:
        """Copies the data of `step` into the buffers there are."""
        for micro_batch, buffer in self.buffers.items():
            refill(buffer, self._read(step, micro_batch))


class StaticCalls:
    """A function of buffers that is called outside of the graph; its results are buffers too."""

    def __init__(self, function: Callable[[Any], Any]):
        self._function = function
        self.calls: list[tuple[Any, Any]] = []
        self._done: int | None = None

    def __call__(self, value: Any) -> Any:
        if self._done is None:
            with _disable_current_modes():
                self.calls.append((value, copied(self._function(value))))
            return self.calls[-1][1]
        self._done += 1
        return self.calls[self._done - 1][1]

    def refill(self) -> None:
        """Calls the function again on the arguments' buffers, and starts the next step's order."""
        self._done = 0
        for value, buffer in self.calls:
            refill(buffer, self._function(value))
