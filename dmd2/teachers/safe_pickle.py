"""Reads EDM's network pickles without executing anything in them.

An EDM pickle rebuilds its modules by running Python source that it carries. Here every global that the file names
becomes an inert record of the arguments it was given; a global outside a short list stops the reading. Afterwards the
records are walked and tensors are built from what they hold. The stream is read by Python's own unpickler, whose memo
is a dict: the C one allocates whatever a hostile index asks for. A file can still waste time and memory.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from dmd2.errors import UserError

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
STORAGE = "torch.storage._load_from_bytes"
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
KNOWN = frozenset(
    {
        PERSISTENT,
        STORAGE,
        TENSOR,
        PARAMETER,
        "collections.OrderedDict",
        "torch.nn.modules.container.ModuleDict",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "builtins.set",
        "dnnlib.util.EasyDict",
    }
)
"""Globals of EDM's files. None is ever imported or called: each stands for an inert record."""


class _Record:
    """What a file said about one object: its global, the call's arguments, its state and its items."""

    __slots__ = ("args", "items", "state")
    args: tuple[Any, ...]
    items: dict[Any, Any]
    state: Any
    name = ""

    def __new__(cls, *args: Any) -> _Record:
        record = object.__new__(cls)
        record.args, record.state, record.items = args, None, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc,unused-ignore]
    """Python's unpickler with every global replaced by a record class of this reading alone."""

    def __init__(self, file: io.BufferedIOBase):
        super().__init__(file)
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> type:
        full = f"{module}.{name}"
        if full not in KNOWN:
            raise UserError(f"blocked global {full[:100]!r}: not part of EDM's format; get the file from its publisher")
        if full not in self._classes:
            self._classes[full] = type(full, (_Record,), {"__slots__": (), "name": full})
        return self._classes[full]

    def get_extension(self, code: int) -> NoReturn:
        raise pickle.UnpicklingError(f"extension code {code}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("persistent id")


def read_edm_pickle(path: Path | str) -> dict[str, Tensor]:
    """The parameters and buffers of the `ema` network in an EDM pickle, by their state-dict names.

    Raises UserError naming the file, and the blocked global if there is one.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file; put it there or correct the configured path")
    try:
        with path.open("rb") as file:
            content = _Unpickler(file).load()
        return _network(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever damaged bytes make of the reader
        raise UserError(
            f"{path}: not a pickle in EDM's format, or truncated ({_brief(error)}); fetch it again"
        ) from None


def _brief(error: Exception) -> str:
    """The error on one line of bounded length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _network(content: Any) -> dict[str, Tensor]:
    """The state dict of content["ema"]; modules are walked once each, so a file cannot fold them into each other."""
    if not isinstance(content, dict) or "ema" not in content:
        raise UserError("holds no `ema` network; EDM's published networks and snapshots do")
    seen: set[int] = set()
    return dict(_tensors(content["ema"], "", seen))


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a module and the modules in it, in the order of torch's state dict."""
    if id(module) in seen:
        raise ValueError(f"module {prefix!r} appears twice")
    seen.add(id(module))
    state = _state(module, prefix)
    for kind in ("_parameters", "_buffers"):
        for name, value in _mapping(state.get(kind, {})).items():
            if value is not None:
                yield prefix + name, _tensor(value, prefix + name)
    for name, value in _mapping(state.get("_modules", {})).items():
        if value is not None:
            yield from _tensors(value, f"{prefix}{name}.", seen)


def _state(module: Any, prefix: str) -> Mapping[Any, Any]:
    """The attributes of a module: EDM's persistent objects give them to their global, torch's own to BUILD."""
    if not isinstance(module, _Record):
        raise ValueError(f"{prefix or 'ema'!r} is {type(module).__name__}, not a module")
    if module.name == PERSISTENT:
        return _mapping(_mapping(module.args[0])["state"])
    return _mapping(module.state)


def _mapping(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, _Record) and value.name == "collections.OrderedDict":
        return value.items
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, found {type(value).__name__}")
    return value


def _tensor(value: Any, name: str) -> Tensor:
    """The tensor that a record of torch's rebuilding calls describes, checked against its storage."""
    if isinstance(value, _Record) and value.name == PARAMETER:
        value = value.args[0]
    if not isinstance(value, _Record) or value.name != TENSOR:
        raise ValueError(f"{name!r} is not a tensor")
    storage, offset, size, stride = value.args[:4]
    flat = _flat(storage, name)
    if math.prod(size) > len(flat):
        raise ValueError(f"{name!r} of shape {tuple(size)} exceeds its {len(flat)} stored values")
    return flat.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)


def _flat(storage: Any, name: str) -> Tensor:
    """All values of a stored buffer, read by torch's own restricted loader."""
    if not isinstance(storage, _Record) or storage.name != STORAGE:
        raise ValueError(f"{name!r} has no storage")
    try:
        loaded = torch.load(io.BytesIO(storage.args[0]), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its message advises to load without the restriction
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        cause = f"blocked global {blocked[1]!r}" if blocked else "no plain values"
        raise UserError(f"{cause} in the storage of {name!r}; get the file from its publisher") from None
    if not isinstance(loaded, torch.storage.TypedStorage):
        raise ValueError(f"the storage of {name!r} is {type(loaded).__name__}")
    return torch.tensor([], dtype=loaded.dtype).set_(loaded)
