"""Operations on meta tensors, watched one by one and run fast.

torch infers most output shapes in Python, at some 100 us an operation, and a training step has 10,000 operations of
which few differ. So the shapes are kept by operation and arguments, and the next outputs are made from them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of an output."""
Outputs = tuple[type, list[Layout | None]]
"""Tensor, or the sequence that an operation returns; the layout of each output, None for one that is not computed."""

_makes_new: dict[Any, bool] = {}
"""Whether an operation is neither a view nor in place."""
_known: dict[Any, Outputs | None] = {}
"""By operation and arguments; None for operations that have to be run each time."""


class OpObserver(TorchDispatchMode):
    """Calls `saw` after each operation in the block."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper that says so costs as much as an operation

    @abstractmethod
    def saw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """One operation, its arguments and what it returned."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            out = run(func, args, kwargs or {})
            self.saw(func, args, kwargs or {}, out)
        return out


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`; of meta tensors the shapes are inferred once for equal arguments.

    Views and operations in place are always run, and so is everything on tensors with content.
    """
    if func not in _makes_new:
        schema = func._schema
        _makes_new[func] = not schema.is_mutable and all(value.alias_info is None for value in schema.returns)
    if not _makes_new[func]:
        return func(*args, **kwargs)
    try:
        key = (func, _signature(args), _signature(tuple(kwargs.items())) if kwargs else None)
    except _HasContentError:
        return func(*args, **kwargs)
    if key not in _known:
        out = func(*args, **kwargs)
        _known[key] = _outputs_of(args, kwargs, out)
        return out
    known = _known[key]
    if known is None:
        return func(*args, **kwargs)
    kind, layouts = known
    made = [layout and torch.empty_strided(layout[0], layout[1], dtype=layout[2], device=META) for layout in layouts]
    return made[0] if kind is Tensor else kind(made)


class _HasContentError(Exception):
    """An argument that is neither a meta tensor nor a plain value."""


_PLAIN = (float, bool, str, torch.dtype, torch.device, torch.memory_format, torch.layout)


def _signature(value: Any) -> Any:
    """What an operation's outputs may depend on: shapes and dtypes of tensors, and plain values with their types."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise _HasContentError
        return value.shape, value.stride(), value.dtype
    kind = type(value)
    if kind is int or value is None:
        return value
    if kind is tuple or kind is list or kind is torch.Size:
        return tuple([_signature(item) for item in value])
    if isinstance(value, _PLAIN):
        return kind, value
    raise _HasContentError


def _outputs_of(args: Any, kwargs: Any, out: Any) -> Outputs | None:
    """How to make outputs like `out`; None unless each is a meta tensor that fills memory of its own."""
    outputs = [out] if isinstance(out, Tensor) else out
    if type(outputs) not in (tuple, list) or not outputs:
        return None
    taken = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    layouts: list[Layout | None] = []
    for tensor in outputs:
        if tensor is None:
            layouts.append(None)
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_meta:
            return None
        again = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
        storage = tensor.untyped_storage()
        if storage._cdata in taken or storage.nbytes() != again.untyped_storage().nbytes():
            return None
        taken.add(storage._cdata)
        layouts.append((tensor.shape, tensor.stride(), tensor.dtype))
    return (Tensor if isinstance(out, Tensor) else type(out)), layouts
